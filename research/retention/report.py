"""`report.md` and a figure from the rows of a study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..toy.intervals import mean_interval, ratio_interval
from .methods import METHODS


Row = dict[str, Any]


def rise(row: Row, base: Row) -> float:
    """How much more loss the fine-tuned model has on ordinary text, nats per token."""
    return row["scores"]["text"]["loss"] - base["scores"]["text"]["loss"]


def solved(row: Row, base: Row) -> float:
    """Percent of the tasks' new items that are solved."""
    return percent(row["scores"]["task"]["greedy"])


def kept(form: str, how: str) -> Callable[[Row, Row], float]:
    """Percent of the facts that the base model got right which the fine-tuned model still gets right."""

    def measure(row: Row, base: Row) -> float:
        before, after = base["scores"][form][how], row["scores"][form][how]
        return percent("".join(b for a, b in zip(before, after) if a == "1"))

    return measure


def facts_ranked(row: Row, base: Row) -> float:
    """Percent of the facts, over both formats, that are still ranked right."""
    return (kept("statement", "ranked")(row, base) + kept("question", "ranked")(row, base)) / 2


def null(name: str) -> Callable[[Row, Row], float]:
    """Mean router weight of the first expert group."""
    return lambda row, base: row["null_weight"][name]["mean"] if row["null_weight"] else float("nan")


def percent(marks: str) -> float:
    """The share of "1" in a string, in percent."""
    return 100 * marks.count("1") / max(1, len(marks))


MEASURES: dict[str, tuple[Callable[[Row, Row], float], str]] = {
    "tasks solved, %": (solved, ".1f"),
    "task loss": (lambda row, base: row["scores"]["task"]["loss"], ".3f"),
    "text loss, rise": (rise, ".3f"),
    "statements ranked right, %": (kept("statement", "ranked"), ".1f"),
    "questions ranked right, %": (kept("question", "ranked"), ".1f"),
    "statements completed right, %": (kept("statement", "greedy"), ".1f"),
    "questions answered right, %": (kept("question", "greedy"), ".1f"),
    "null weight: tasks": (null("task"), ".2f"),
    "anchors": (null("anchor"), ".2f"),
    "text": (null("text"), ".2f"),
    "questions": (null("question"), ".2f"),
}


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of each method with its options, by seed, in the order of the table of methods."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["run"]["method"])):
        options = ", ".join(f"{name} {value}" for name, value in row["run"]["options"].items())
        name = row["run"]["method"] + (f" ({options})" if options else "")
        found[name][row["run"]["seed"]] = row
    return dict(found)


def base_row(rows: Sequence[Row], part: float) -> Row:
    """The scores of the base model on the same share of the items.

    Raises:
        ValueError: there is no such row.
    """
    for row in rows:
        if row["run"]["method"] == "base" and row["run"]["part"] == part:
            return row
    raise ValueError(f"There is no row of the method 'base' with part={part}; run it first (--methods base).")


