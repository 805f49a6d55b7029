"""Turn the experts of an adapter into lists and back: the basis of all operations in `surgery`."""

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
from ..layer import LoRAMoELayer
from ..ops.router import select_gates
from ..peft_api import get_pattern_key
from .calibration import Adapter, CalibrationBatch, OutputError, visit_inputs


# Ridge penalty that pulls the least-squares factors to 1, relative to the experts' mean square.
RIDGE = 1e-4


@dataclass(frozen=True)
class Expert:
    """An expert outside of its layer; null experts have neither A nor B.

    Attributes:
        group: index of its group before the operation, or a new index for a new group.
        router: its row of the router, shape (in_features,).
        A: shape (r, in_features).
        B: shape (out_features, r).
    """

    group: int
    router: Tensor
    A: Tensor | None = None
    B: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of an expert that is not null."""
        assert self.A is not None and self.B is not None
        return self.A, self.B

    def scaled(self, factor: float) -> Expert:
        """The expert with its output multiplied by a factor."""
        return self if self.B is None else dataclasses.replace(self, B=self.B * factor)


@dataclass(frozen=True)
class LayerChange:
    """Effect of an operation on a linear.

    Attributes:
        layer: name inside the base model.
        expert_groups: new sizes of its groups.
        relative_error: norm of the change of the mixture's output divided by the norm of the old output, over all real
            tokens of the calibration data; None without calibration data.
    """

    layer: str
    expert_groups: list[int]
    relative_error: float | None


@dataclass(frozen=True)
class Surgery:
    """Effect of an operation on an adapter.

    Attributes:
        adapter: name of the adapter.
        layers: effect on each linear.
        relative_error: as in `LayerChange`, over all layers.

    Example:
        >>> from peft_loramoe.interop import remove_experts
        >>> surgery = remove_experts(tiny_model(num_experts=4), [1])
        >>> surgery.layers[0].expert_groups, surgery.relative_error
        ([1, 2], None)
    """

    adapter: str
    layers: list[LayerChange] = dataclasses.field(repr=False)
    relative_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """The effect as plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def read_experts(experts: LoRAExperts) -> list[Expert]:
    """The detached experts of a layer, in their order."""
    A, B = iter(experts.A.detach().split(experts.r)), iter(experts.B.detach().split(experts.r, dim=1))
    return [
        Expert(group, row) if group in experts.groups.null else Expert(group, row, next(A), next(B))
        for group, row in zip(experts.groups.of_experts, experts.router.detach())
    ]


def merged(first: Expert, second: Expert, share: float) -> Expert:
    """Merge two experts into the expert of the same rank closest to their weighted mean; `share` weights the first."""
    (first_A, first_B), (second_A, second_B) = first.factors, second.factors
    rank, dtype = first_A.shape[0], first_A.dtype
    A = torch.cat([first_A, second_A]).double()
    B = torch.cat([share * first_B.double(), (1 - share) * second_B.double()], dim=1)
    # Singular value decomposition of B A from factors of at most 2r x 2r.
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
    layers: dict[LoRAMoELayer, list[Expert]],
    batches: list[CalibrationBatch],
    *,
    top_k: int | None = None,
    new_names: dict[int, str] | None = None,
    fit: bool = False,
) -> Surgery:
    """Replace the experts of each layer. The model changes only after everything has been built, checked and measured.

    Args:
        model: the adapted model.
        adapter: the adapter.
        layers: the new experts of each layer, in order.
        batches: calibration data for the change of the output; may be empty.
        top_k: new value of `top_k`; None keeps it, or lowers it to the number of experts with a warning.
        new_names: task types of new groups, by `Expert.group`.
        fit: rescale the B of each expert to minimize the change of the output on `batches`.

    Raises:
        ValueError: a layer would have fewer than two experts, a group would be split, or the layers would differ in
            their groups.
    """
    config = _new_config(adapter, layers, top_k, new_names or {})
    built = {
        layer: _build(layer.loramoe_experts[adapter.name], experts, config.groups_of(layer.name), config.top_k)
        for layer, experts in layers.items()
    }
    if fit:
        _fit(model, adapter, batches, built)
    error = OutputError()

    def visit(layer: LoRAMoELayer, x: Tensor, task_types: Tensor) -> None:
        error.add(layer.name, layer.loramoe_experts[adapter.name](x)[0], built[layer](x)[0])

    if batches:
        visit_inputs(model, adapter, batches, visit, "Measuring the change")
    for layer, experts in built.items():
        layer.loramoe_experts[adapter.name] = experts
    for field in dataclasses.fields(config):
        setattr(adapter.config, field.name, getattr(config, field.name))
    changes = [
        LayerChange(layer.name, list(experts.groups.sizes), error.of(layer.name)) for layer, experts in built.items()
    ]
    return Surgery(adapter.name, changes, error.of())


