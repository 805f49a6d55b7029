"""Similarity of the experts of each adapted linear."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ..ops.similarity import cosines, inner_products, subspace_overlaps
from .adapted import experts_by_layer


def expert_similarity(model: nn.Module) -> list[dict[str, Any]]:
    """Compare the experts of each adapted linear pairwise by their parameters.

    Args:
        model: the adapted model, possibly wrapped. All its LoRAMoE adapters are compared, active or not.

    Returns:
        One record per adapter, layer and pair of experts, in the order of the model: `adapter`, `layer`, `expert` and
        `other` (expert < other), `group` and `other_group`, and

        - `cosine`: cosine of ``B_i A_i`` and ``B_j A_j`` as vectors, in [-1, 1];
        - `output_overlap`: overlap of the column spaces of ``B_i`` and ``B_j``;
        - `input_overlap`: overlap of the row spaces of ``A_i`` and ``A_j``.

        An overlap is the mean squared cosine of the principal angles, in [0, 1] (Hu et al. 2022, section 7.2). It is 1
        if one space contains the other, and r / n on average for random r-dimensional spaces in n dimensions. Values
        are None if one of the experts is null or its matrix is zero.

    Raises:
        ValueError: the model has no LoRAMoE layers, or its experts are on the meta device, sharded, or not finite.

    Example:
        >>> pairs = expert_similarity(tiny_model(num_experts=4))
        >>> len(pairs), pairs[0]["expert"], pairs[0]["other"]
        (36, 0, 1)
    """
    records = []
    for (adapter, layer), experts in experts_by_layer(model).items():
        A, B = experts.A.detach(), experts.B.detach()
        if A.is_meta or not A.numel():
            raise ValueError(
                f"The experts of adapter '{adapter}' in layer '{layer}' have no values in this process: they are on "
                "the meta device or sharded. Load the saved adapter in a single process."
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(
                f"The experts of adapter '{adapter}' in layer '{layer}' are not finite; training diverged."
            )
        A_of_each, B_of_each = A.unflatten(0, (-1, experts.r)), B.unflatten(1, (-1, experts.r)).movedim(1, 0)
        tables = {
            "cosine": cosines(inner_products(A, B, experts.r)).tolist(),
            "output_overlap": subspace_overlaps(B_of_each).tolist(),
            "input_overlap": subspace_overlaps(A_of_each.mT).tolist(),
        }
        groups, place = experts.groups.of_experts, {n: i for i, n in enumerate(experts.options.experts)}
        records += [
            {
                "adapter": adapter,
                "layer": layer,
                "expert": first,
                "other": second,
                "group": groups[first],
                "other_group": groups[second],
                **{name: _entry(table, place.get(first), place.get(second)) for name, table in tables.items()},
            }
            for first, second in combinations(range(experts.num_experts), 2)
        ]
    return records


def _entry(table: list[list[float]], first: int | None, second: int | None) -> float | None:
    if first is None or second is None or math.isnan(table[first][second]):
        return None
    return table[first][second]
