"""Tables, bars and figures from the benchmarks' result files: `python -m benchmarks.report`.

Prints a Markdown table for each group of cases; `--check` prints every bar of the project, the measured value and
whether it is met; `--plots` draws docs/images/performance-*.png. A ratio is the median over the rounds of the ratios
within a round, with the 20 and 80 % quantiles in brackets.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research.palette import COLOURS

from .measure import quantiles


RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
Row = Mapping[str, Any]

NAMES = {
    "base": "frozen base",
    "lora": "PEFT LoRA",
    "loop": "expert loop",
    "loramoe": "LoRAMoE",
    "loramoe-torch": "LoRAMoE without Triton",
    "loramoe-node": "LoRAMoE, one node",
    "loramoe-autograd": "LoRAMoE, differentiated by autograd",
}
SHORT = {"float32": "float32", "bfloat16": "bf16", None: "-"}
SAME = "same"  # the other variant's adapters have the dtype of this one's


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio of LoRAMoE's figure to another variant's, in every case of a group.

    Args:
        set: "cpu" or "gpu".
        group: group of cases.
        quantity: "seconds" or "saved_bytes".
        other: method compared with, and the dtype of its adapters.
        limit: the ratio is to be at most this.
        where: entries of the config that a case, or LoRAMoE's variant, must have.
    """

    set: str
    group: str
    quantity: str
    other: tuple[str, str | None]
    limit: float
    where: dict[str, Any] = field(default_factory=dict)


GPU_WHERE = {"tokens": 8192, "dropout": 0.05, "adapter_dtype": "float32"}
BARS = [
    Bar("cpu", "layer", "seconds", ("lora", SAME), 1.0),
    Bar("cpu", "layer", "seconds", ("loop", SAME), 0.6, {"dropout": 0.0}),
    Bar("cpu", "layer", "seconds", ("loop", SAME), 0.5, {"dropout": 0.05}),
    Bar("cpu", "experts", "seconds", ("base", None), 1.65, {"experts": 64}),
    Bar("cpu", "layer", "saved_bytes", ("lora", SAME), 1.05, {"dropout": 0.0}),
    Bar("cpu", "layer", "saved_bytes", ("lora", SAME), 0.8, {"dropout": 0.05}),
    Bar("cpu", "layer", "saved_bytes", ("loop", SAME), 1 / 12),
    Bar("gpu", "layer", "seconds", ("base", None), 1.12, GPU_WHERE),
    Bar("gpu", "layer", "seconds", ("lora", "bfloat16"), 0.88, GPU_WHERE),
    Bar("gpu", "layer", "seconds", ("lora", "float32"), 0.65, GPU_WHERE),
    Bar("gpu", "training step", "seconds", ("lora", "bfloat16"), 0.95, {"adapter_dtype": "float32"}),
    Bar("gpu", "training step", "seconds", ("lora", "float32"), 0.95, {"adapter_dtype": "float32"}),
    Bar("gpu", "decoding", "seconds", ("lora", "bfloat16"), 1.05, {"adapter_dtype": "float32"}),
    Bar("gpu", "decoding", "seconds", ("lora", "float32"), 1.05, {"adapter_dtype": "float32"}),
]


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a set, or None if it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def groups(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Group -> its cases -> their rows."""
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["group"], row["case"]), []).append(row)
    found: dict[str, list[list[Row]]] = {}
    for (group, _), members in cases.items():
        found.setdefault(group, []).append(members)
    return found


def partner(row: Row, case: Sequence[Row], method: str, dtype: str | None) -> Row | None:
    """The variant of the same case that `row` is compared with; None if the case has none that ran."""
    wanted = row["config"]["adapter_dtype"] if dtype == SAME else dtype
    for other in case:
        if (other["config"]["method"], other["config"]["adapter_dtype"]) == (
            method,
            wanted,
        ) and "skipped" not in other:
            return other
    return None


def ratio(row: Row, other: Row, quantity: str = "seconds") -> list[float]:
    """Quantiles over the rounds of the ratio of the two rows' times, or the ratio of another quantity, three times."""
    if quantity == "seconds":
        return quantiles(a / b for a, b in zip(row["rounds"], other["rounds"]))
    return [row[quantity] / other[quantity]] * 3


def check(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, float | None, float]]:
    """Every bar in every case it applies to.

    Args:
        results: set -> result.

    Returns:
        Tuples of bar, case, measured ratio (None: not measured) and limit.
    """
    lines = []
    for bar in BARS:
        found = list(_measured(bar, groups(results[bar.set]["rows"]).get(bar.group, []))) if bar.set in results else []
        name = f"{bar.set}, {bar.group}: {bar.quantity.replace('_', ' ')} / {_name(*bar.other)}"
        if not found:
            found = [(" ".join(f"{key}={value}" for key, value in bar.where.items()), None)]
        lines += [(name, case, value, bar.limit) for case, value in found]
    return lines


