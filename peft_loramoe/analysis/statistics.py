"""Router statistics over a dataset: weight, importance and entropy by layer, expert and task type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..balance import LayerRouting, layer_routing
from ..balance.results import configs_of
from ..experts import LoRAExperts
from ..modes import evaluation_mode
from .adapted import (
    adapts_only_below_head,
    experts_by_layer,
    on_device_of,
    require_finite,
    takes,
    takes_logits_to_keep,
)
from .names import blocks_and_kinds
from .saved import SavedAsJSON


OF_LAYER = ("adapter", "layer", "block", "linear", "task_type")  # fields that all records begin with


@dataclass(frozen=True)
class RouterStatistics(SavedAsJSON):
    """Router statistics of a dataset, as records of plain values in the order of the model's layers.

    `task_type` is -1 for samples of unknown type; types without samples have no records. If a forward pass uses a
    layer several times, its tokens count each time.

    Attributes:
        experts: one record per adapter, layer, task type and expert: `adapter`, `layer` (name inside the base model),
            `block` (number of the transformer block, or None), `linear` (kind of linear, for example "up_proj"),
            `task_type`, `expert`, `group`, `null` (whether the expert is null), `weight` (mean router probability over
            real tokens) and `importance` (mean over samples of the sample's mean router probability, which weights
            short and long samples equally, as the balance term does with `balance_importance="mean"`). `weight` and
            `importance` sum to 1 over the experts.
        layers: one record per adapter, layer and task type: `adapter`, `layer`, `block`, `linear`, `task_type`,
            `samples`, `tokens` (real tokens), `entropy` (mean entropy of a token's router probabilities, in nats),
            `load_entropy` (entropy of the mean probabilities, in nats, between `entropy` and ln N) and `num_experts`
            (N, null experts included).
        task_type_names: names of the task types, which are also those of the expert groups, or None, by adapter.

    Example:
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> statistics.save("statistics.json")
        >>> RouterStatistics.load("statistics.json") == statistics
        True
    """

    experts: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    task_type_names: dict[str, list[str] | None]

    RECORDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "experts": (*OF_LAYER, "expert", "group", "null", "weight", "importance"),
        "layers": (*OF_LAYER, "samples", "tokens", "entropy", "load_entropy", "num_experts"),
    }

    def __repr__(self) -> str:
        """How much was measured, without the records."""
        linears = {(record["adapter"], record["layer"]) for record in self.layers}
        samples = {record["task_type"]: record["samples"] for record in self.layers}
        return (
            f"RouterStatistics({len(linears)} linears, samples by task type: {samples}, "
            f"task_type_names={self.task_type_names})"
        )


def router_statistics(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> RouterStatistics:
    """Run the model over batches and average the router outputs of its active adapters by task type.

    The model runs in eval mode without gradients and returns to its previous mode. Only sums are kept between batches,
    on the layers' devices, so the data may be of any size. If a batch has no `labels`, only the last token's logits
    are computed where the model allows it. In a distributed run, each process gets the statistics of its own batches.

    Args:
        model: the adapted model, possibly wrapped.
        batches: batches of keyword arguments of the model, for example a DataLoader: `input_ids`, int64, shape (batch,
            seq), `attention_mask`, same shape, and `task_types` as the model takes them; without them, every sample is
            of unknown type. Tensors are moved to the model's device.

    Raises:
        TypeError: a batch is not a mapping.
        ValueError: the model has no LoRAMoE layers, no router ran (no batches, or adapters disabled), or router
            probabilities are not finite.

    Example:
        >>> model = tiny_model(num_experts=4)
        >>> batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "task_types": [0, 1]}
        >>> statistics = router_statistics(model, [batch])
        >>> first = statistics.layers[0]
        >>> first["linear"], first["samples"], first["tokens"], first["num_experts"]
        ('gate_proj', 1, 3, 4)
    """
    experts = experts_by_layer(model)
    sums: dict[tuple[str, str], _Sums] = {}
    lean = _lean_options(model)
    with evaluation_mode(model):
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"batches yielded a {type(batch).__name__}; it must yield dictionaries of the model's arguments, "
                    "such as {'input_ids': ..., 'attention_mask': ..., 'task_types': ...}."
                )
            # The loss needs all logits.
            options = {
                name: value for name, value in lean.items() if name != "logits_to_keep" or "labels" not in batch
            }
            model(**options | on_device_of(model, batch))
            for layer in layer_routing(model):
                key = (layer.adapter, layer.layer)
                if key not in sums:
                    sums[key] = _Sums(layer)
                sums[key].add(layer)
    if not sums:
        raise ValueError("No router ran: pass at least one batch, and keep a LoRAMoE adapter enabled and active.")
    configs, active = configs_of(model), dict.fromkeys(adapter for adapter, _ in sums)
    names = {adapter: configs[adapter].task_type_names for adapter in active}
    places = {adapter: blocks_and_kinds(layer for name, layer in sums if name == adapter) for adapter in active}
    of_experts, of_layers = [], []
    for (adapter, layer), module in experts.items():
        if (adapter, layer) in sums:
            fields: dict[str, Any] = dict(zip(OF_LAYER, (adapter, layer, *places[adapter][layer])))
            experts_of_layer, layers_of_layer = sums[adapter, layer].records(fields, module)
            of_experts += experts_of_layer
            of_layers += layers_of_layer
    return RouterStatistics(experts=of_experts, layers=of_layers, task_type_names=names)


def _lean_options(model: nn.Module) -> dict[str, Any]:
    """Arguments that skip unneeded work: the cache, and the logits unless the head is adapted.

    Besides, with a cache, transformers lets the samples of a packed row attend to each other, unlike in training.
    """
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if takes_logits_to_keep(model) and adapts_only_below_head(model):
        options["logits_to_keep"] = 1
    return options


class _Sums:
    """Sums of one linear's router outputs by task type, on its device; row 0 is the unknown type.

    The device is not synchronized before `records`.
    """

    def __init__(self, layer: LayerRouting) -> None:
        device, num_experts = layer.importance.device, layer.importance.shape[1]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        rows = 1 + len(layer.groups)
        self.probabilities = torch.zeros(rows, num_experts, dtype=dtype, device=device)  # over tokens
        self.means = torch.zeros(rows, num_experts, dtype=dtype, device=device)  # sample means, over samples
        self.entropy = torch.zeros(rows, dtype=dtype, device=device)
        self.counts = torch.zeros(rows, 2, dtype=torch.int64, device=device)  # samples, tokens

    def add(self, layer: LayerRouting) -> None:
        rows, tokens = layer.task_types + 1, layer.token_counts
        probabilities = layer.importance.to(self.probabilities)
        self.probabilities.index_add_(0, rows, probabilities)
        self.means.index_add_(0, rows, probabilities / tokens.clamp(min=1)[:, None])
        self.entropy.index_add_(0, rows, layer.entropy.to(self.entropy))
        self.counts.index_add_(0, rows, torch.stack([tokens > 0, tokens], dim=1).long())

    def records(
        self, of_layer: dict[str, Any], experts: LoRAExperts
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The records of this linear in `RouterStatistics.experts` and `RouterStatistics.layers`."""
        groups = experts.groups.of_experts
        of_experts, of_layers = [], []
        probabilities, means, entropy = (
            sums.cpu().double() for sums in (self.probabilities, self.means, self.entropy)
        )
        for row, (samples, tokens) in enumerate(self.counts.tolist()):
            if not tokens:
                continue
            require_finite(probabilities[row], of_layer["adapter"], of_layer["layer"])
            fields = {**of_layer, "task_type": row - 1}
            weights, importance = probabilities[row] / tokens, means[row] / samples
            of_experts += [
                {
                    **fields,
                    "expert": n,
                    "group": group,
                    "null": group in experts.groups.null,
                    "weight": w,
                    "importance": i,
                }
                for n, (group, w, i) in enumerate(zip(groups, weights.tolist(), importance.tolist()))
            ]
            of_layers.append(
                {
                    **fields,
                    "samples": samples,
                    "tokens": tokens,
                    "entropy": entropy[row].item() / tokens,
                    "load_entropy": torch.special.entr(weights).sum().item(),
                    "num_experts": len(groups),
                }
            )
        return of_experts, of_layers