def means_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the mean over the seeds of every measure, for each method."""
    lines = ["| method | seeds | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for name, of_seed in by_method(rows).items():
        cells = []
        for measure, style in MEASURES.values():
            values = [measure(row, base_row(rows, row["run"]["part"])) for row in of_seed.values()]
            mean = sum(values) / len(values)
            cells.append("" if mean != mean else format(mean, style))
        lines.append(f"| {name} | {len(of_seed)} | " + " | ".join(cells) + " |")
    return lines


def pairs_table(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> list[str]:
    """Markdown: one method against others on the seeds that both have, with 95 % intervals."""
    lines = [
        "| against | seeds | rise of text loss, ratio | tasks solved, difference | facts ranked right, difference |",
        "|---|---|---|---|---|",
    ]
    methods = by_method(rows)
    for rival in rivals:
        seeds = sorted(set(methods.get(ours, {})) & set(methods.get(rival, {})))
        if not seeds:
            continue
        pairs = [(methods[ours][seed], methods[rival][seed]) for seed in seeds]
        bases = [base_row(rows, row["run"]["part"]) for row, _ in pairs]
        rises = [[rise(row, base) for row, base in zip(column, bases)] for column in zip(*pairs)]
        cells = [_interval(ratio_interval(*rises), ".2f")]
        for measure in (solved, facts_ranked):
            differences = [measure(a, base) - measure(b, base) for (a, b), base in zip(pairs, bases)]
            cells.append(_interval(mean_interval(differences), "+.1f"))
        lines.append(f"| {rival} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def _interval(values: tuple[float, float, float], style: str) -> str:
    return "{} ({} to {})".format(*(format(value, style) for value in values))


def decision_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the conditions of the protocol, over the seeds on which all three methods ran."""
    methods = by_method(rows)
    seeds = sorted(set.intersection(*(set(methods.get(name, {})) for name in ("retain", "lora", "lora+anchors"))))
    if not seeds:
        return []

    def mean(name: str, measure: Callable[[Row, Row], float]) -> float:
        values = [measure(row := methods[name][seed], base_row(rows, row["run"]["part"])) for seed in seeds]
        return sum(values) / len(values)

    text = {name: mean(name, rise) for name in ("retain", "lora", "lora+anchors")}
    facts = {name: mean(name, facts_ranked) for name in ("retain", "lora+anchors")}
    tasks = {name: mean(name, solved) for name in ("retain", "lora")}
    conditions = [
        ("text loss rises by at most 0.2 of `lora`'s rise", f"{text['retain'] / text['lora']:.2f}",
         text["retain"] <= 0.2 * text["lora"]),
        ("and by at most 0.5 of `lora+anchors`'s", f"{text['retain'] / text['lora+anchors']:.2f}",
         text["retain"] <= 0.5 * text["lora+anchors"]),
        ("facts are ranked no worse than with `lora+anchors`", f"{facts['retain']:.1f} to {facts['lora+anchors']:.1f} %",
         facts["retain"] >= facts["lora+anchors"]),
        ("tasks solved are not below `lora`'s", f"{tasks['retain']:.1f} to {tasks['lora']:.1f} %",
         tasks["retain"] >= tasks["lora"]),
    ]  # fmt: skip
    return [
        f"Conditions of the protocol for `retain`, means over the seeds {', '.join(map(str, seeds))}:",
        "",
        "| condition | found | met |",
        "|---|---|---|",
        *(f"| {condition} | {found} | {'yes' if met else 'no'} |" for condition, found, met in conditions),
        "",
    ]


def write_report(rows: Sequence[Row], file: Path, ours: str = "retain") -> None:
    """Write the tables to a Markdown file, and a figure beside it."""
    trained = [row for row in rows if row["run"]["method"] != "base"]
    rivals = [name for name in by_method(trained) if name != ours]
    versions = ", ".join(f"{package} {version}" for package, version in trained[0]["versions"].items())
    lines = [
        "# What fine-tuning costs in knowledge: SmolLM2-135M-Instruct",
        "",
        f"Written by `python -m research.retention report`; {len(trained)} runs, {versions}.",
        "",
        *means_table(rows),
        "",
    ]
    if len({row["run"]["seed"] for row in trained}) > 1:
        lines += [
            *decision_table(rows),
            f"`{ours}` against the others, over the same seeds (mean of the pairs, 95 % interval; of ratios, Fieller's):",
            "",
            *pairs_table(rows, ours, rivals),
            "",
        ]
    lines.append(f"![Tasks solved against the rise of text loss]({file.with_suffix('.png').name})")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, file.with_suffix(".png"))


def plot(rows: Sequence[Row], file: Path) -> None:
    """Tasks solved against the rise of text loss: the mean of each method, and a small point for each run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    colors = dict(zip(METHODS, pyplot.get_cmap("tab10").colors))
    others = iter(pyplot.get_cmap("tab20b").colors)
    for name, of_seed in by_method(rows).items():
        if name == "base":
            continue
        bases = [base_row(rows, row["run"]["part"]) for row in of_seed.values()]
        x = [rise(row, base) for row, base in zip(of_seed.values(), bases)]
        y = [solved(row, base) for row, base in zip(of_seed.values(), bases)]
        color = colors.get(name) or next(others)
        if len(x) > 1:
            axes.plot(x, y, ".", color=color, markersize=6, alpha=0.5)
        marker, size = ("*", 16) if name == "retain" else ("o", 8)
        axes.plot(sum(x) / len(x), sum(y) / len(y), marker, color=color, markersize=size, label=name, linestyle="none")
    axes.set_xlabel("rise of the loss on ordinary text, nats per token (left is better)")
    axes.set_ylabel("tasks solved, % (up is better)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
