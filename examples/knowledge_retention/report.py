"""From the rows of a study to its tables and figures. What is lost is what was known before fine-tuning and is not after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from peft_loramoe.analysis import plot_frontier
from peft_loramoe.analysis.plots.figure import add_legend, figure_file, style

from .protocol import BASELINE, METHODS, REPLAY, VARIANTS, Run, ablation_runs, choose_learning_rates, selection_runs, test_runs
from .world import TASKS


Row = Mapping[str, Any]
BAR = 0.45  # of the points that the baseline loses
KINDS = ("questions", "statements")
CURVES = ("full", "lora", "lora-attention", "unbalanced", "null")  # of the figure of learning rates


class Results:
    """The rows of one variant.

    Raises:
        ValueError: there are none, they are of several variants, or some are missing.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        names = sorted({row["variant"] for row in rows})
        if len(names) != 1 or names[0] not in VARIANTS:
            raise ValueError(
                f"The rows must be of one variant of {', '.join(VARIANTS)}, but are of: {', '.join(names) or 'none'}."
            )
        self.variant = VARIANTS[names[0]]
        self.by_key = {row["key"]: row for row in rows}
        self._require(selection_runs(self.variant))
        self.chosen = choose_learning_rates(self.variant, rows)
        self._require(test_runs(self.variant, self.chosen) + ablation_runs(self.variant, self.chosen))

    def _require(self, runs: list[Run]) -> None:
        missing = [key for seed in self.variant.seeds if (key := f"pretraining {seed}") not in self.by_key]
        missing += [run.key for run in runs if run.key not in self.by_key]
        if missing:
            raise ValueError(f"{len(missing)} rows are missing, such as {missing[0]}; finish the study with `run` first.")

    def tested(self, method: str, samples: int | None = None) -> list[Run]:
        """The runs of a method on the test seeds; None for the most samples."""
        samples = samples or self.variant.samples[-1]
        runs = test_runs(self.variant, self.chosen)
        return [run for run in runs if (run.method, run.samples) == (method, samples)]

    def row(self, run: Run) -> Row:
        """The row of a run."""
        return self.by_key[run.key]

    def lost(self, run: Run, *kinds: str) -> float:
        """Points lost, the mean over the kinds of knowledge samples."""
        before = self.by_key[f"pretraining {run.seed}"]["scores"]
        return sum(before[kind] - self.row(run)["scores"][kind] for kind in kinds) / len(kinds)

    def tasks(self, run: Run) -> float:
        """Percent of the new exercises that are solved."""
        return self.row(run)["scores"]["tasks"]

    def weight(self, run: Run, kind: str) -> float | None:
        """Router weight of the knowledge group for a kind of samples; None without routers."""
        router = self.row(run).get("router")
        return router[kind]["groups"][0] if router else None


