"""The figures of docs/performance.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.palette import COLOURS

from .rows import Case, Row, labels, method_name, ratio, shown, variant


# Beside the colours, for readers who cannot tell them apart.
HATCHES = {
    "lora": "//",
    "loop": "..",
    "loramoe": "",
    "loramoe-torch": "\\\\",
    "moe_peft": "xx",
    "mixlora": "\\\\",
    "unsloth": "--",
    "lorafusion": "++",
}
MARKERS = {"base": "o", "lora": "s", "loramoe": "D"}

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
COLUMNS = 2
MOST_SHOWN = 3.0  # a longer bar ends at the edge

# Groups of the figure of scaling: what varies in the config, and the label of its axis.
SWEEPS = {
    "experts": ("experts", "experts N"),
    "rank": ("r", "rank r"),
    "tokens": ("tokens", "tokens T"),
    "width": ("in_features", "d"),
}


def plot_steps(cases: Mapping[str, Sequence[Case]], path: Path) -> None:
    """Time relative to the frozen base of layers and models, one panel for each case."""
    from matplotlib.figure import Figure

    panels = [
        ("\n".join([group, *textwrap.wrap(label, 44)]), case)
        for group in STEPS
        if group in cases
        for case, label in zip(cases[group], labels(cases[group]))
    ]
    lines = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, case) in zip(axes, panels):
        base = variant(case, "base", None)
        rows = [row for row in case if "skipped" not in row and row is not base]
        for place, row in enumerate(rows):
            low, middle, high = ratio(row, base)
            method = row["config"]["method"]
            axis.barh(place, middle, color=COLOURS[method], hatch=HATCHES[method], edgecolor="white", alpha=0.9)
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=2, linewidth=1)
        axis.axvline(1, color="black", linestyle=":", linewidth=1)
        axis.set_xlim(0, min(axis.get_xlim()[1], MOST_SHOWN))
        configs = [row["config"] for row in rows]
        names = [f"{method_name(config['method'])}, {shown(config['adapter_dtype'])}" for config in configs]
        axis.set_yticks(range(len(rows)), names, fontsize="small")
        axis.invert_yaxis()
        axis.set_title(title, fontsize="small")
    figure.supxlabel("time / frozen base (median of the rounds' ratios; 20 and 80 % quantiles)", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_scaling(cases: Mapping[str, Sequence[Case]], path: Path) -> None:
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
            points = _points(cases[group], key, method)
            middle = [value[1] for _, value, _ in points]
            spread = [[v[1] - v[0] for _, v, _ in points], [v[2] - v[1] for _, v, _ in points]]
            style = {"color": COLOURS[method], "marker": MARKERS[method]}
            drawn[method_name(method)] = axis.errorbar([x for x, _, _ in points], middle, spread, capsize=2, **style)
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set(xlabel=label, ylabel="time / frozen base", xscale="log")
        ticks = sorted({case[0]["config"][key] for case in cases[group]})[:: 2 if group == "tokens" else 1]
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    for method in ("base", "lora", "loramoe"):
        points = _points(cases.get("tokens", []), "tokens", method)
        peaks = [row["peak_bytes"] / 2**20 for _, _, row in points]
        style = {"color": COLOURS[method], "marker": MARKERS[method]}
        (drawn[method_name(method)],) = memory.plot([x for x, _, _ in points], peaks, **style)
    memory.set(xlabel="tokens T", ylabel="peak memory of a step, MiB", xscale="log", yscale="log")
    key_panel.set_axis_off()
    title = "time: median of the rounds' ratios,\nbars: 20 and 80 % quantiles"
    key_panel.legend(drawn.values(), drawn.keys(), loc="center", frameon=False, title=title)
    figure.savefig(path, dpi=150)


def _points(cases: Sequence[Case], key: str, method: str) -> list[tuple[int, list[float], Row]]:
    """What varies, a method's time relative to the frozen base, and its row, for each case."""
    points = []
    for case in cases:
        base = variant(case, "base", None)
        for row in case:
            if row["config"]["method"] == method and "skipped" not in row and base is not None:
                points.append((row["config"][key], ratio(row, base), row))
    return points
