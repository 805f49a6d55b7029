"""What commands print for people."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_loramoe import LoRAMoEConfig

from ..interop import Surgery
from ..interop.inspect import AdapterSummary, LayerSummary


# Options that have a line of their own, or that say how the file came about.
ELSEWHERE = (
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "peft_loramoe_version"),
    *("auto_mapping", "revision"),
)


def show_summary(summary: AdapterSummary) -> None:
    """Print what `inspect_adapter` found."""
    console, config = _console(), summary.config
    layers, count = summary.layers, len(summary.experts)
    null = sum(expert.null for expert in summary.experts)
    console.print(
        f"LoRAMoE adapter {summary.source}, for {config['base_model_name_or_path'] or 'a base model that it does not name'} "
        f"({config['task_type'] or 'no task type'})",
        f"{count} experts{f', {null} of them null,' if null else ''} in each of {len(layers)} linears; "
        f"{summary.parameters:,} parameters, {', '.join(summary.dtypes)}, {summary.bytes / 2**20:,.2f} MiB",
        "options that are not the default: " + (_changed_options(config) or "none"),
        sep="\n",
    )
    if summary.other_tensors:
        console.print(f"{len(summary.other_tensors)} further tensors: {', '.join(summary.other_tensors[:5])} ...")
    if summary.norms is None:
        console.print("The layers differ in their groups, so no expert is the same in all of them.")
    else:
        title = "Experts: norm of scaling * B A over all linears, and similarity (cosine)"
        table = _table(title, "expert", "group", "norm", *map(str, range(count)))
        for i, expert in enumerate(summary.experts):
            group = f"{expert.group} {expert.task_type}" if expert.task_type else str(expert.group)
            norm = "null" if expert.null else _number(summary.norms[i])
            table.add_row(str(i), group, norm, *(_number(value, ".2f") for value in summary.similarity[i]))
        console.print(table)
    table = _table("Linears", "linear", "groups", "r", "scaling", "norms of the experts", "largest similarity")
    for layer in layers:
        norms = " ".join(_number(norm, ".3g") for norm in layer.norms)
        groups = "+".join(map(str, layer.expert_groups))
        table.add_row(layer.layer, groups, str(layer.r), f"{layer.scaling:g}", norms, _number(_largest(layer), ".2f"))
    console.print(table)


def show_experts(records: Iterable[Mapping[str, Any]]) -> None:
    """Print what `list_experts` returned, one line for each linear."""
    layers: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        layers[record["layer"]].append(record)
    console = _console()
    for alike in _same_experts(layers.values()):
        first = alike[0]
        headers = [f"{record['expert']}\ngroup {record['group']}{' null' if record['null'] else ''}" for record in first]
        table = _table("Experts and their load", "linear", *headers)
        for experts in alike:
            table.add_row(experts[0]["layer"], *(_number(record["load"], ".3f") for record in experts))
        console.print(table)
    if names := {record["group"]: record["task_type"] for record in first if record["task_type"] is not None}:
        console.print("Task types: " + ", ".join(f"{name} (group {group})" for group, name in names.items()))
    if first[0]["load"] is None:
        console.print("The load was not measured, for there is no --calibration.")


def show_change(change: Surgery, measurable: bool) -> None:
    """Print what an operation did to an adapter; `measurable`: whether calibration data would have measured it."""
    console, measured = _console(), change.relative_error is not None
    table = _table("Experts now", "linear", "groups", *(["relative change of the output"] if measured else []))
    for layer in change.layers:
        groups = "+".join(map(str, layer.expert_groups))
        table.add_row(layer.layer, groups, *([_number(layer.relative_error, ".3g")] if measured else []))
    console.print(table)
    if measured:
        console.print(f"Relative change of the mixtures' outputs: {change.relative_error:.3g}.")
    elif measurable:
        console.print("The change of the outputs was not measured, for there is no --calibration.")


def _same_experts(layers: Iterable[list[Mapping[str, Any]]]) -> Iterable[list[list[Mapping[str, Any]]]]:
    """Layers that have the same groups, together."""
    alike: dict[tuple, list[list[Mapping[str, Any]]]] = defaultdict(list)
    for experts in layers:
        alike[tuple(record["group"] for record in experts)].append(experts)
    return alike.values()


def _changed_options(config: Mapping[str, Any]) -> str:
    defaults = {field.name: getattr(LoRAMoEConfig(), field.name) for field in dataclasses.fields(LoRAMoEConfig)}
    changed = {k: v for k, v in config.items() if k not in ELSEWHERE and k in defaults and v != defaults[k]}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _largest(layer: LayerSummary) -> float | None:
    """The similarity of the two experts that are most alike."""
    pairs = [value for i, row in enumerate(layer.similarity) for value in row[:i] if value is not None]
    return max(pairs, default=None)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)