def group_weights(experts: Iterable[Mapping[str, Any]], per_layer: bool = False) -> list[dict[str, Any]]:
    """Sum the weights of the experts in each group and average over layers.

    Args:
        experts: `RouterStatistics.experts`, or a selection with all experts of each layer.
        per_layer: do not average; records then have a `layer`.

    Returns:
        One record per adapter, task type and group (and layer): `adapter`, `task_type`, `group` and `weight`, a float
        in [0, 1]. Weights sum to 1 over the groups.

    Example:
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> weights = group_weights(statistics.experts)
        >>> len(weights), round(sum(record["weight"] for record in weights), 6)
        (2, 1.0)
    """
    in_layer: dict[tuple[Any, ...], float] = defaultdict(float)
    for record in experts:
        in_layer[record["adapter"], record["layer"], record["task_type"], record["group"]] += record["weight"]
    fields = ("adapter", "layer", "task_type", "group")
    if per_layer:
        return [{**dict(zip(fields, key)), "weight": weight} for key, weight in in_layer.items()]
    over_layers: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (adapter, _, task_type, group), weight in in_layer.items():
        over_layers[adapter, task_type, group].append(weight)
    return [
        {"adapter": adapter, "task_type": task_type, "group": group, "weight": sum(weights) / len(weights)}
        for (adapter, task_type, group), weights in over_layers.items()
    ]