def _measured(bar: Bar, cases: Sequence[Sequence[Row]]) -> Iterator[tuple[str, float]]:
    for case, label in zip(cases, _labels(cases)):
        for row in case:
            config = row["config"]
            fits = all(config[key] == value for key, value in bar.where.items())
            other = partner(row, case, *bar.other)
            if config["method"] == "loramoe" and fits and "skipped" not in row and other is not None:
                yield (
                    f"{label}; {SHORT[config['adapter_dtype']]} adapters".strip("; "),
                    ratio(row, other, bar.quantity)[1],
                )


def _name(method: str, dtype: str | None) -> str:
    name = NAMES.get(method, method)
    return {None: name, SAME: f"{name} with the same adapter dtype"}.get(
        dtype, f"{name} with {SHORT.get(dtype)} adapters"
    )


def _labels(cases: Sequence[Sequence[Row]]) -> list[str]:
    """What tells the cases of a group apart."""
    configs = [case[0]["config"] for case in cases]
    if not configs:
        return []
    varying = [
        key for key in configs[0] if key not in ("method", "adapter_dtype") and len({str(c[key]) for c in configs}) > 1
    ]
    if {"in_features", "out_features"} <= set(varying):
        configs = [{**c, "in_features": f"{c['in_features']}->{c['out_features']}"} for c in configs]
        varying.remove("out_features")
    texts = {"in_features": "d", "dtype": "backbone"}
    return [" ".join(f"{texts.get(key, key)} {SHORT.get(c[key], c[key])}" for key in sorted(varying)) for c in configs]


def table(cases: Sequence[Sequence[Row]]) -> str:
    """A Markdown table of a group."""
    decoding = cases[0][0]["kind"] == "decode"
    head = ["case", "variant", "adapters", "tokens/s" if decoding else "ms (20-80 %)", "/ frozen base", "/ PEFT LoRA"]
    lines = [[*head, "/ expert loop", "CPU ms", "peak MiB", "saved B/token"]]
    for case, label in zip(cases, _labels(cases)):
        for row in case:
            config = row["config"]
            cells = [label, NAMES.get(config["method"], config["method"]), SHORT[config["adapter_dtype"]]]
            if "skipped" in row:
                lines.append([*cells, f"not measured: {row['skipped']}", *[""] * 6])
                continue
            low, middle, high = (1e3 * value for value in row["seconds"])
            time = f"{1e3 * config['new_tokens'] / middle:.1f}" if decoding else f"{middle:.4g} ({low:.4g}-{high:.4g})"
            cells += [
                time,
                _ratio_cell(row, case, "base"),
                _ratio_cell(row, case, "lora"),
                _ratio_cell(row, case, "loop"),
                f"{1e3 * row['cpu_seconds'][1]:.4g}",
            ]
            saved = f"{row['saved_bytes'] / tokens(config):.0f}" if "saved_bytes" in row else ""
            lines.append([*cells, f"{row['peak_bytes'] / 2**20:.4g}", saved])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio_cell(row: Row, case: Sequence[Row], method: str) -> str:
    other = partner(row, case, method, None if method == "base" else SAME)
    if other is None or row["config"]["method"] == "base":
        return ""
    return _with_quantiles(ratio(row, other))