def _sizes(experts: list[Expert]) -> dict[int, int]:
    """Number of experts of each group, in the order of the groups."""
    sizes: dict[int, int] = defaultdict(int)
    for expert in experts:
        sizes[expert.group] += 1
    return sizes


def _new_config(
    adapter: Adapter, layers: dict[LoRAMoELayer, list[Expert]], top_k: int | None, new_names: dict[int, str]
) -> LoRAMoEConfig:
    """A validated copy of the adapter's configuration with the layout of these experts."""
    old, order = adapter.config, list(_sizes(next(iter(layers.values()))))
    default, pattern = None, {}
    for layer, experts in layers.items():
        sizes = _sizes(experts)
        if len(experts) < 2:
            raise ValueError(f"Layer '{layer.name}' would have {len(experts)} expert; a router needs at least 2.")
        if [e.group for e in experts] != [group for group, size in sizes.items() for _ in range(size)]:
            raise ValueError(
                f"The groups of layer '{layer.name}' would be split: the groups of its experts would be "
                f"{[e.group for e in experts]}, in this order. Keep the experts of a group side by side."
            )
        if list(sizes) != order:
            raise ValueError(
                f"The layers would differ in their groups: '{layer.name}' would have the groups {list(sizes)}, but "
                f"'{next(iter(layers)).name}' {order}. Keep an expert of the group in every layer, or in none."
            )
        key = get_pattern_key(list(old.num_experts_pattern), layer.name)
        if key in old.num_experts_pattern:
            pattern[key] = list(sizes.values())
        else:
            default = list(sizes.values())
    default = default or next(iter(pattern.values()))  # every layer is in the pattern
    smallest = min(len(experts) for experts in layers.values())
    if top_k is None and old.top_k is not None and old.top_k > smallest:
        warnings.warn(f"top_k={old.top_k} is lowered to {smallest}, the number of remaining experts.")
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
    """A mixture of these experts that otherwise equals the old one."""
    options = old.options._replace(experts=groups.lora_experts, scaling=old.initial_scaling, top_k=top_k)
    new = LoRAExperts(old.A.shape[1], old.B.shape[0], r=old.r, groups=groups, options=options, frozen=old.frozen)
    new.scaling = old.scaling
    lora = [expert.factors for expert in experts if expert.A is not None]
    values = {
        "A": torch.cat([A for A, _ in lora]),
        "B": torch.cat([B for _, B in lora], dim=1),
        "router": torch.stack([expert.router for expert in experts]),
    }
    for name, value in values.items():
        setattr(new, name, nn.Parameter(value, requires_grad=getattr(old, name).requires_grad))
    return new.train(old.training)


def _fit(
    model: nn.Module, adapter: Adapter, batches: list[CalibrationBatch], built: dict[LoRAMoELayer, LoRAExperts]
) -> None:
    """Scale the B of each new expert by a factor that fits the old outputs by least squares, layer by layer."""
    moments: dict[LoRAMoELayer, Tensor] = {}

    def visit(layer: LoRAMoELayer, x: Tensor, task_types: Tensor) -> None:
        both = torch.cat([_gated(built[layer], x), _gated(layer.loramoe_experts[adapter.name], x)], dim=1)
        moments[layer] = moments.get(layer, 0) + both.T @ both

    visit_inputs(model, adapter, batches, visit, "Fitting the experts")
    for layer, experts in built.items():
        B, old_B = experts.B.detach().double(), layer.loramoe_experts[adapter.name].B.detach().double()
        # Inner products of the new rank channels' outputs with each other and with the old mixture's output.
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
    """The gated rank channels, shape (T, E*r), float64, which the mixture multiplies by B."""
    gates = select_gates(experts(x)[1], experts.options.experts, experts.options.top_k) * experts.scaling
    return (x @ experts.A.to(x.dtype).T).double() * gates.double().repeat_interleave(experts.r, dim=1)
