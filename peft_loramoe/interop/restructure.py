"""The experts of an adapter as lists, and lists as the experts of an adapter: what every operation of `surgery` shares."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoRAMoEConfig
from ..experts import LoRAExperts
from ..groups import ExpertGroups
from ..layer import LoRAMoELinear
from ..ops.router import select_gates
from ..peft_api import get_pattern_key
from .calibration import Adapter, CalibrationBatch, OutputError, visit_inputs


# How strongly least squares keeps the factors at 1, relative to the experts' mean square: decides only where the data does not.
RIDGE = 1e-4


@dataclass(frozen=True)
class Expert:
    """One expert outside of its layer; a null expert has neither A nor B.

    Attributes:
        group: index of its group before the operation; a new group has a new one.
        router: its row, shape (in_features,).
        A: shape (r, in_features).
        B: shape (out_features, r).
    """

    group: int
    router: Tensor
    A: Tensor | None = None
    B: Tensor | None = None

    def scaled(self, factor: float) -> Expert:
        """The expert with its output multiplied."""
        return self if self.B is None else dataclasses.replace(self, B=self.B * factor)


@dataclass(frozen=True)
class LayerChange:
    """What an operation did to one linear.

    Attributes:
        layer: its name inside the base model.
        expert_groups: the sizes of its groups now.
        relative_error: norm of the change of the mixture's output over its norm before, all real tokens of the calibration data
            together; None without calibration data.
    """

    layer: str
    expert_groups: list[int]
    relative_error: float | None


@dataclass(frozen=True)
class Surgery:
    """What an operation did to an adapter.

    Attributes:
        adapter: its name.
        layers: its linears.
        relative_error: as in `LayerChange`, over all layers together.
    """

    adapter: str
    layers: list[LayerChange]
    relative_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def read_experts(experts: LoRAExperts) -> list[Expert]:
    """The experts of one layer in their order, detached."""
    A, B = iter(experts.A.detach().split(experts.r)), iter(experts.B.detach().split(experts.r, dim=1))
    return [
        Expert(group, row) if group in experts.groups.null else Expert(group, row, next(A), next(B))
        for group, row in zip(experts.groups.of_experts, experts.router.detach())
    ]


def merged(first: Expert, second: Expert, share: float) -> Expert:
    """One expert of the same rank for two: the closest one to their weighted mean; `share` is the weight of the first."""
    rank, dtype = first.A.shape[0], first.A.dtype
    A = torch.cat([first.A, second.A]).double()
    B = torch.cat([share * first.B.double(), (1 - share) * second.B.double()], dim=1)
    # The singular value decomposition of B A, through factors no larger than 2r x 2r.
    (left, R_left), (right, R_right) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    new_A, new_B = torch.zeros_like(A[:rank]), torch.zeros_like(B[:, :rank])
    new_A[:kept] = root[:, None] * (Vh[:kept] @ right.T)
    new_B[:, :kept] = left @ U[:, :kept] * root
    row = (share * first.router.double() + (1 - share) * second.router.double()).to(first.router.dtype)
    return Expert(first.group, row, new_A.to(dtype), new_B.to(dtype))


def restructure(
    model: nn.Module,
    adapter: Adapter,
    layers: dict[LoRAMoELinear, list[Expert]],
    batches: list[CalibrationBatch],
    *,
    top_k: int | None = None,
    new_names: dict[int, str] | None = None,
    fit: bool = False,
) -> Surgery:
    """Give each layer the experts of its list; first everything is built, checked and measured, then the model is changed.

    Args:
        model: the adapted model.
        adapter: which of its adapters.
        layers: the new experts of each layer, in their order.
        batches: on which the change of the output is measured; may be empty.
        top_k: the new one; None keeps it, or lowers it to the number of experts, with a warning.
        new_names: task types of new groups, by the index that `Expert.group` gives them.
        fit: rescale the B of each expert by the factor with which the output is closest to the old one on `batches`.

    Raises:
        ValueError: a layer would have fewer than two experts, a group be torn apart, or the layers differ in their groups.
    """
    config = _new_config(adapter, layers, top_k, new_names or {})
    built = {
        layer: _build(layer.loramoe_experts[adapter.name], experts, config.groups_of(layer.name), config.top_k)
        for layer, experts in layers.items()
    }
    if fit:
        _fit(model, adapter, batches, built)
    error = OutputError()

    def visit(layer: LoRAMoELinear, x: Tensor, task_types: Tensor) -> None:
        error.add(layer.name, layer.loramoe_experts[adapter.name](x)[0], built[layer](x)[0])

    if batches:
        visit_inputs(model, adapter, batches, visit)
    for layer, experts in built.items():
        layer.loramoe_experts[adapter.name] = experts
    for field in dataclasses.fields(config):
        setattr(adapter.config, field.name, getattr(config, field.name))
    changes = [LayerChange(layer.name, list(experts.groups.sizes), error.of(layer.name)) for layer, experts in built.items()]
    return Surgery(adapter.name, changes, error.of())


def _sizes(experts: list[Expert]) -> dict[int, int]:
    """Number of experts of each group, in the order in which the groups come."""
    sizes: dict[int, int] = defaultdict(int)
    for expert in experts:
        sizes[expert.group] += 1
    return sizes


def _new_config(
    adapter: Adapter, layers: dict[LoRAMoELinear, list[Expert]], top_k: int | None, new_names: dict[int, str]
) -> LoRAMoEConfig:
    """The adapter's configuration with the layout of these experts; validated, the old one is left alone."""
    old, order = adapter.config, list(_sizes(next(iter(layers.values()))))
    default, pattern = None, {}
    for layer, experts in layers.items():
        sizes = _sizes(experts)
        if len(experts) < 2:
            raise ValueError(f"Layer '{layer.name}' would have {len(experts)} expert; the router needs at least 2.")
        if [e.group for e in experts] != [group for group, size in sizes.items() for _ in range(size)]:
            raise ValueError(
                f"The groups of layer '{layer.name}' would be torn apart: its experts would be of the groups "
                f"{[e.group for e in experts]}, in this order. Keep those of a group side by side."
            )
        if list(sizes) != order:
            raise ValueError(
                f"The layers would differ in their groups: '{layer.name}' would have the groups {list(sizes)}, "
                f"'{next(iter(layers)).name}' {order}. Every layer must keep an expert of each group, or none must."
            )
        key = get_pattern_key(old.num_experts_pattern, layer.name)
        if key in old.num_experts_pattern:
            pattern[key] = list(sizes.values())
        else:
            default = list(sizes.values())
    default = default or next(iter(pattern.values()))  # every layer is in the pattern
    smallest = min(len(experts) for experts in layers.values())
    if top_k is None and old.top_k is not None and old.top_k > smallest:
        warnings.warn(f"top_k={old.top_k} is lowered to {smallest}, the number of experts that are left.")
        top_k = smallest
    null = {e.group for experts in layers.values() for e in experts if e.A is None}
    names = old.task_type_names and {**dict(enumerate(old.task_type_names)), **new_names}
    return dataclasses.replace(
        old,
        num_experts=sum(default),
        expert_groups=default,
        num_experts_pattern=pattern,
        null_groups=[i for i, group in enumerate(order) if group in null] or None,
        task_type_names=[names[group] for group in order] if names else None,
        top_k=old.top_k if top_k is None else top_k,
    )