def _with_quantiles(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one step."""
    return config["tokens"] if "tokens" in config else config["rows"] * config["width"]


def slopes(cases: Sequence[Sequence[Row]]) -> str:
    """How memory grows with the tokens, from the two largest cases of the group "tokens"."""
    first, second = cases[-2:]
    step = tokens(second[0]["config"]) - tokens(first[0]["config"])
    config, lines = second[0]["config"], []
    size = {"float32": 4}.get(config["dtype"], 2)
    lines.append(f"x is {size * config['in_features']} B/token, the output {size * config['out_features']}.")
    for small, large in zip(first, second):
        grows = {
            name: (large[name] - small[name]) / step
            for name in ("saved_bytes", "peak_bytes")
            if name in large and name in small
        }
        if grows:
            saved, peak = grows["saved_bytes"], grows["peak_bytes"]
            lines.append(f"{NAMES[large['config']['method']]}: saved {saved:.0f} B/token, peak {peak:.0f} B/token.")
    return "\n".join(lines)


# Rows of the summary of the GPU set: name, group, entries of the config, and the dtype of LoRAMoE's adapters.
DEVICE_BOUND = [
    ("layer 4096 -> 11008", "layer", {"in_features": 4096, "tokens": 8192, "dropout": 0.05}, "float32"),
    ("layer 11008 -> 4096", "layer", {"in_features": 11008, "tokens": 8192, "dropout": 0.05}, "float32"),
    ("layer 4096 -> 11008, NF4", "4-bit layer", {}, "float32"),
    ("layer 8192 -> 22016, bf16 adapters", "width", {"in_features": 8192}, "bfloat16"),
    ("training step, 8 layers of a 7B Llama", "training step of 8192 tokens", {}, "float32"),
]
HOST_BOUND = [
    ("training step of a 7B Llama, 2048 tokens", "training step", {}, "float32"),
    ("training step of a 135M Llama, 512 tokens", "training step of a small model", {}, "float32"),
    ("one layer, 64 tokens, bf16 adapters", "tokens", {"tokens": 64}, "bfloat16"),
    ("decoding, 7B Llama, dynamic cache", "decoding", {"cache": "dynamic"}, "float32"),
    ("decoding, 4 layers of it, compiled, static cache", "compiled decoding", {}, "float32"),
]
MEMORY = "peak MiB: LoRAMoE; base, LoRA bf16, LoRA float32, Unsloth"
RIVALS = {
    "the frozen base": ("base", None),
    "PEFT LoRA, bf16 adapters": ("lora", "bfloat16"),
    "PEFT LoRA, float32 adapters": ("lora", "float32"),
    "Unsloth's LoRA": ("unsloth", "float32"),
}


def summary(result: Mapping[str, Any]) -> str:
    """Two tables of the GPU set: LoRAMoE against its rivals where the device decides the time, and where the host."""
    found = groups(result["rows"])
    lines = []
    for rows, rivals, memory in ((DEVICE_BOUND, list(RIVALS), True), (HOST_BOUND, list(RIVALS)[:3], False)):
        head = [
            "",
            *(f"/ {name}" for name in rivals),
            *([MEMORY] if memory else []),
        ]
        lines += [head, ["---"] * len(head)]
        for name, group, where, dtype in rows:
            (case,) = (c for c in found[group] if all(c[0]["config"][key] == value for key, value in where.items()))
            row = partner(case[0], case, "loramoe", dtype)
            others = [partner(case[0], case, *RIVALS[rival]) for rival in rivals]
            cells = ["" if other is None else _with_quantiles(ratio(row, other)) for other in others]
            peaks = ["-" if other is None else f"{other['peak_bytes'] / 2**20:.0f}" for other in (row, *others)]
            lines.append([name, *cells, *([f"{peaks[0]}; {', '.join(peaks[1:])}"] if memory else [])])
        lines.append([])
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in lines)


def heading(result: Mapping[str, Any]) -> str:
    """Where and with what a set was measured."""
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    commit = about["commit"][:7] + about["commit"][40:]
    return (
        f"{about['device']}, {about['threads']} threads of {about['cores']} cores, load {about['load_at_start']:.1f} "
        f"to {about['load_at_end']:.1f}, {about['date']}, commit {commit}, Python {about['python']}, "
        f"{versions}{', CUDA ' + about['cuda'] if about['cuda'] else ''}; {about['minutes']} minutes."
        + (f" {about['note']}" if "note" in about else "")
    )


# --- figures

# Marker and hatch, beside the colours of research/palette.py.
STYLE = {
    "base": ("o", ""),
    "lora": ("s", "//"),
    "loop": ("^", ".."),
    "loramoe": ("D", ""),
    "loramoe-torch": ("d", "\\\\"),
    "moe_peft": ("v", "xx"),
    "mixlora": ("P", "\\\\"),
    "unsloth": ("<", "--"),
    "lorafusion": (">", "++"),
}
# Groups of the figure of layers and models.
STEPS = (
    "layer",
    "4-bit layer",
    "training step",
    "training step of 8192 tokens",
    "training step of a small model",
    "decoding",
    "decoding with a small model",
)
MOST_SHOWN = 3.0
SWEEPS = {
    "experts": ("experts", "experts N"),
    "rank": ("r", "rank r"),
    "tokens": ("tokens", "tokens T"),
    "width": ("in_features", "d"),
}


def plot_steps(cases: Mapping[str, Sequence[Sequence[Row]]], path: Path) -> None:
    """Time relative to the frozen base of layers and models, one panel for each case."""
    from matplotlib.figure import Figure

    panels = [
        ("\n".join([group, *textwrap.wrap(label, 44)]), case)
        for group in STEPS
        for case, label in zip(cases.get(group, []), _labels(cases[group]) if group in cases else [])
    ]
    columns = 2
    figure = Figure(figsize=(4.5 * columns, 2.4 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, case) in zip(axes, panels):
        base = partner(case[0], case, "base", None)
        rows = [row for row in case if "skipped" not in row and row is not base]
        for place, row in enumerate(rows):
            low, middle, high = ratio(row, base)
            colour, (_, hatch) = COLOURS[row["config"]["method"]], STYLE[row["config"]["method"]]
            axis.barh(place, middle, color=colour, hatch=hatch, edgecolor="white", alpha=0.9)
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=2, linewidth=1)
        axis.axvline(1, color="black", linestyle=":", linewidth=1)
        axis.set_xlim(0, min(axis.get_xlim()[1], MOST_SHOWN))  # a longer bar ends at the edge
        names = [
            f"{NAMES.get(r['config']['method'], r['config']['method'])}, {SHORT[r['config']['adapter_dtype']]}"
            for r in rows
        ]
        axis.set_yticks(range(len(rows)), names, fontsize="small")
        axis.invert_yaxis()
        axis.set_title(title, fontsize="small")
    figure.supxlabel("time / frozen base (median of the rounds' ratios; 20 and 80 % quantiles)", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_scaling(cases: Mapping[str, Sequence[Sequence[Row]]], path: Path) -> None:
    """Time relative to the frozen base against N, r, T and d, and memory against T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    *axes, memory, key_panel = figure.subplots(2, 3).flatten()
    drawn = {}
    for axis, (group, (key, label)) in zip(axes, SWEEPS.items()):
        if group not in cases:
            axis.set_axis_off()
            continue
        for method in ("lora", "loramoe"):
            points = _points(cases.get(group, []), key, method)
            colour, (marker, _) = COLOURS[method], STYLE[method]
            middle = [value[1] for _, value, _ in points]
            spread = [[v[1] - v[0] for _, v, _ in points], [v[2] - v[1] for _, v, _ in points]]
            drawn[NAMES[method]] = axis.errorbar(
                [x for x, _, _ in points], middle, spread, color=colour, marker=marker, capsize=2
            )
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set(xlabel=label, ylabel="time / frozen base", xscale="log")
        ticks = sorted({case[0]["config"][key] for case in cases.get(group, [])})[:: 2 if group == "tokens" else 1]
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    for method in ("base", "lora", "loramoe"):
        points = _points(cases.get("tokens", []), "tokens", method)
        colour, (marker, _) = COLOURS[method], STYLE[method]
        drawn[NAMES[method]] = memory.plot(
            [x for x, _, _ in points], [row["peak_bytes"] / 2**20 for _, _, row in points], color=colour, marker=marker
        )[0]
    memory.set(xlabel="tokens T", ylabel="peak memory of a step, MiB", xscale="log", yscale="log")
    key_panel.set_axis_off()
    title = "time: median of the rounds' ratios,\nbars: 20 and 80 % quantiles"
    key_panel.legend(drawn.values(), drawn.keys(), loc="center", frameon=False, title=title)
    figure.savefig(path, dpi=150)


def _points(cases: Sequence[Sequence[Row]], key: str, method: str) -> list[tuple[int, list[float], Row]]:
    points = []
    for case in cases:
        base = partner(case[0], case, "base", None)
        for row in case:
            if row["config"]["method"] == method and "skipped" not in row and base is not None:
                points.append((row["config"][key], ratio(row, base), row))
    return points


def main(arguments: list[str] | None = None) -> None:
    """Print tables or bars, or draw figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "set", nargs="?", choices=("cpu", "gpu"), help="the set whose tables are printed (default: both)"
    )
    parser.add_argument("--check", action="store_true", help="print the bars instead of the tables")
    parser.add_argument(
        "--summary", action="store_true", help="print the two tables of docs/performance.md on the GPU set"
    )
    parser.add_argument("--plots", action="store_true", help="draw the figures instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with cpu.json and gpu.json")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the figures")
    options = parser.parse_args(arguments)
    results = {name: result for name in ("cpu", "gpu") if (result := load(name, options.results)) is not None}
    if not results:
        parser.exit(1, f"No result in {options.results}; run `make bench` or `make bench-gpu` first.\n")
    if options.summary:
        print(summary(results["gpu"]))
        return
    if options.check:
        for bar, case, value, limit in check(results):
            verdict = "not measured" if value is None else f"{value:5.3f} {'ok' if value <= limit else 'MISSED'}"
            print(f"{verdict:13} <= {limit:5.3f}  {bar}  [{case}]")
        return
    for name, result in results.items():
        cases = groups(result["rows"])
        if options.set not in (None, name):
            continue
        if options.plots:
            for kind, plot in (("steps", plot_steps), ("scaling", plot_scaling)):
                path = options.images / f"performance-{name}-{kind}.png"
                plot(cases, path)
                print(path)
            continue
        print(f"## {name}\n\n{heading(result)}\n")
        for group, members in cases.items():
            print(f"### {group}\n\n{table(members)}\n")
            if group == "tokens":
                print(f"{slopes(members)}\n")


if __name__ == "__main__":
    main()
