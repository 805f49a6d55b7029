"""How alike the experts of each adapted linear are."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ..ops.similarity import cosines, inner_products, subspace_overlaps
from .adapted import experts_by_layer


def expert_similarity(model: nn.Module) -> list[dict[str, Any]]:
    """Compare the experts of each adapted linear, pair by pair, from their parameters alone.

    Args:
        model: the adapted model, wrapped in whatever way; all its LoRAMoE adapters are compared, active or not.

    Returns:
        One record for each adapter, layer and pair of experts, in the order of the model's layers: `adapter`, `layer`, `expert`
        and `other` (expert < other), `group` and `other_group`, and

        - `cosine`: of ``B_i A_i`` and ``B_j A_j`` as vectors, in [-1, 1]: 1 where both do the same;
        - `output_overlap`: of the column spaces of ``B_i`` and ``B_j``, what they can write;
        - `input_overlap`: of the row spaces of ``A_i`` and ``A_j``, what they can read.

        An overlap is the mean squared cosine of the principal angles, in [0, 1] (Hu et al. 2022, section 7.2): 1 where one
        space contains the other; random spaces of r dimensions in n have r / n on average. Each is None where one of the two
        experts is null, or its matrix zero.

    Raises:
        ValueError: the model has no LoRAMoE layers, or experts without values here (meta device, sharded) or with values that
            are not finite.
    """
    records = []
    for (adapter, layer), experts in experts_by_layer(model).items():
        A, B = experts.A.detach(), experts.B.detach()
        if A.is_meta or not A.numel():
            raise ValueError(
                f"The experts of adapter '{adapter}' in layer '{layer}' have no values here: they are on the meta device or "
                "sharded over processes. Load the saved adapter in one process."
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(f"The experts of adapter '{adapter}' in layer '{layer}' are not finite: training diverged.")
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
