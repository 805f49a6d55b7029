"""What one call of the base model leaves behind: the router probabilities of its layers and what its arguments say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import LoRAMoEConfig
from ..experts import LoRAExperts
from .constraint import balance_targets, importance
from .samples import Batch, Samples, task_type_tensor


Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """One use of one adapted linear: its router probabilities, shape (..., N), attached to the graph."""

    adapter: str
    layer: str
    experts: LoRAExperts
    probabilities: Tensor


class ForwardPass:
    """The records of one call of the base model, and the samples that their tokens form.

    Args:
        configs: the adapters' configurations by name.
        batch: the call's arguments.
        training: whether the model is in training mode.
    """

    def __init__(self, configs: Mapping[str, LoRAMoEConfig], batch: Batch, training: bool) -> None:
        self.configs = configs
        self.batch = batch
        self.training = training
        self.grad_enabled = torch.is_grad_enabled()
        self.records: list[Record] = []
        # What layers that see the same tokens share, with its key: to hash a shape would make torch.compile take it as fixed.
        self._samples: list[tuple[tuple, Samples]] = []
        self._targets: list[tuple[tuple, Tensor]] = []

    @property
    def balanced(self) -> list[str]:
        """The adapters that recorded something and have a positive `balance_loss_weight`."""
        return sorted({r.adapter for r in self.records if self.configs[r.adapter].balance_loss_weight > 0})

    def alike_records(self) -> list[list[Record]]:
        """The records, those together whose importance can be computed at once and whose targets are the same."""
        return alike(self.records, lambda r: (*self._key(r), r.probabilities.dtype, r.experts.groups))

    def importance(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Sums over the real tokens of each sample, shape (L, M, N), of L records that are alike; their number, shape (M,)."""
        return self._sum(records[0], torch.stack([record.probabilities.flatten(0, -2) for record in records]))

    def targets(self, record: Record) -> Tensor:
        """The balance targets of one record, shape (M, N)."""
        groups = record.experts.groups
        key = (*self._key(record), groups)
        if (targets := _find(self._targets, key)) is None:
            targets = balance_targets(self.task_types(record), groups, self.configs[record.adapter].balance_delta)
            self._targets.append((key, targets))
        return targets

    def task_types(self, record: Record) -> Tensor:
        """The task type of each sample, shape (M,), int64, -1 for unknown."""
        return self._samples_of(record).task_types

    def entropy(self, record: Record) -> Tensor:
        """Sum over each sample's real tokens of the entropy of the router's probabilities, shape (M,), in nats."""
        entropies = torch.special.entr(record.probabilities.flatten(0, -2)).sum(-1, keepdim=True)
        return self._sum(record, entropies)[0].squeeze(-1)

    def check_task_types(self) -> None:
        """Raise for task types that do not fit the batch or the active adapters, whether or not a term is computed."""
        if self.batch.task_types is not None:
            for adapter in {record.adapter for record in self.records}:
                self._row_types(adapter)

    def refuse_reentrant_checkpointing(self, record: Record) -> None:
        """Raise if the record's probabilities should carry gradient but do not."""
        trained = record.experts.router.requires_grad and self.grad_enabled
        if trained and not record.probabilities.requires_grad and self.configs[record.adapter].balance_loss_weight > 0:
            raise ValueError(
                f"The router probabilities of layer '{record.layer}' carry no gradient, so the balance term would not train "
                "the router: the layer ran inside reentrant gradient checkpointing. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set balance_loss_weight=0.'
            )

    def _sum(self, record: Record, values: Tensor) -> tuple[Tensor, Tensor]:
        samples = self._samples_of(record)
        return importance(values, samples.ids, samples.real, len(samples.task_types))

    def _key(self, record: Record) -> tuple:
        probabilities, of_decoder = record.probabilities, self.batch.reads_decoder_tokens(record.layer)
        return record.adapter, probabilities.shape[:-1], probabilities.device, of_decoder

    def _samples_of(self, record: Record) -> Samples:
        key = self._key(record)
        if (samples := _find(self._samples, key)) is None:
            _, tokens, device, _ = key
            samples = self.batch.samples(tuple(tokens), record.layer, self._row_types(record.adapter), device)
            if not torch.compiler.is_compiling() and not samples.real.any():
                raise ValueError(
                    "Nothing can be averaged over a batch without a real token: attention_mask is zero everywhere. Leave such "
                    "batches out, or train without a balance term (balance_loss_weight=0)."
                )
            self._samples.append((key, samples))
        return samples

    def _row_types(self, adapter: str) -> Tensor | None:
        if self.batch.task_types is None:
            return None
        config = self.configs[adapter]
        types = task_type_tensor(self.batch.task_types, config.num_groups, config.task_type_names)
        if types.shape[0] != self.batch.rows:
            raise ValueError(f"task_types has shape {tuple(types.shape)}, but the batch has {self.batch.rows} rows.")
        return types


def alike(items: Iterable[Item], key: Callable[[Item], tuple]) -> list[list[Item]]:
    """The items, those of equal keys together; keys are compared, not hashed (see `ForwardPass`)."""
    groups: list[tuple[tuple, list[Item]]] = []
    for item in items:
        if (group := _find(groups, key(item))) is None:
            groups.append((key(item), [item]))
        else:
            group.append(item)
    return [group for _, group in groups]


def _find(entries: list[tuple[tuple, Any]], key: tuple) -> Any:
    for known, value in entries:  # torch 2.7 cannot compile next(..., None)
        if known == key:
            return value
    return None