# --- statistics -------------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of it; infinite for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, mean - half, mean + half


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the means of paired values and Fieller's 95 % interval of it; infinite if the denominator may be zero.

    The interval holds the ratios q for which the paired differences numerator - q * denominator have a mean that does not
    differ from zero by Student's test.
    """
    count = len(numerators)
    a, b = sum(numerators) / count, sum(denominators) / count
    ratio = a / b if b else math.nan
    if count < 2:
        return ratio, -math.inf, math.inf
    t = stats.t.ppf(0.975, count - 1) ** 2 / count / (count - 1)
    aa = t * sum((x - a) ** 2 for x in numerators)
    bb = t * sum((y - b) ** 2 for y in denominators)
    ab = t * sum((x - a) * (y - b) for x, y in zip(numerators, denominators))
    square, middle, rest = b * b - bb, a * b - ab, a * a - aa
    if square <= 0:
        return ratio, -math.inf, math.inf
    root = math.sqrt(max(0.0, middle * middle - square * rest))
    return ratio, (middle - root) / square, (middle + root) / square


# --- tables -----------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def learning_rates(results: Results) -> str:
    """Scores of every candidate on the validation seeds, the chosen one in bold."""

    def lines() -> Iterator[list[str]]:
        candidates: dict[tuple[str, float], list[Run]] = {}
        for run in selection_runs(results.variant):
            candidates.setdefault((run.method, run.learning_rate), []).append(run)
        for (method, rate), runs in candidates.items():
            text = f"{rate:g}"
            yield [
                METHODS[method].title,
                f"**{text}**" if results.chosen[method] == rate else text,
                *(f"{_mean(results.lost(run, kind) for run in runs):.1f}" for kind in KINDS),
                f"{_mean(results.tasks(run) for run in runs):.1f}",
            ]

    return table(["method", "learning rate", "questions lost", "statements lost", "tasks"], lines())


def methods(results: Results) -> str:
    """The main result: every method on the test seeds, with the most samples."""
    base = results.tested(BASELINE)

    def lines() -> Iterator[list[str]]:
        for method in results.variant.methods:
            runs = results.tested(method)
            cells = [METHODS[method].title, f"{results.row(runs[0])['trainable'] / 1000:.0f} k", f"{results.chosen[method]:g}"]
            cells += [_interval(mean_interval([results.lost(run, kind) for run in runs])) for kind in KINDS]
            cells.append(_interval(mean_interval([results.tasks(run) for run in runs])))
            for kind in KINDS:
                losses = [[results.lost(run, kind) for run in compared] for compared in (runs, base)]
                cells.append("1" if method == BASELINE else _interval(ratio_interval(*losses), ".2f"))
            gains = [results.tasks(run) - results.tasks(other) for run, other in zip(runs, base)]
            cells.append("0" if method == BASELINE else _interval(mean_interval(gains), "+.1f"))
            yield cells

    header = ["method", "parameters", "learning rate", "questions lost", "statements lost", "tasks"]
    return table([*header, "questions lost / LoRA's", "statements lost / LoRA's", "tasks - LoRA's"], lines())


def bar(results: Results) -> str:
    """Which mixtures lose at most `BAR` of what the baseline loses, in both kinds, and solve no fewer exercises."""
    base, met = results.tested(BASELINE), []
    for method in results.variant.methods:
        runs = results.tested(method)
        if METHODS[method].kind == "loramoe":
            ratios = [
                ratio_interval([results.lost(run, kind) for run in runs], [results.lost(run, kind) for run in base])
                for kind in KINDS
            ]
            gain = _mean(results.tasks(run) for run in runs) - _mean(results.tasks(run) for run in base)
            if all(ratio <= BAR for ratio, _, _ in ratios) and gain >= 0:
                certain = "" if all(high <= BAR for _, _, high in ratios) else " (an interval reaches above the bar)"
                met.append(METHODS[method].title + certain)
    return f"Bar: at most {BAR} of LoRA's loss in both kinds, tasks not below LoRA's. Met by: {'; '.join(met) or 'none'}."


def growth(results: Results) -> str:
    """Some methods with growing data on the test seeds."""

    def cells(method: str, samples: int) -> str:
        runs = results.tested(method, samples)
        lost = [_mean(results.lost(run, kind) for run in runs) for kind in KINDS]
        return f"{lost[0]:.1f} / {lost[1]:.1f} / {_mean(results.tasks(run) for run in runs):.1f}"

    sizes = results.variant.samples
    lines = ([METHODS[method].title, *(cells(method, samples) for samples in sizes)] for method in results.variant.growth)
    return table(["method", *(f"{samples} samples" for samples in sizes)], lines)


def routing(results: Results) -> str:
    """Where each mixture's routers send the samples."""

    def lines() -> Iterator[list[str]]:
        for method in results.variant.methods:
            if METHODS[method].kind == "loramoe":
                runs = results.tested(method)
                means = (_mean(results.weight(run, kind) for run in runs) for kind in (*KINDS, "tasks"))
                yield [METHODS[method].title, *(f"{mean:.2f}" for mean in means)]

    return table(["weight on the knowledge group", "questions", "statements", "tasks"], lines())


def linears(results: Results, method: str) -> str:
    """The same by linear, for one mixture."""
    rows = [results.row(run)["router"] for run in results.tested(method)]

    def lines() -> Iterator[list[str]]:
        for layer in rows[0]["questions"]["layers"]:
            means = (_mean(router[kind]["layers"][layer][0] for router in rows) for kind in (*KINDS, "tasks"))
            yield [layer.removeprefix("model."), *(f"{mean:.2f}" for mean in means)]

    return table([METHODS[method].title, "questions", "statements", "tasks"], lines())


def tasks(results: Results) -> str:
    """Every task of every method on the test seeds."""

    def cell(method: str, task: str) -> str:
        scores = [results.row(run)["scores"]["by_task"] for run in results.tested(method)]
        drawn = [by_task[task] for by_task in scores if task in by_task]
        return f"{_mean(drawn):.0f}" if drawn else "-"

    lines = ([METHODS[method].title, *(cell(method, task) for task in TASKS)] for method in results.variant.methods)
    return table(["method", *TASKS], lines)


def ablation(results: Results, header: Sequence[str], select: Callable[[Run], Sequence[str] | None]) -> str:
    """Ablation runs whose first cells `select` gives (None leaves a run out), averaged over the validation seeds."""
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in ablation_runs(results.variant, results.chosen):
        if (cells := select(run)) is not None:
            grouped.setdefault(tuple(cells), []).append(run)

    def lines() -> Iterator[list[str]]:
        for cells, runs in grouped.items():
            lost = [f"{_mean(results.lost(run, kind) for run in runs):.1f}" for kind in KINDS]
            weights = [[results.weight(run, kind) for run in runs] for kind in ("questions", "tasks")]
            text = [f"{_mean(found):.2f}" if None not in found else "-" for found in weights]
            yield [*cells, *lost, f"{_mean(results.tasks(run) for run in runs):.1f}", *text]

    columns = ["questions lost", "statements lost", "tasks", "weight, questions", "weight, tasks"]
    return table([*header, *columns], lines())