def _build(old: LoRAExperts, experts: list[Expert], groups: ExpertGroups, top_k: int | None) -> LoRAExperts:
    """The mixture of these experts; everything else is as in the old one."""
    options = old.options._replace(experts=groups.lora_experts, scaling=old.initial_scaling, top_k=top_k)
    new = LoRAExperts(old.A.shape[1], old.B.shape[0], r=old.r, groups=groups, options=options, frozen=old.frozen)
    new.scaling = old.scaling
    lora = [expert for expert in experts if expert.A is not None]
    values = {
        "A": torch.cat([expert.A for expert in lora]),
        "B": torch.cat([expert.B for expert in lora], dim=1),
        "router": torch.stack([expert.router for expert in experts]),
    }
    for name, value in values.items():
        setattr(new, name, nn.Parameter(value, requires_grad=getattr(old, name).requires_grad))
    return new.train(old.training)


def _fit(model: nn.Module, adapter: Adapter, batches: list[CalibrationBatch], built: dict[LoRAMoELinear, LoRAExperts]) -> None:
    """Multiply the B of each new expert by its factor in the least-squares fit of the old outputs, layer by layer."""
    moments: dict[LoRAMoELinear, Tensor] = {}

    def visit(layer: LoRAMoELinear, x: Tensor, task_types: Tensor) -> None:
        both = torch.cat([_gated(built[layer], x), _gated(layer.loramoe_experts[adapter.name], x)], dim=1)
        moments[layer] = moments.get(layer, 0) + both.T @ both

    visit_inputs(model, adapter, batches, visit)
    for layer, experts in built.items():
        B, old_B = experts.B.detach().double(), layer.loramoe_experts[adapter.name].B.detach().double()
        # Inner products of the outputs of the new experts' rank channels, with each other and with the old mixture's output.
        channels = B.T @ torch.cat([B, old_B], dim=1) * moments[layer][: B.shape[1]]
        by_expert = channels.unflatten(0, (-1, experts.r)).sum(1)
        products = by_expert[:, : B.shape[1]].unflatten(1, (-1, experts.r)).sum(2)
        target = by_expert[:, B.shape[1] :].sum(1)
        ridge = RIDGE * products.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(target), dtype=torch.float64, device=target.device)
        factors = torch.linalg.solve(products + ridge * eye, target + ridge)
        with torch.no_grad():
            experts.B *= factors.repeat_interleave(experts.r).to(experts.B.dtype)


def _gated(experts: LoRAExperts, x: Tensor) -> Tensor:
    """The gated rank channels of the experts, shape (T, E*r), float64: what the mixture multiplies by B."""
    gates = select_gates(experts(x)[1], experts.options.experts, experts.options.top_k) * experts.scaling
    return (x @ experts.A.to(x.dtype).T).double() * gates.double().repeat_interleave(experts.r, dim=1)
