"""The balance terms of a batch, from what its forward passes recorded.

Computed for all layers at once that see samples of the same shape: as few operations as there are shapes, however many layers
there are. On a GPU small operations take as long to launch as large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LoRAMoEConfig
from .constraint import balance_term
from .distributed import concatenate_over_processes, is_distributed
from .recording import ForwardPass, alike


class Terms(NamedTuple):
    """The unweighted balance terms of some layers: `values[i]` is that of `layers[i]`, shape (L,), floating point."""

    adapter: str
    layers: list[str]
    values: Tensor


class _Table(NamedTuple):
    """What one layer sees, a row for each sample: importance (M, N), real tokens (M, 1) and targets (M, N), one dtype."""

    sums: Tensor
    counts: Tensor
    targets: Tensor


def compute_terms(passes: Sequence[ForwardPass], configs: Mapping[str, LoRAMoEConfig]) -> list[Terms]:
    """The balance terms of the passes that form one batch.

    Args:
        passes: what they recorded.
        configs: the adapters' configurations by name.

    Returns:
        Every adapter and layer that recorded something, once.

    Raises:
        ValueError: the tokens of a layer cannot be attributed to samples, or its probabilities carry no gradient.
    """
    tables = _tables(passes)
    shared = [key for key in tables if configs[key[0]].balance_across_processes]
    if shared and passes[-1].training and is_distributed():
        gathered = iter(concatenate_over_processes([column for key in shared for column in tables[key]]))
        for key in shared:
            tables[key] = _Table(*(next(gathered).to(column.device) for column in tables[key]))
    terms = []
    for keys in alike(tables, lambda key: (key[0], tables[key].sums.shape, tables[key].sums.dtype, tables[key].sums.device)):
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


def _tables(passes: Sequence[ForwardPass]) -> dict[tuple[str, str], _Table]:
    """The table of each adapter and layer, in the order of the layers, which is the same in all processes."""
    # A layer has several records if it is used more than once or in several passes: their samples form one batch.
    uses: dict[tuple[str, str], list[_Table]] = {(r.adapter, r.layer): [] for one in passes for r in one.records}
    for one in passes:
        for records in one.alike_records():
            sums, counts = one.importance(records)
            counts, targets = counts[:, None].to(sums.dtype), one.targets(records[0]).to(sums.dtype)
            for record, of_record in zip(records, sums):
                one.refuse_reentrant_checkpointing(record)
                uses[record.adapter, record.layer].append(_Table(of_record, counts, targets))
    return {key: tables[0] if len(tables) == 1 else _Table(*map(torch.cat, zip(*tables))) for key, tables in uses.items()}