def expert_usage(statistics: RouterStatistics, dead: float = 0.1, dominating: float = 0.5) -> list[dict[str, Any]]:
    """Find experts that are dead or dominating for every task type.

    A uniform router gives each of the N experts of a layer the weight 1/N. A dead expert has lost nearly all of it for
    every task type; a dominating expert has gained a large part of the others' weight for every task type. Experts
    that specialize in a task type are neither.

    Args:
        statistics: statistics over all task types that the experts should serve.
        dead: an expert is dead if its weight is below ``dead / N`` for every task type; in [0, 1).
        dominating: an expert is dominating if its weight is above ``1/N + dominating * (1 - 1/N)`` for every task
            type; in (0, 1]. For 0.5 and N = 6, that is 0.58.

    Returns:
        One record per adapter, layer and expert, null experts included: `adapter`, `layer`, `expert`, `group`, `null`,
        `weight` and `least_weight` (largest and smallest mean router probability over the task types), `even` (1/N)
        and `status` ("dead", "dominating" or "used").

    Raises:
        ValueError: `dead` or `dominating` is out of range.

    Example:
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> {record["status"] for record in expert_usage(statistics)}
        {'used'}
    """
    if not 0 <= dead < 1:
        raise ValueError(f"dead={dead} must be in [0, 1); it is a share of the uniform weight 1/N.")
    if not 0 < dominating <= 1:
        raise ValueError(
            f"dominating={dominating} must be in (0, 1]; it is a share of the way from the uniform weight 1/N to 1."
        )
    num_experts = {(record["adapter"], record["layer"]): record["num_experts"] for record in statistics.layers}
    weights: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    fields = ("adapter", "layer", "expert", "group", "null")
    for record in statistics.experts:
        weights[tuple(record[field] for field in fields)].append(record["weight"])
    records = []
    for key, of_types in weights.items():
        even, largest, least = 1 / num_experts[key[:2]], max(of_types), min(of_types)
        status = (
            "dead" if largest < dead * even else "dominating" if least > even + dominating * (1 - even) else "used"
        )
        records.append(
            {**dict(zip(fields, key)), "weight": largest, "least_weight": least, "even": even, "status": status}
        )
    return records