def _grid_cells(run: Run) -> list[str] | None:
    options = {**METHODS[run.method].options, **run.options}
    if (
        run.replay != REPLAY
        or METHODS[run.method].kind != "loramoe"
        or set(run.options) - {"balance_delta", "balance_loss_weight"}
    ):
        return None
    title = "null experts" if "null_groups" in options else "LoRA experts in both groups"
    return [title, f"{options['balance_delta']:g}", f"{options['balance_loss_weight']:g}"]


def _expert_cells(run: Run) -> list[str] | None:
    options = {**METHODS["null"].options, **run.options}
    if run.method != "null" or run.replay != REPLAY or set(run.options) & {"balance_delta", "balance_loss_weight"}:
        return None
    null, others = options.get("expert_groups") or [options["num_experts"] // 2] * 2
    return [str(null), str(others), str(options["r"])]


def _replay_cells(run: Run) -> list[str] | None:
    return None if run.options else [METHODS[run.method].title, f"{run.replay:.0%}"]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _interval(values: tuple[float, float, float], form: str = ".1f") -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


# --- figures ----------------------------------------------------------------------------------------------------------


def frontier_records(results: Results) -> list[dict[str, Any]]:
    """Every method on the test seeds, with 95 % intervals, for `plot_frontier`."""
    records = []
    for method in results.variant.methods:
        runs = results.tested(method)
        record: dict[str, Any] = {"label": METHODS[method].title, "series": METHODS[method].title}
        for name, values in (
            ("downstream", [results.tasks(run) for run in runs]),
            ("retention", [100 - results.lost(run, *KINDS) for run in runs]),
        ):
            record[name], record[f"{name}_low"], record[f"{name}_high"] = mean_interval(values)
        records.append(record)
    return records


def plot_learning_rates(results: Results, path: Path) -> None:
    """What methods keep and learn with each learning rate, on the validation seeds; mixtures that look alike are left out."""
    records = []
    for method in (name for name in CURVES if name in results.variant.methods):
        for rate in results.variant.candidates(method):
            runs = [r for r in selection_runs(results.variant) if (r.method, r.learning_rate) == (method, rate)]
            kept, solved = 100 - _mean(results.lost(run, *KINDS) for run in runs), _mean(results.tasks(run) for run in runs)
            records.append({"label": f"{rate:g}", "series": METHODS[method].title, "downstream": solved, "retention": kept})
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
                shift = 1 + 0.03 * (number - len(results.variant.growth) / 2)  # so that the bars do not hide each other
                errors = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
                points = [size * shift for size in sizes]
                panel.errorbar(points, means, errors, label=METHODS[method].title, capsize=2, **style(number))
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set_xlabel("fine-tuning samples")
            panel.set_title(title, fontsize="medium")
        add_legend(figure, *panels[0].get_legend_handles_labels())


# --- the whole --------------------------------------------------------------------------------------------------------


def write_report(rows: Sequence[Row], output: Path) -> str:
    """Write `report.md` and its figures.

    Returns:
        The main table and whether the bar is met.

    Raises:
        ValueError: the rows are not all rows of one variant.
    """
    results = Results(rows)
    variant, newest = results.variant, max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    hours = sum(row["seconds"]["all"] for row in rows) / 3600
    seeds = f"{len(variant.test_seeds)} test seeds ({', '.join(map(str, variant.test_seeds))})"
    validation = f"{len(variant.validation_seeds)} validation seeds ({', '.join(map(str, variant.validation_seeds))})"
    main = f"{methods(results)}\n\n{bar(results)}"
    sections = {
        f"Methods: {variant.samples[-1]} samples, {seeds}, mean and 95 % interval": main,
        f"Growing data: questions lost / statements lost / tasks, {seeds}": growth(results),
        f"Learning rates: {variant.samples[-1]} samples, {validation}": learning_rates(results),
        f"Where the routers send the samples, {seeds}": "\n\n".join([routing(results), linears(results, "null")]),
        f"Balancing: {variant.ablation_samples} samples, {validation}": ablation(
            results, ["knowledge group", "delta", "beta"], _grid_cells
        ),
        f"Experts: {variant.ablation_samples} samples, {validation}": ablation(
            results, ["null experts", "LoRA experts", "r"], _expert_cells
        ),
        f"Replay: {variant.ablation_samples} samples, {validation}": ablation(results, ["method", "replay"], _replay_cells),
        f"Tasks: percent solved, {seeds}": tasks(results),
    }
    text = f"# Knowledge retention, variant {variant.name}\n\n"
    text += f"{len(rows)} rows, {hours:.2f} hours of computing ({newest['device']}); {newest['date']}; {versions}.\n"
    text += "".join(f"\n## {title}\n\n{section}\n" for title, section in sections.items())
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")
    for suffix in ("png", "svg"):
        plot_frontier(frontier_records(results), output / f"frontier.{suffix}")
        plot_learning_rates(results, output / f"learning-rates.{suffix}")
        plot_growth(results, output / f"growth.{suffix}")
    return main
