"""The study's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_loramoe.analysis import plot_frontier
from peft_loramoe.analysis.plots.figure import add_legend, figure_file

from ..palette import COLOURS, RECOMMENDED
from .intervals import mean_interval
from .protocol import METHODS
from .results import Results, mean


# Methods in the figures, few enough to tell apart; the tables have them all.
POINTS = ("full", "lora", "lora-attention", "unbalanced", "printed", "null")
CURVES = ("full", "lora", "lora-attention", "unbalanced", "null")
MARKERS = {"full": "o", "lora": "s", "lora-attention": "^", "unbalanced": "D", "printed": "v", "null": "*"}


def look(method: str) -> dict[str, str]:
    """Colour and marker of a method."""
    return {"color": COLOURS[method], "marker": MARKERS[method]}


def frontier_records(results: Results) -> list[dict[str, Any]]:
    """Methods on the test seeds, with 95 % intervals, for `plot_frontier`."""
    records = []
    for method in (name for name in POINTS if name in results.variant.methods):
        runs = results.tested(method)
        record: dict[str, Any] = {"label": METHODS[method].title, **look(method)}
        for name, values in (
            ("downstream", [results.tasks(run) for run in runs]),
            ("retention", [results.kept(run) for run in runs]),
        ):
            record[name], record[f"{name}_low"], record[f"{name}_high"] = mean_interval(values)
        records.append(record)
    return records


def plot_learning_rates(results: Results, path: Path) -> None:
    """What the methods in CURVES keep and learn with each learning rate, on the validation seeds."""
    records = []
    for method in (name for name in CURVES if name in results.variant.methods):
        for rate, runs in results.selection(method).items():
            kept, solved = mean(map(results.kept, runs)), mean(map(results.tasks, runs))
            record = {"label": f"{rate:g}", "series": METHODS[method].title, **look(method)}
            records.append({**record, "downstream": solved, "retention": kept})
    plot_frontier(records, path)


def plot_growth(results: Results, path: Path) -> None:
    """What is lost and what is learned with growing data."""
    measures = {
        "questions lost (points)": lambda run: results.lost(run, "questions"),
        "statements lost (points)": lambda run: results.lost(run, "statements"),
        "tasks (%)": results.tasks,
    }
    sizes = results.variant.samples
    with figure_file(path, 9, 3.2) as figure:
        panels = figure.subplots(1, len(measures))
        for panel, (title, measure) in zip(panels, measures.items()):
            for number, method in enumerate(results.variant.growth):
                means, lows, highs = zip(
                    *(mean_interval([measure(run) for run in results.tested(method, size)]) for size in sizes)
                )
                shift = 1 + 0.03 * (
                    number - len(results.variant.growth) / 2
                )  # so that the bars do not hide each other
                errors = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
                points = [size * shift for size in sizes]
                size = 10 if method in RECOMMENDED else 6
                panel.errorbar(
                    points, means, errors, label=METHODS[method].title, capsize=2, markersize=size, **look(method)
                )
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set_xlabel("fine-tuning samples")
            panel.set_title(title, fontsize="medium")
        add_legend(figure, *panels[0].get_legend_handles_labels())
