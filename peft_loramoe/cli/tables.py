"""Tables that commands print."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..analysis import RouterStatistics, RouterTrace, group_weights
from ..analysis.names import group_name, type_name
from ..config import LoRAMoEConfig
from ..interop import Surgery
from ..interop.inspect import AdapterSummary, LayerSummary
from ..training.retention import Retention


# Options that are printed elsewhere, or that record how the file was made.
ELSEWHERE = (
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "peft_loramoe_version"),
    *("auto_mapping", "revision"),
)


def show_summary(summary: AdapterSummary) -> None:
    """Print the summary of an adapter."""
    console, config = _console(), summary.config
    layers, count = summary.layers, len(summary.experts)
    null = sum(expert.null for expert in summary.experts)
    console.print(
        f"LoRAMoE adapter {summary.source}, for {config['base_model_name_or_path'] or 'an unnamed base model'} "
        f"({config['task_type'] or 'no task type'})",
        f"{count} experts{f', {null} of them null,' if null else ''} in each of {len(layers)} linears; "
        f"{summary.parameters:,} parameters, {', '.join(summary.dtypes)}, {summary.bytes / 2**20:,.2f} MiB",
        "options that are not the default: " + (_changed_options(config) or "none"),
        sep="\n",
    )
    if summary.other_tensors:
        console.print(f"{len(summary.other_tensors)} further tensors: {', '.join(summary.other_tensors[:5])} ...")
    if summary.norms is None:
        console.print("The layers differ in their groups, so experts are not comparable across layers.")
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
    """Print the records of `list_experts`, one line per linear."""
    layers: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        layers[record["layer"]].append(record)
    console = _console()
    for same_groups in _by_groups(layers.values()):
        first = same_groups[0]
        headers = [
            f"{record['expert']}\ngroup {record['group']}{' (null)' if record['null'] else ''}" for record in first
        ]
        table = _table("Experts and their load", "linear", *headers)
        for experts in same_groups:
            table.add_row(experts[0]["layer"], *(_number(record["load"], ".3f") for record in experts))
        console.print(table)
    if names := {record["group"]: record["task_type"] for record in first if record["task_type"] is not None}:
        console.print("Task types: " + ", ".join(f"{name} (group {group})" for group, name in names.items()))
    if first[0]["load"] is None:
        console.print("The load was not measured; pass --calibration to measure it.")


def show_change(change: Surgery, measurable: bool) -> None:
    """Print the effect of an operation; `measurable` says whether the command takes calibration data."""
    console, measured = _console(), change.relative_error is not None
    table = _table("Experts now", "linear", "groups", *(["relative change of the output"] if measured else []))
    for layer in change.layers:
        groups = "+".join(map(str, layer.expert_groups))
        table.add_row(layer.layer, groups, *([_number(layer.relative_error, ".3g")] if measured else []))
    console.print(table)
    if measured:
        console.print(f"Relative change of the mixtures' outputs: {change.relative_error:.3g}.")
    elif measurable:
        console.print("The change of the outputs was not measured; pass --calibration to measure it.")


def show_evaluation(report: Mapping[str, Any]) -> None:
    """Print the results of `evaluate`: a table per question set, and one for lm-eval tasks."""
    console = _console()
    columns = ("exact match", "F1", "loss", "lost", "gained", "difference", "95 % interval", "p (McNemar)")
    for asked in report["closed_book"]:
        title = f"{asked['questions']}: {asked['count']} questions, {len(asked['shots'])} examples in the prompt"
        table = _table(title, "model", *columns)
        for model in asked["models"]:
            scores = (f"{model['exact_match']:.1%}", f"{model['f1']:.1%}", f"{model['loss']:.3f}")
            if (comparison := model["comparison"]) is None:
                table.add_row(report["options"]["model"], *scores, *["-"] * 5)
            else:
                low, high = comparison["interval"]
                table.add_row(
                    model["adapter"],
                    *scores,
                    f"{comparison['lost']} of {comparison['known']}",
                    str(comparison["gained"]),
                    f"{100 * comparison['difference']:+.1f}",
                    f"{100 * low:+.1f} to {100 * high:+.1f}",
                    _number(comparison["p_value"], ".2g"),
                )
        console.print(table)
    if report["lm_eval"]:
        table = _table("lm-eval", "model", "task", "metric", "value", "standard error")
        for measured in report["lm_eval"]:
            for task, metrics in measured["results"].items():
                for name, value in metrics.items():
                    metric, _, kind = name.partition(",")
                    if (value is None or isinstance(value, float)) and not metric.endswith("_stderr"):
                        error = metrics.get(f"{metric}_stderr,{kind}")
                        shown = _number(error) if isinstance(error, float) else "-"
                        table.add_row(
                            measured["adapter"] or report["options"]["model"], task, metric, _number(value), shown
                        )
        console.print(table)


def show_statistics(
    statistics: RouterStatistics, usage: Iterable[Mapping[str, Any]], similarity: Iterable[Mapping[str, Any]]
) -> None:
    """Print the router statistics, expert usage and expert similarity of an adapter."""
    console = _console()
    ((_, names),) = statistics.task_type_names.items()
    layers: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in statistics.layers:
        layers[record["task_type"]].append(record)
    weights: dict[int, list[float]] = defaultdict(list)
    for record in group_weights(statistics.experts):
        weights[record["task_type"]].append(record["weight"])
    null = {record["group"] for record in statistics.experts if record["null"]}
    groups = [group_name(group, names, null) for group in range(len(next(iter(weights.values()))))]
    console.print(_weights_table(layers, weights, groups, names))
    even = " or ".join(sorted({_number(math.log(record["num_experts"]), ".3f") for record in statistics.layers}))
    console.print(f"Entropy of a uniform router: {even} nats.")
    usage = list(usage)
    for status in ("dead", "dominating"):
        found = [f"{record['layer']} {record['expert']}" for record in usage if record["status"] == status]
        console.print(f"{status.capitalize()} experts: {len(found)} of {len(usage)}{_first_names(found)}")
    console.print(_similarity_table(list(similarity)))


def show_trace(trace: RouterTrace) -> None:
    """Print the weight of each expert group for each token, averaged over all linears."""
    weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for record in trace.records():
        weights[record["position"]][record["group"]] += record["weight"] / len(trace.layers)
    groups = sorted(weights[0])
    headers = [group_name(group, trace.task_type_names, trace.null_groups) for group in groups]
    table = _table(f"Router weights, mean over {len(trace.layers)} linears", "token", *headers)
    for position, token in enumerate(trace.tokens):
        table.add_row(repr(token), *(_number(weights[position][group], ".3f") for group in groups))
    _console().print(table)


def _weights_table(
    layers: Mapping[int, list[Mapping[str, Any]]],
    weights: Mapping[int, list[float]],
    groups: list[str],
    names: list[str] | None,
) -> Table:
    title = f"Router weights and entropy (nats), mean over {len(next(iter(layers.values())))} linears"
    table = _table(title, "texts", "tokens", *groups, "entropy", "entropy of the\nmean weights")
    for task_type, records in sorted(layers.items()):
        means = (sum(record[field] for record in records) / len(records) for field in ("entropy", "load_entropy"))
        numbers = [_number(value, ".3f") for value in (*weights[task_type], *means)]
        table.add_row(f"{records[0]['samples']} {type_name(task_type, names)}", f"{records[0]['tokens']:,}", *numbers)
    return table


def show_retention(compared: Mapping[str, Retention], null: bool) -> None:
    """Print what a training run learned and kept."""
    title = "Learned and kept: loss in nats per token without and with the adapter, router weight"
    table = _table(title, "measured on", "samples", "without", "with", "null group" if null else "group 0")
    for name, result in compared.items():
        numbers = (_number(value, ".3f") for value in (result.loss_before, result.loss_after))
        table.add_row(name, str(result.samples), *numbers, _number(result.kept_weight, ".2f"))
    _console().print(table)


def _similarity_table(pairs: list[Mapping[str, Any]]) -> Table:
    title = "Similarity of the experts of a linear, by pairs"
    table = _table(title, "experts of", "pairs", "cosine", "largest cosine", "output overlap", "input overlap")
    for name, same in (("one group", True), ("two groups", False)):
        known = [
            pair for pair in pairs if (pair["group"] == pair["other_group"]) == same and pair["cosine"] is not None
        ]
        if known:
            means = {
                field: sum(pair[field] for pair in known) / len(known)
                for field in ("cosine", "output_overlap", "input_overlap")
            }
            closest = max(known, key=lambda pair: pair["cosine"])
            largest = f"{closest['cosine']:.3f} ({closest['layer']}: {closest['expert']}, {closest['other']})"
            cosine, *overlaps = (_number(mean, ".3f") for mean in means.values())
            table.add_row(name, str(len(known)), cosine, largest, *overlaps)
    return table


def _first_names(names: list[str]) -> str:
    """The first few names, for the end of a line."""
    return f": {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def _by_groups(layers: Iterable[list[Mapping[str, Any]]]) -> Iterable[list[list[Mapping[str, Any]]]]:
    """Collect the layers with the same groups."""
    by_groups: dict[tuple, list[list[Mapping[str, Any]]]] = defaultdict(list)
    for experts in layers:
        by_groups[tuple(record["group"] for record in experts)].append(experts)
    return by_groups.values()


def _changed_options(config: Mapping[str, Any]) -> str:
    defaults = {field.name: getattr(LoRAMoEConfig(), field.name) for field in dataclasses.fields(LoRAMoEConfig)}
    changed = {k: v for k, v in config.items() if k not in ELSEWHERE and k in defaults and v != defaults[k]}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _largest(layer: LayerSummary) -> float | None:
    """The largest similarity of two experts."""
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
