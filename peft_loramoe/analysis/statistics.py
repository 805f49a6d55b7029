"""Mean router weights of an adapted model over a data set, by layer, expert and task type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_loramoe import LoRAMoELinear, routing


def router_statistics(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run the model over batches and average the router weights of each task type's tokens.

    The model runs in evaluation mode without gradients and is left in the mode it was in. Only sums are kept between
    batches, so the data may be of any size.

    Args:
        model: the adapted model, wrapped in whatever way.
        batches: keyword arguments of the model, for example a DataLoader: `input_ids`, int64, shape (batch, seq),
            `attention_mask` of that shape, `task_types` as the model takes them (without them, every sample counts as of
            unknown type). Tensors are moved to the model's device.

    Returns:
        One record for each adapter, layer, task type that occurs, and expert, in the order of the model's layers:
        `adapter` (str), `layer` (str, name inside the base model), `task_type` (int, -1 for unknown), `expert` (int),
        `group` (int, the expert's group) and `weight` (float in [0, 1]: the expert's mean router probability over the
        real tokens of that type; they sum to 1 over the experts of a layer).

    Raises:
        ValueError: the model has no LoRAMoE layers, or no active adapter routed anything (no batches, adapters disabled).
    """
    groups = _expert_groups(model)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model first.")
    device = next(model.parameters()).device
    weight_sums: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    token_counts: dict[tuple, int] = defaultdict(int)
    with torch.no_grad(), _evaluation_mode(model):
        for batch in batches:
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
            for layer in routing(model):
                for task_type in layer.task_types[layer.token_counts > 0].unique().tolist():
                    samples = layer.task_types == task_type
                    key = (layer.adapter, layer.layer, task_type)
                    weight_sums[key] = weight_sums[key] + layer.importance[samples].cpu().sum(0, dtype=torch.float64)
                    token_counts[key] += layer.token_counts[samples].sum().item()
    if not weight_sums:
        raise ValueError("No router ran: pass at least one batch, and leave a LoRAMoE adapter enabled and active.")
    order = {key: position for position, key in enumerate(groups)}
    return [
        {"adapter": adapter, "layer": layer, "task_type": task_type, "expert": expert, "group": group, "weight": weight}
        for adapter, layer, task_type in sorted(weight_sums, key=lambda key: (order[key[:2]], key[2]))
        for expert, (group, weight) in enumerate(
            zip(
                groups[adapter, layer],
                (weight_sums[adapter, layer, task_type] / token_counts[adapter, layer, task_type]).tolist(),
            )
        )
    ]


def group_weights(records: Iterable[Mapping[str, Any]], per_layer: bool = False) -> list[dict[str, Any]]:
    """Sum the experts' weights to the weight of their group, and average over layers.

    Args:
        records: what `router_statistics` returned, or a part of it with all experts of each layer.
        per_layer: keep the layers apart; each record then has a `layer` too.

    Returns:
        One record for each adapter, (layer,) task type and group: `adapter`, `task_type`, `group` and `weight` (float in
        [0, 1]; they sum to 1 over the groups).
    """
    in_layer: dict[tuple, float] = defaultdict(float)
    for record in records:
        in_layer[record["adapter"], record["layer"], record["task_type"], record["group"]] += record["weight"]
    fields = ("adapter", "layer", "task_type", "group")
    if per_layer:
        return [{**dict(zip(fields, key)), "weight": weight} for key, weight in in_layer.items()]
    over_layers: dict[tuple, list[float]] = defaultdict(list)
    for (adapter, _, task_type, group), weight in in_layer.items():
        over_layers[adapter, task_type, group].append(weight)
    return [
        {"adapter": adapter, "task_type": task_type, "group": group, "weight": sum(weights) / len(weights)}
        for (adapter, task_type, group), weights in over_layers.items()
    ]


def _expert_groups(model: nn.Module) -> dict[tuple[str, str], list[int]]:
    """The group of each expert, by adapter and layer name."""
    return {
        (adapter, module.name): [group for group, size in enumerate(experts.expert_groups) for _ in range(size)]
        for module in model.modules()
        if isinstance(module, LoRAMoELinear)
        for adapter, experts in module.loramoe_experts.items()
    }


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
