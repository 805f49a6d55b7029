"""`Recording`: the router probabilities of one call of the base model, and the samples that its tokens form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..groups import ExpertGroups
from .constraint import importance
from .samples import Batch, Samples
from .task_types import task_type_tensor


Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """One use of one adapted linear.

    Attributes:
        adapter: name of the adapter.
        layer: name of the linear inside the base model.
        groups: its expert groups.
        trained: whether its router is trained.
        probabilities: router probabilities, shape (..., N), attached to the graph.
    """

    adapter: str
    layer: str
    groups: ExpertGroups
    trained: bool
    probabilities: Tensor


class Recording:
    """One call of the base model.

    Args:
        batch: the call's arguments.
        training: whether the model is in training mode.

    Attributes:
        records: uses of adapted layers, in their order.
        left_out: names of adapted layers whose tokens belong to no row that could be told.
    """

    def __init__(self, batch: Batch, training: bool) -> None:
        self.batch = batch
        self.training = training
        self.grad_enabled = torch.is_grad_enabled()
        self.records: list[Record] = []
        self.left_out: list[str] = []
        # Shared by layers that see the same tokens. Found by comparing keys: hashing a shape would make torch.compile
        # take it as fixed.
        self._samples: list[tuple[tuple[Any, ...], Samples]] = []

    @property
    def carries_gradient(self) -> bool:
        """Whether the call was a training pass that a loss can be differentiated through."""
        return self.training and self.grad_enabled

    def importance(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Sum the probabilities over the real tokens of each sample.

        Args:
            records: L records with the same `key`.

        Returns:
            The sums, shape (L, M, N), and the number of real tokens of each sample, shape (M,), int64.
        """
        return self._sum(records[0], torch.stack([record.probabilities.flatten(0, -2) for record in records]))

    def entropy(self, record: Record) -> Tensor:
        """Sum over each sample's real tokens of the entropy of the router probabilities, shape (M,), in nats."""
        entropies = torch.special.entr(record.probabilities.flatten(0, -2)).sum(-1, keepdim=True)
        return self._sum(record, entropies)[0].squeeze(-1)

    def task_types(self, record: Record) -> Tensor:
        """Task type of each sample, shape (M,), int64, -1 for unknown."""
        return self._samples_of(record).task_types

    def check_task_types(self) -> None:
        """Raise for task types that do not fit the batch or the active adapters, whether or not a term is computed."""
        if self.batch.task_types is not None:
            for records in group_by(self.records, lambda record: (record.adapter,)):
                self._row_types(records[0].groups)

    def key(self, record: Record) -> tuple[Any, ...]:
        """Equal for records of one adapter that see the same tokens."""
        probabilities = record.probabilities
        return record.adapter, probabilities.shape[:-1], probabilities.device, self.batch.reads(record.layer)

    def _sum(self, record: Record, values: Tensor) -> tuple[Tensor, Tensor]:
        samples = self._samples_of(record)
        return importance(values, samples.ids, samples.real, len(samples.task_types))

    def _samples_of(self, record: Record) -> Samples:
        key = self.key(record)
        if (samples := find(self._samples, key)) is None:
            _, tokens, device, _ = key
            samples = self.batch.samples(tuple(tokens), record.layer, self._row_types(record.groups), device)
            if not torch.compiler.is_compiling() and not samples.real.any():
                raise ValueError(
                    "Nothing can be averaged over a batch without a real token: attention_mask is zero everywhere. "
                    "Leave such batches out, or train without a balance term (balance_loss_weight=0)."
                )
            self._samples.append((key, samples))
        return samples

    def _row_types(self, groups: ExpertGroups) -> Tensor | None:
        if self.batch.task_types is None:
            return None
        types = task_type_tensor(self.batch.task_types, len(groups), groups.names)
        if types.shape[0] != self.batch.rows:
            raise ValueError(f"task_types has shape {tuple(types.shape)}, but the batch has {self.batch.rows} rows.")
        return types


def group_by(items: Iterable[Item], key: Callable[[Item], tuple[Any, ...]]) -> list[list[Item]]:
    """Collect items with equal keys, in the order of their first item.

    Keys are compared, not hashed (see `Recording`).
    """
    groups: list[tuple[tuple[Any, ...], list[Item]]] = []
    for item in items:
        if (group := find(groups, key(item))) is None:
            groups.append((key(item), [item]))
        else:
            group.append(item)
    return [group for _, group in groups]


def find(entries: list[tuple[tuple[Any, ...], Any]], key: tuple[Any, ...]) -> Any:
    """The value of a key in a list of pairs, or None."""
    for known, value in entries:  # torch 2.7 cannot compile next(..., None)
        if known == key:
            return value
    return None
