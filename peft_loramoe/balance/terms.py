"""The balance terms of a batch, from the recordings of its forward passes.

Layers whose samples have the same shape are computed together, so the number of operations does not grow with the
number of layers: on a GPU, small operations take as long to launch as large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LoRAMoEConfig
from .constraint import balance_targets, balance_term
from .distributed import concatenate_over_processes, is_distributed
from .recording import Record, Recording, group_by


class Terms(NamedTuple):
    """Unweighted balance terms: `values[i]` is that of `layers[i]`, shape (L,), floating point."""

    adapter: str
    layers: list[str]
    values: Tensor


class _Table(NamedTuple):
    """What one layer sees, a row for each sample.

    Importance (M, N), real tokens (M, 1) and targets (M, N), one dtype.
    """

    sums: Tensor
    counts: Tensor
    targets: Tensor


def compute_terms(recordings: Sequence[Recording], configs: Mapping[str, LoRAMoEConfig]) -> list[Terms]:
    """Compute the balance terms of the forward passes that form one batch.

    Args:
        recordings: the passes.
        configs: the adapters' configurations by name.

    Returns:
        Every adapter and layer that recorded something, once.

    Raises:
        ValueError: the tokens of a layer cannot be attributed to samples, its probabilities carry no gradient, or an
            adapter was deleted since.
    """
    tables = _tables(recordings, configs)
    shared = [key for key in tables if configs[key[0]].balance_across_processes]
    if shared and recordings[-1].training and is_distributed():
        gathered = iter(concatenate_over_processes([column for key in shared for column in tables[key]]))
        for key in shared:
            tables[key] = _Table(*(next(gathered).to(column.device) for column in tables[key]))
    terms = []
    for keys in group_by(
        tables, lambda key: (key[0], tables[key].sums.shape, tables[key].sums.dtype, tables[key].sums.device)
    ):
        adapter = keys[0][0]
        sums, counts, targets = (torch.stack(column) for column in zip(*(tables[key] for key in keys)))
        values = balance_term(
            sums,
            counts.squeeze(-1),
            targets,
            formula=configs[adapter].balance_formula,
            target=configs[adapter].balance_target,
            importance=configs[adapter].balance_importance,
        )
        terms.append(Terms(adapter, [layer for _, layer in keys], values))
    return terms


def _tables(recordings: Sequence[Recording], configs: Mapping[str, LoRAMoEConfig]) -> dict[tuple[str, str], _Table]:
    """The table of each adapter and layer, in the order of the layers, which is the same in all processes."""
    # A layer that is used several times, or in several passes, has several records: their samples form one batch.
    uses: dict[tuple[str, str], list[_Table]] = {(r.adapter, r.layer): [] for call in recordings for r in call.records}
    for adapter, _ in uses:
        if adapter not in configs:
            raise deleted_adapter(adapter)
    for call in recordings:
        same_tokens = group_by(call.records, lambda r, call=call: (*call.key(r), r.probabilities.dtype, r.groups))
        for records in same_tokens:
            first = records[0]
            sums, counts = call.importance(records)
            targets = balance_targets(call.task_types(first), first.groups, configs[first.adapter].balance_delta)
            counts, targets = counts[:, None].to(sums.dtype), targets.to(sums.dtype)
            for record, of_record in zip(records, sums):
                _refuse_without_gradient(record, call, configs[record.adapter])
                uses[record.adapter, record.layer].append(_Table(of_record, counts, targets))
    return {
        key: tables[0] if len(tables) == 1 else _Table(*map(torch.cat, zip(*tables))) for key, tables in uses.items()
    }


def _refuse_without_gradient(record: Record, recording: Recording, config: LoRAMoEConfig) -> None:
    if (
        record.trained
        and recording.grad_enabled
        and not record.probabilities.requires_grad
        and config.balance_loss_weight > 0
    ):
        raise ValueError(
            f"The router probabilities of layer '{record.layer}' carry no gradient, so the balance term would not "
            "train the router: the layer ran inside reentrant gradient checkpointing. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, or set balance_loss_weight=0.'
        )


def deleted_adapter(name: str) -> ValueError:
    """The error for reading the term of an adapter that is gone."""
    return ValueError(
        f"Adapter '{name}' was deleted after the forward pass, so its balance term cannot be computed. Read it before "
        "delete_adapter, or run another forward pass."
    )
