"""Tables that commands print."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..analysis import RouterStatistics, RouterTrace, group_weights
from ..analysis.names import by_kind, group_name, type_name, without_prefix
from ..config import LoRAMoEConfig
from ..console import console, print_table
from ..interop import Surgery
from ..interop.inspect import AdapterSummary, LayerSummary
from ..interop.restructure import LayerChange
from ..training.retention import Retention


# Options that are printed elsewhere, or that record how the file was made.
ELSEWHERE = (
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "peft_loramoe_version"),
    *("auto_mapping", "revision"),
)


def show_summary(summary: AdapterSummary, each_layer: bool) -> None:
    """Print the summary of an adapter, with the linears by kind or each of them."""
    config, layers, count = summary.config, summary.layers, len(summary.experts)
    null = sum(expert.null for expert in summary.experts)
    console().print(
        f"LoRAMoE adapter {summary.source}, for {config['base_model_name_or_path'] or 'an unnamed base model'} "
        f"({config['task_type'] or 'no task type'})",
        f"{count} experts{f', {null} of them null,' if null else ''} in each of {len(layers)} linears; "
        f"{summary.parameters:,} parameters, {', '.join(summary.dtypes)}, {summary.bytes / 2**20:,.2f} MiB",
        "options that are not the default: " + (_changed_options(config) or "none"),
        sep="\n",
    )
    if others := summary.other_tensors:
        more = ", ..." if len(others) > 5 else ""
        console().print(f"{len(others)} further tensors: {', '.join(others[:5])}{more}")
    if summary.norms is None:
        print("The layers differ in their groups, so experts are not comparable across layers.")
    else:
        rows = []
        for i, expert in enumerate(summary.experts):
            group = f"{expert.group} {expert.task_type}" if expert.task_type else str(expert.group)
            norm = "null" if expert.null else _number(summary.norms[i])
            others = [(value, j) for j, value in enumerate(summary.similarity[i]) if j != i and value is not None]
            closest = "{1} ({0:.2f})".format(*max(others)) if others else "-"
            rows.append((str(i), group, norm, closest))
        title = "Experts over all linears: norm of scaling * B A, most similar expert (cosine)"
        print_table(title, ("expert", "group", "norm", "most similar"), rows)
    headers = ("groups", "r", "scaling", "norms of the LoRA experts", "largest similarity")
    if each_layer:
        prefix, short = without_prefix([layer.layer for layer in layers])
        rows = [(short[layer.layer], *_shape(layer), _norms(layer), _largest([layer])) for layer in layers]
        print_table(_in("Linears", prefix), ("linear", *headers), rows)
        return
    by_shape: dict[tuple[str, ...], list[LayerSummary]] = defaultdict(list)
    of_name = {layer.layer: layer for layer in layers}
    for kind, names in by_kind(of_name).items():
        for name in names:
            by_shape[(kind, *_shape(of_name[name]))].append(of_name[name])
    rows = [
        (kind, str(len(same)), *shape, _range(layer.norms for layer in same), _largest(same))
        for (kind, *shape), same in by_shape.items()
    ]
    print_table("Linears by kind (each of them: --layers)", ("linear", "count", *headers), rows)


def show_experts(records: Iterable[Mapping[str, Any]], each_layer: bool) -> None:
    """Print the records of `list_experts`: each expert over all linears, or the experts of each linear."""
    layers: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        layers[record["layer"]].append(record)
    measured = False
    for same_groups in _by_groups(layers.values()):
        first = same_groups[0]
        measured = first[0]["load"] is not None
        groups = [f"{record['group']}{' (null)' if record['null'] else ''}" for record in first]
        names = [record["task_type"] or "" for record in first]
        columns = [[str(record["expert"]) for record in first], groups]
        headers = ["expert", "group"]
        if any(names):
            columns, headers = [*columns, names], [*headers, "task type"]
        if measured:
            loads = [[experts[i]["load"] for experts in same_groups] for i in range(len(first))]
            columns += [[_number(sum(load) / len(load), ".3f") for load in loads], [_range([load]) for load in loads]]
            headers += ["mean load", "from the smallest to the largest"]
        print_table(f"Experts of {len(same_groups)} linears", headers, list(zip(*columns)))
        if measured and each_layer:
            prefix, short = without_prefix([experts[0]["layer"] for experts in same_groups])
            rows = [
                (short[experts[0]["layer"]], " ".join(_number(record["load"], ".3f") for record in experts))
                for experts in same_groups
            ]
            print_table(_in("Loads", prefix), ("linear", "loads of the experts"), rows)
    if not measured:
        print("The load was not measured; measure it with --calibration.")
    elif not each_layer:
        print("The loads of each linear: --layers.")


def show_change(change: Surgery, measurable: bool, each_layer: bool) -> None:
    """Print the effect of an operation; `measurable` says whether the command takes calibration data."""
    measured = change.relative_error is not None
    headers = ("groups", *(["relative change of the output"] if measured else []))
    if each_layer:
        prefix, short = without_prefix([layer.layer for layer in change.layers])
        rows = [
            (short[layer.layer], _sizes(layer), *([_number(layer.relative_error, ".3g")] if measured else []))
            for layer in change.layers
        ]
        print_table(_in("Experts now", prefix), ("linear", *headers), rows)
    else:
        by_shape: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        of_name = {layer.layer: layer for layer in change.layers}
        for kind, names in by_kind(of_name).items():
            for name in names:
                by_shape[kind, _sizes(of_name[name])].append(of_name[name].relative_error)
        rows = [
            (kind, str(len(errors)), sizes, *([_range([errors])] if measured else []))
            for (kind, sizes), errors in by_shape.items()
        ]
        title = "Experts now, by kind of linear (each of them: --layers)"
        print_table(title, ("linear", "count", *headers), rows)
    if measured:
        print(f"Relative change of the mixtures' outputs: {change.relative_error:.3g}.")
    elif measurable:
        print("The change of the outputs was not measured; measure it with --calibration.")


def show_evaluation(report: Mapping[str, Any]) -> None:
    """Print the results of `evaluate`: two tables per question set, and one for lm-eval tasks."""
    paths = [report["options"]["model"], *report["options"]["adapter"]]
    for asked in report["closed_book"]:
        scores, compared = [], []
        for name, model in zip(_short(paths), asked["models"]):
            scores.append((name, f"{model['exact_match']:.1%}", f"{model['f1']:.1%}", f"{model['loss']:.3f}"))
            if (comparison := model["comparison"]) is not None:
                low, high = comparison["interval"]
                numbers = (
                    f"{comparison['lost']} of {comparison['known']}",
                    str(comparison["gained"]),
                    f"{100 * comparison['difference']:+.1f}",
                    f"{100 * low:+.1f} to {100 * high:+.1f}",
                    _number(comparison["p_value"], ".2g"),
                )
                compared.append((name, *numbers))
        title = f"{asked['questions']}: {asked['count']} questions, {len(asked['shots'])} examples in the prompt"
        print_table(title, ("model", "exact match", "F1", "loss"), scores)
        if compared:
            headers = ("model", "lost", "gained", "difference", "95 % interval", "p (McNemar)")
            print_table("Compared with the base model, in percentage points", headers, compared)
    rows = []
    for name, measured in zip(_short(paths), report["lm_eval"]):
        for task, metrics in measured["results"].items():
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                if (value is None or isinstance(value, float)) and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{kind}")
                    shown = _number(error) if isinstance(error, float) else "-"
                    rows.append((name, task, metric, _number(value), shown))
    if rows:
        print_table("lm-eval", ("model", "task", "metric", "value", "standard error"), rows)


def show_statistics(
    statistics: RouterStatistics, usage: Iterable[Mapping[str, Any]], similarity: Iterable[Mapping[str, Any]]
) -> None:
    """Print the router statistics, expert usage and expert similarity of an adapter."""
    ((_, names),) = statistics.task_type_names.items()
    layers: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in statistics.layers:
        layers[record["task_type"]].append(record)
    weights: dict[int, list[float]] = defaultdict(list)
    for record in group_weights(statistics.experts):
        weights[record["task_type"]].append(record["weight"])
    null = {record["group"] for record in statistics.experts if record["null"]}
    groups = [group_name(group, names, null) for group in range(len(next(iter(weights.values()))))]
    _print_weights(layers, weights, groups, names)
    even = " or ".join(sorted({_number(math.log(record["num_experts"]), ".3f") for record in statistics.layers}))
    print(f"Entropy of a uniform router: {even} nats.")
    usage = list(usage)
    for status in ("dead", "dominating"):
        found = [f"{record['layer']} {record['expert']}" for record in usage if record["status"] == status]
        console().print(f"{status.capitalize()} experts: {len(found)} of {len(usage)}{_first_names(found)}")
    _print_similarity(list(similarity))


def show_trace(trace: RouterTrace) -> None:
    """Print the weight of each expert group for each token, averaged over all linears."""
    weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for record in trace.records():
        weights[record["position"]][record["group"]] += record["weight"] / len(trace.layers)
    groups = sorted(weights[0])
    headers = [group_name(group, trace.task_type_names, trace.null_groups) for group in groups]
    rows = [
        (repr(token), *(_number(weights[position][group], ".3f") for group in groups))
        for position, token in enumerate(trace.tokens)
    ]
    print_table(f"Router weights, mean over {len(trace.layers)} linears", ("token", *headers), rows)


def _print_weights(
    layers: Mapping[int, list[Mapping[str, Any]]],
    weights: Mapping[int, list[float]],
    groups: list[str],
    names: list[str] | None,
) -> None:
    rows = []
    for task_type, records in sorted(layers.items()):
        means = (sum(record[field] for record in records) / len(records) for field in ("entropy", "load_entropy"))
        numbers = [_number(value, ".3f") for value in (*weights[task_type], *means)]
        rows.append((f"{records[0]['samples']} {type_name(task_type, names)}", f"{records[0]['tokens']:,}", *numbers))
    title = f"Router weights and entropy (nats), mean over {len(next(iter(layers.values())))} linears"
    print_table(title, ("texts", "tokens", *groups, "entropy", "entropy of the mean weights"), rows)


def show_retention(compared: Mapping[str, Retention], null: bool) -> None:
    """Print what a training run learned and kept."""
    rows = []
    for name, result in compared.items():
        losses = (_number(value, ".3f") for value in (result.loss_before, result.loss_after))
        rows.append((name, str(result.samples), *losses, _number(result.kept_weight, ".2f")))
    title = "Learned and kept: loss in nats per token without and with the adapter, router weight"
    print_table(title, ("measured on", "samples", "without", "with", "null group" if null else "group 0"), rows)


def _print_similarity(pairs: list[Mapping[str, Any]]) -> None:
    rows, most_similar = [], []
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
            numbers = (_number(value, ".3f") for value in (*means.values(), closest["cosine"]))
            rows.append((name, str(len(known)), *numbers))
            pair = f"{closest['expert']} and {closest['other']} of {closest['layer']}"
            most_similar.append(f"Most similar experts of {name}: {pair}.")
    headers = ("experts of", "pairs", "cosine", "output overlap", "input overlap", "largest cosine")
    print_table("Similarity of the experts of a linear, by pairs", headers, rows)
    console().print(*most_similar, sep="\n")


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
    plain = LoRAMoEConfig()
    defaults = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    changed = {k: v for k, v in config.items() if k not in ELSEWHERE and k in defaults and v != defaults[k]}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _shape(layer: LayerSummary) -> tuple[str, str, str]:
    """Groups, rank and scaling of a linear."""
    return _sizes(layer), str(layer.r), f"{layer.scaling:g}"


def _sizes(layer: LayerSummary | LayerChange) -> str:
    return "+".join(map(str, layer.expert_groups))


def _norms(layer: LayerSummary) -> str:
    return " ".join(_number(norm, ".3g") for norm in layer.norms if norm is not None)


def _range(values: Iterable[Iterable[float | None]]) -> str:
    """The smallest and the largest of all values."""
    known = [value for part in values for value in part if value is not None]
    low, high = (_number(value, ".3g") for value in (min(known, default=None), max(known, default=None)))
    return low if low == high else f"{low} to {high}"


def _largest(layers: Iterable[LayerSummary]) -> str:
    """The largest similarity of two experts of a linear."""
    pairs = [value for layer in layers for i, row in enumerate(layer.similarity) for value in row[:i]]
    return _number(max((value for value in pairs if value is not None), default=None), ".2f")


def _in(title: str, prefix: str) -> str:
    return f"{title} in {prefix}" if prefix else title


def _short(paths: list[str]) -> list[str]:
    """The last parts of paths where they tell them apart, else the paths."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else paths


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)
