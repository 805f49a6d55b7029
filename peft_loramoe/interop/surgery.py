"""List, add, remove, reorder and merge the experts of a trained adapter.

Every operation changes all layers of the adapter and its configuration, or nothing. Operations work on a loaded model;
save it afterwards to change a saved adapter. Optimizers must be created anew, since the parameters are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..balance import layer_routing
from ..experts import LoRAExperts
from ..layer import LoRAMoELayer
from ..modes import evaluation_mode
from .calibration import Adapter, find_adapter, mean_gates, prepare
from .restructure import Expert, Surgery, merged, read_experts, restructure


STARTS = ("exact", "nearest")
NULL_NAME = "null"  # task type of a new null group


def list_experts(
    model: nn.Module, calibration: Iterable[Mapping[str, Any]] | None = None, adapter_name: str | None = None
) -> list[dict[str, Any]]:
    """List the experts of each layer and their load.

    Args:
        model: the adapted model.
        calibration: batches of keyword arguments of the model, for example a DataLoader; None does not measure the
            load.
        adapter_name: which adapter; None for the only or the active one.

    Returns:
        One record per layer and expert: `layer` (str), `expert` (int, the index that the other functions take),
        `group` (int), `task_type` (name of the group, or None), `null` (bool) and `load` (mean router probability over
        the real tokens, before `top_k`, or None; `RouterStatistics` calls it `weight`). Loads sum to 1 over a layer's
        experts.

    Raises:
        ValueError: there is no such adapter, or the load is to be measured and it is not the only active one.

    Example:
        >>> records = list_experts(tiny_model(num_experts=4), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> len(records), records[3]["layer"], records[3]["expert"], records[3]["group"]
        (24, 'model.layers.0.mlp.gate_proj', 3, 1)
    """
    adapter = find_adapter(model, adapter_name)
    sums: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in tqdm(prepare(model, adapter, calibration), desc="Measuring loads", leave=False, disable=None):
            model(**batch.inputs)
            for record in layer_routing(model):
                sums[record.layer] = sums.get(record.layer, 0) + record.importance.sum(0, dtype=torch.float64).cpu()
    names = adapter.config.task_type_names
    records = []
    for layer in adapter.layers:
        loads = (sums[layer.name] / sums[layer.name].sum()).tolist() if layer.name in sums else None
        for i, expert in enumerate(read_experts(layer.loramoe_experts[adapter.name])):
            records.append(
                {
                    "layer": layer.name,
                    "expert": i,
                    "group": expert.group,
                    "task_type": names[expert.group] if names else None,
                    "null": expert.A is None,
                    "load": None if loads is None else loads[i],
                }
            )
    return records


def add_experts(
    model: nn.Module,
    count: int | None = None,
    *,
    group: int | None = None,
    name: str | None = None,
    start: str = "exact",
    fill_with_null: bool = False,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
) -> Surgery:
    """Add LoRA experts with B = 0, while preserving the output of the mixture exactly or approximately.

    New router outputs take weight from the others, since their logits are finite. The output is preserved for every
    input if ``sum_i exp(l_i) f_i / sum_i exp(l_i)``, with logits l_i and expert outputs f_i linear in x, remains the
    same function of x. In general position, where the old numerator and denominator have no common factor, this
    requires that the new denominator is the old one times a sum of exponentials with integer coefficients. At x = 0,
    the denominator is the number of router outputs, which must therefore become a multiple of the old number. Hence
    there are two starts:

    - "exact": repeat every router row k times in total, divide the old gates by k implicitly, and multiply the B of
      the old experts and `top_k` by k. The output is the same up to rounding. The number of new experts must be a
      multiple of the number of router outputs; `fill_with_null` fills up a smaller `count` with null experts, which
      cost a router row each. If all router rows are equal (an untrained router of zeros) and there is no `top_k`,
      every `count` is exact.
    - "nearest": add exactly `count` experts. Their router rows are the mean of the old rows, which keeps their gates
      nearly constant around equal logits. The B of each old expert is rescaled by least squares on the calibration
      data. The remaining error is returned.

    Args:
        model: the adapted model.
        count: number of LoRA experts; None for as many as each layer has router outputs ("exact" only).
        group: index of the group that they join; None appends a new group.
        name: task type of the new group, if the configuration has `task_type_names`.
        start: "exact" or "nearest".
        fill_with_null: let "exact" add null experts to the last null group, or to a new one named "null".
        calibration: batches of keyword arguments of the model; required for "nearest", otherwise used to measure the
            error.
        adapter_name: which adapter; None for the only or the active one.

    Raises:
        ValueError: options do not fit each other or the adapter; the message says how many experts can be added
            exactly.

    Example:
        >>> model = tiny_model(num_experts=4)
        >>> surgery = add_experts(model, calibration=[{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> surgery.layers[0].expert_groups, surgery.relative_error < 1e-4
        ([2, 2, 4], True)
    """
    adapter = find_adapter(model, adapter_name)
    _check_start(start, count, fill_with_null, calibration is not None)
    _check_new_group(adapter, group, name)
    groups, null_groups = adapter.config.num_groups, adapter.config.groups_of().null
    target = groups if group is None else group
    null_target = max(null_groups, default=groups + 1)
    layers, factors = {}, set()
    for layer in adapter.layers:
        old = read_experts(experts := layer.loramoe_experts[adapter.name])
        rows = torch.stack([expert.router for expert in old])
        wanted, fill = count or len(old), 0
        if start == "nearest":
            new_rows = rows.mean(0).expand(wanted, -1)
        else:
            any_count = experts.options.top_k is None and bool((rows == rows[0]).all())
            fill = 0 if any_count else -wanted % len(old)
            if fill and not fill_with_null:
                raise ValueError(
                    f"count={count} experts cannot be added to the {len(old)} of layer '{layer.name}' without "
                    f"changing its output: the total must be a multiple of {len(old)}. Add {wanted + fill}; or set "
                    f"fill_with_null=True, which adds {fill} null experts; or set start='nearest', which is "
                    "approximate."
                )
            new_rows = rows.repeat(-(-(wanted + fill) // len(old)), 1)
            factors.add(factor := (len(old) + wanted + fill) / len(old))
            old = [expert.scaled(factor) for expert in old]
        fresh = _fresh_A(experts, wanted)
        new = [
            Expert(target, row, A, experts.B.new_zeros(experts.B.shape[0], experts.r))
            for row, A in zip(new_rows, fresh)
        ]
        nulls = [Expert(null_target, row) for row in new_rows[wanted : wanted + fill]]
        layers[layer] = sorted(old + new + nulls, key=lambda expert: expert.group)
    top_k = adapter.config.top_k
    if top_k is not None and start == "exact":
        if len(factors) > 1:
            raise ValueError(
                f"count={count} with top_k={top_k}: the layers differ in their number of experts, so each would need "
                "another top_k. Set count=None."
            )
        top_k *= int(factors.pop())
    batches = prepare(model, adapter, calibration)
    new_names = {groups: name, groups + 1: NULL_NAME}
    return restructure(model, adapter, layers, batches, top_k=top_k, new_names=new_names, fit=start == "nearest")


def remove_experts(
    model: nn.Module,
    experts: Sequence[int],
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
) -> Surgery:
    """Remove experts from every layer; the softmax renormalizes the gates of the others.

    A group without experts disappears, and the indices of later groups and task types decrease. A `top_k` larger than
    the number of remaining experts is lowered with a warning.

    Args:
        model: the adapted model.
        experts: indices from `list_experts`, null experts included.
        calibration: batches of keyword arguments of the model to measure the change of the output.
        adapter_name: which adapter; None for the only or the active one.

    Raises:
        ValueError: a layer has no such expert, fewer than two experts or no LoRA expert would remain, or a group would
            disappear from some layers only.

    Example:
        >>> surgery = remove_experts(tiny_model(num_experts=4), [0])
        >>> surgery.layers[0].expert_groups
        [1, 2]
    """
    adapter = find_adapter(model, adapter_name)
    if not experts:
        raise ValueError("experts is empty; pass the index of at least one expert to remove.")
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        _check_known(experts, old, layer)
        layers[layer] = [expert for i, expert in enumerate(old) if i not in experts]
        if all(expert.A is None for expert in layers[layer]):
            raise ValueError(
                f"experts={list(experts)} are all LoRA experts of layer '{layer.name}'; keep at least one."
            )
    return restructure(model, adapter, layers, prepare(model, adapter, calibration))


def reorder_experts(model: nn.Module, order: Sequence[int], *, adapter_name: str | None = None) -> Surgery:
    """Reorder the experts of every layer; outputs do not change.

    Args:
        model: the adapted model.
        order: the old index of each new expert. Groups must stay together but may be reordered; their names move with
            them, and the task type indices of the data change accordingly.
        adapter_name: which adapter; None for the only or the active one.

    Raises:
        ValueError: `order` is not a permutation of each layer's experts, or splits a group.

    Example:
        >>> surgery = reorder_experts(tiny_model(num_experts=4, expert_groups=[1, 3]), [1, 2, 3, 0])
        >>> surgery.layers[0].expert_groups
        [3, 1]
    """
    adapter = find_adapter(model, adapter_name)
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        if sorted(order) != list(range(len(old))):
            raise ValueError(
                f"order={list(order)} must contain each expert of '{layer.name}', 0 to {len(old) - 1}, once."
            )
        layers[layer] = [old[i] for i in order]
    return restructure(model, adapter, layers, [])


def merge_experts(
    model: nn.Module,
    first: int,
    second: int,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
) -> Surgery:
    """Merge two experts of a group into one that takes the place of the first.

    The merged matrix is the best rank-r approximation of the weighted mean of both, and the merged router row is the
    weighted mean of their rows. The weights are their mean gates on the calibration data, after `top_k`, or equal
    without data. Since no single row reproduces the sum of both gates, the B of every expert is rescaled: by least
    squares on the calibration data, or without data by the factors that are right for equal gates (not at all with
    `top_k`). The merge is exact only if all gates are equal and the mean has rank r.

    Args:
        model: the adapted model.
        first: index from `list_experts`.
        second: index of the other expert.
        calibration: batches of keyword arguments of the model, also used to measure the change of the output.
        adapter_name: which adapter; None for the only or the active one.

    Raises:
        ValueError: a layer has no such expert, the experts are the same, null, or in different groups, or fewer than
            two experts would remain.

    Example:
        >>> surgery = merge_experts(tiny_model(num_experts=4), 2, 3)
        >>> surgery.layers[0].expert_groups
        [2, 1]
    """
    adapter = find_adapter(model, adapter_name)
    batches = prepare(model, adapter, calibration)
    if first == second:
        raise ValueError(f"first={first} and second={second} are the same expert; choose two.")
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        _check_known([first, second], old, layer)
        for i in (first, second):
            if old[i].A is None:
                raise ValueError(
                    f"Expert {i} of layer '{layer.name}' is null and cannot be merged; remove it instead."
                )
        if old[first].group != old[second].group:
            raise ValueError(
                f"Experts {first} and {second} of layer '{layer.name}' belong to different groups, {old[first].group} "
                f"and {old[second].group}; only experts of the same group can be merged."
            )
    gates = mean_gates(model, adapter, batches, description="Measuring gates") if batches else {}
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        pair = gates[layer.name][[first, second]] if batches else torch.ones(2)
        share = float(pair[0] / pair.sum()) if pair.sum() else 0.5
        uniform = not batches and adapter.config.top_k is None
        others = (len(old) - 1) / len(old) if uniform else 1.0
        expert_of_both = merged(old[first], old[second], share).scaled(2 * others if uniform else 1.0)
        layers[layer] = [
            expert_of_both if i == first else expert.scaled(others) for i, expert in enumerate(old) if i != second
        ]
    return restructure(model, adapter, layers, batches, fit=bool(batches))


def _check_start(start: str, count: int | None, fill_with_null: bool, calibrated: bool) -> None:
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not one of {', '.join(map(repr, STARTS))}.")
    if start == "nearest" and count is None:
        raise ValueError("start='nearest' needs count, the number of experts to add.")
    if start == "nearest" and not calibrated:
        raise ValueError("start='nearest' needs calibration data to rescale the old experts and measure the error.")
    if start == "nearest" and fill_with_null:
        raise ValueError(
            "fill_with_null=True has no effect with start='nearest', which adds exactly count experts: leave it out, "
            "or set start='exact'."
        )
    if count is None and fill_with_null:
        raise ValueError(
            "fill_with_null=True has no effect without count: as many experts as there are router outputs need no "
            "null experts. Set count, or leave it out."
        )
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"count={count!r} must be a positive integer.")


def _check_new_group(adapter: Adapter, group: int | None, name: str | None) -> None:
    config = adapter.config
    lora_groups = [g for g in range(config.num_groups) if g not in config.groups_of().null]
    if group is not None and group not in lora_groups:
        raise ValueError(
            f"group={group} is not a group of LoRA experts of adapter '{adapter.name}'; choose one of {lora_groups}."
        )
    if (name is not None) != (group is None and config.task_type_names is not None):
        raise ValueError(
            f"name={name!r} with group={group} and task_type_names={config.task_type_names}: a new group needs a name "
            "if and only if the groups have names."
        )


def _check_known(indices: Sequence[int], experts: list[Expert], layer: LoRAMoELayer) -> None:
    for index in indices:
        if index not in range(len(experts)):
            raise ValueError(
                f"Expert {index!r} is unknown; layer '{layer.name}' has the experts 0 to {len(experts) - 1}."
            )


def _fresh_A(experts: LoRAExperts, count: int) -> tuple[Tensor, ...]:
    """A of new experts, initialized as in PEFT's LoRA."""
    A = torch.empty(count * experts.r, experts.A.shape[1], dtype=torch.float32, device=experts.A.device)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return A.to(experts.A.dtype).split(experts.r)
