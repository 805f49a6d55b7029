"""Experts of a trained adapter are added, removed, reordered, merged and listed.

Every operation changes all layers of the adapter and its configuration together, or nothing. It works on a loaded model; a
saved adapter is loaded, changed and saved. Optimizers made before hold parameters that are no longer used: make new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import layer_routing
from ..experts import LoRAExperts
from ..layer import LoRAMoELinear
from ..modes import evaluation_mode
from .calibration import Adapter, find_adapter, mean_gates, prepare
from .restructure import Expert, Surgery, merged, read_experts, restructure


STARTS = ("exact", "nearest")
NULL_NAME = "null"  # task type of the null experts that fill up, where the groups have names


def list_experts(
    model: nn.Module, calibration: Iterable[Mapping[str, Any]] | None = None, adapter_name: str | None = None
) -> list[dict[str, Any]]:
    """List the experts of each layer, with their load.

    Args:
        model: the adapted model.
        calibration: batches of keyword arguments of the model, for example a DataLoader; None for no load.
        adapter_name: None for the only or the active one.

    Returns:
        One record for each layer and expert: `layer` (str), `expert` (int, as the other functions here take it), `group` (int),
        `task_type` (str or None, the group's name), `null` (bool) and `load` (float or None: its mean router probability over
        the real tokens; they sum to 1 over a layer's experts).

    Raises:
        ValueError: there is no such adapter, or it is not the only active one, with calibration data.
    """
    adapter = find_adapter(model, adapter_name)
    sums: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in prepare(model, adapter, calibration):
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
    """Add LoRA experts that contribute nothing yet (B is zero) and leave the mixture's output as it is, or nearly.

    A new router output takes gate from all others, for its logit is finite. That the output stays the same for every input
    means that ``sum_i exp(l_i) f_i / sum_i exp(l_i)`` is the same function of x as before, with logits l_i and expert outputs
    f_i linear in x. Two such fractions are equal only if the new denominator is the old one times a sum of exponentials with
    whole coefficients (in general position, where the old numerator and denominator have no common factor). At x = 0 the
    denominator counts the router outputs: so their number must become a multiple of what it was. Hence two starts:

    - "exact": as many outputs are added as there were, or a multiple of that; each new row repeats an old one. With k rows in
      place of one, the old gates are divided by k, and the B of the old experts are multiplied by k (`top_k` too): the output
      is the same to rounding. A smaller `count` is filled up with null experts (`fill_with_null`), which cost a router row
      each. If all router rows are equal (an untrained router of zeros) and there is no `top_k`, any `count` is exact.
    - "nearest": exactly `count` experts. Their rows are the mean of the old ones, whose logit follows the logarithm of the old
      denominator to first order around equal logits, so that the new gates vary little; the B of the old experts are rescaled,
      each by a factor, by least squares on the calibration data. The error that is left is returned.

    Args:
        model: the adapted model.
        count: number of LoRA experts; None for as many as each layer has router outputs ("exact" only).
        group: index of the group that they join; None for a new group, the last one.
        name: the new group's task type, where the config has `task_type_names`.
        start: "exact" or "nearest".
        fill_with_null: allow "exact" to add null experts: to the last null group, or to a new one (its name, where there are
            names, is "null").
        calibration: batches of keyword arguments of the model; needed for "nearest", otherwise it measures the error.
        adapter_name: None for the only or the active one.

    Raises:
        ValueError: options that do not fit each other or the adapter; the message says how many experts can be added exactly.
    """
    adapter = find_adapter(model, adapter_name)
    _check_addition(adapter, count, group, name, start, calibration is not None)
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
                    f"count={count} experts cannot be added to the {len(old)} of layer '{layer.name}' without a change of its "
                    f"output: their number must become a multiple of {len(old)}. Add {wanted + fill}; or set "
                    f"fill_with_null=True, which adds {fill} null experts; or start='nearest', which is not exact."
                )
            new_rows = rows.repeat(-(-(wanted + fill) // len(old)), 1)
            factors.add(factor := (len(old) + wanted + fill) / len(old))
            old = [expert.scaled(factor) for expert in old]
        fresh = _fresh_A(experts, wanted)
        new = [Expert(target, row, A, experts.B.new_zeros(experts.B.shape[0], experts.r)) for row, A in zip(new_rows, fresh)]
        nulls = [Expert(null_target, row) for row in new_rows[wanted : wanted + fill]]
        layers[layer] = sorted(old + new + nulls, key=lambda expert: expert.group)
    top_k = adapter.config.top_k
    if top_k is not None and start == "exact":
        if len(factors) > 1:
            raise ValueError(
                f"count={count} with top_k={top_k}: the layers differ in their number of experts, so the same count would need "
                "another top_k in each. Set count=None."
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
    """Remove experts from every layer; the softmax over the others' logits renormalises their gates.

    A group that loses all its experts disappears, and the later groups (and task types) move down. A `top_k` that is more than
    what is left is lowered, with a warning.

    Args:
        model: the adapted model.
        experts: indices as `list_experts` gives them, null experts included.
        calibration: batches of keyword arguments of the model, on which the change of the output is measured.
        adapter_name: None for the only or the active one.

    Raises:
        ValueError: there is no such expert in some layer; no LoRA expert or fewer than two experts would be left; a group would
            disappear from some layers only.
    """
    adapter = find_adapter(model, adapter_name)
    if not experts:
        raise ValueError("experts is empty: name at least one expert to remove.")
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        _check_known(experts, old, layer)
        layers[layer] = [expert for i, expert in enumerate(old) if i not in experts]
        if all(expert.A is None for expert in layers[layer]):
            raise ValueError(f"experts={list(experts)} are all the LoRA experts of layer '{layer.name}'; leave at least one.")
    return restructure(model, adapter, layers, prepare(model, adapter, calibration))


def reorder_experts(model: nn.Module, order: Sequence[int], *, adapter_name: str | None = None) -> Surgery:
    """Number the experts of every layer anew; outputs do not change.

    Args:
        model: the adapted model.
        order: the old index of each new expert. Groups stay together, but may change places: their names and null groups move
            with them, and the task types of the data change accordingly.
        adapter_name: None for the only or the active one.

    Raises:
        ValueError: `order` does not name every expert of each layer once, or tears a group apart.
    """
    adapter = find_adapter(model, adapter_name)
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        if sorted(order) != list(range(len(old))):
            raise ValueError(f"order={list(order)} must name each of the experts 0 to {len(old) - 1} of '{layer.name}' once.")
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
    """Merge two experts of a group into one, in the place of the first.

    Its weight is the closest one of rank r to the weighted mean of theirs, its router row the weighted mean of their rows;
    weighted by their loads on the calibration data, or equally without. No row has the gate of both (that would be the
    logarithm of a sum), so the B are rescaled: each by a factor, by least squares on the calibration data; without, by what is
    right for equal gates (with `top_k`: not at all). Exact only where all gates are equal and the mean has rank r.

    Args:
        model: the adapted model.
        first: index as `list_experts` gives it.
        second: the other one.
        calibration: batches of keyword arguments of the model, on which the change of the output is measured too.
        adapter_name: None for the only or the active one.

    Raises:
        ValueError: there is no such expert in some layer, they are the same, null, or of different groups; fewer than two
            experts would be left.
    """
    adapter = find_adapter(model, adapter_name)
    batches = prepare(model, adapter, calibration)
    if first == second:
        raise ValueError(f"first={first} and second={second} are the same expert; name two.")
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        _check_known([first, second], old, layer)
        for i in (first, second):
            if old[i].A is None:
                raise ValueError(f"Expert {i} of layer '{layer.name}' is null: it has nothing to merge. Remove it instead.")
        if old[first].group != old[second].group:
            raise ValueError(
                f"Experts {first} and {second} of layer '{layer.name}' are of different groups, {old[first].group} and "
                f"{old[second].group}; only experts of one group can be merged."
            )
    loads = mean_gates(model, adapter, batches) if batches else {}
    layers = {}
    for layer in adapter.layers:
        old = read_experts(layer.loramoe_experts[adapter.name])
        pair = loads[layer.name][[first, second]] if batches else torch.ones(2)
        share = float(pair[0] / pair.sum()) if pair.sum() else 0.5
        uniform = not batches and adapter.config.top_k is None
        others = (len(old) - 1) / len(old) if uniform else 1.0
        one = merged(old[first], old[second], share).scaled(2 * others if uniform else 1.0)
        layers[layer] = [one if i == first else expert.scaled(others) for i, expert in enumerate(old) if i != second]
    return restructure(model, adapter, layers, batches, fit=bool(batches))


def _check_addition(
    adapter: Adapter, count: int | None, group: int | None, name: str | None, start: str, calibrated: bool
) -> None:
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not one of {', '.join(map(repr, STARTS))}.")
    if start == "nearest" and count is None:
        raise ValueError("start='nearest' needs count, the number of experts to add.")
    if start == "nearest" and not calibrated:
        raise ValueError("start='nearest' needs calibration data, to rescale the old experts and to measure the error.")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"count={count!r} must be a positive integer.")
    config = adapter.config
    lora_groups = [g for g in range(config.num_groups) if g not in config.groups_of().null]
    if group is not None and group not in lora_groups:
        raise ValueError(f"group={group} is no group of LoRA experts of adapter '{adapter.name}'; those are {lora_groups}.")
    if (name is not None) != (group is None and config.task_type_names is not None):
        raise ValueError(
            f"name={name!r} with group={group} and task_type_names={config.task_type_names}: a new group needs a name where "
            "the groups have names, and only there."
        )


def _check_known(indices: Sequence[int], experts: list[Expert], layer: LoRAMoELinear) -> None:
    for index in indices:
        if index not in range(len(experts)):
            raise ValueError(f"Expert {index!r} is unknown: layer '{layer.name}' has the experts 0 to {len(experts) - 1}.")


def _fresh_A(experts: LoRAExperts, count: int) -> tuple[Tensor, ...]:
    """The A of new experts, initialised as PEFT's LoRA does."""
    A = torch.empty(count * experts.r, experts.A.shape[1], dtype=torch.float32, device=experts.A.device)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return A.to(experts.A.dtype).split(experts.r)
