"""From the rows of a study to its tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .figures import frontier_records, plot_frontier, plot_growth, plot_learning_rates
from .intervals import mean_interval, ratio_interval
from .protocol import BASELINE, METHODS, RECIPE, REPLAY, Run, ablation_runs, overall_score
from .results import KINDS, Results, Row, mean
from .world import TASKS


BAR = 0.45  # of the points that the baseline loses
LOST = [f"{kind} lost" for kind in KINDS]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; without lines, nothing."""
    lines = list(lines)
    rows = (header, ["---"] * len(header), *lines) if lines else ()
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# --- the main result


def methods(results: Results) -> str:
    """Every method on the test seeds, with the most samples."""
    base = results.tested(BASELINE)

    def lines() -> Iterator[list[str]]:
        before = mean(results.before(run)["tasks"] for run in base)
        yield ["before fine-tuning", "", "", "", "", f"{before:.1f}", "", "", ""]
        for method in results.variant.methods:
            runs = results.tested(method)
            cells = [
                METHODS[method].title,
                f"{results.row(runs[0])['trainable'] / 1000:.0f} k",
                f"{results.chosen[method]:g}",
            ]
            cells += [_interval(mean_interval([results.lost(run, kind) for run in runs])) for kind in KINDS]
            cells.append(_interval(mean_interval([results.tasks(run) for run in runs])))
            if method == BASELINE:
                yield [*cells, "1", "1", "0"]
            else:
                ratios, gain = _compared(results, method)
                yield [*cells, *(_interval(ratio, ".2f") for ratio in ratios), _interval(gain, "+.1f")]

    header = ["method", "parameters", "learning rate", *LOST, "tasks"]
    return table([*header, *(f"{kind} lost / LoRA's" for kind in KINDS), "tasks - LoRA's"], lines())


def bar(results: Results) -> str:
    """Whether the recipe loses at most `BAR` of what the baseline loses, in both kinds, and solves no fewer exercises."""
    meets = {method for method in results.variant.methods if method != BASELINE and _meets(results, method)}
    ratios, (_, least_gain, _) = _compared(results, RECIPE)
    doubts = [f"the interval of {kind} reaches above {BAR}" for kind, (_, _, high) in zip(KINDS, ratios) if high > BAR]
    doubts += ["the interval of the tasks reaches below LoRA's"] if least_gain < 0 else []
    others = [METHODS[method].title for method in results.variant.methods if method in meets - {RECIPE}]
    verdict = "met" if RECIPE in meets else "missed"
    if doubts:
        verdict += f" ({', '.join(doubts)})"
    return (
        f"Bar: at most {BAR} of LoRA's loss in both kinds, tasks not below LoRA's. "
        f"{METHODS[RECIPE].title.capitalize()}: {verdict}. Other methods that would meet it: "
        f"{'; '.join(others) or 'none'}."
    )


def _meets(results: Results, method: str) -> bool:
    runs, base = results.tested(method), results.tested(BASELINE)
    kept = all(
        mean(results.lost(run, kind) for run in runs) <= BAR * mean(results.lost(run, kind) for run in base)
        for kind in KINDS
    )
    return kept and mean(map(results.tasks, runs)) >= mean(map(results.tasks, base))


def _compared(results: Results, method: str) -> tuple[list[tuple[float, float, float]], tuple[float, float, float]]:
    """Ratios of what is lost to what the baseline loses, and difference in the tasks, over the test seeds."""
    runs, base = results.tested(method), results.tested(BASELINE)
    ratios = [
        ratio_interval([results.lost(run, kind) for run in runs], [results.lost(run, kind) for run in base])
        for kind in KINDS
    ]
    return ratios, mean_interval([results.tasks(run) - results.tasks(other) for run, other in zip(runs, base)])


# --- tables


def growth(results: Results) -> str:
    """Some methods with growing data on the test seeds."""

    def cell(method: str, samples: int) -> str:
        return " / ".join(_scores(results, results.tested(method, samples)))

    sizes = results.variant.samples
    lines = (
        [METHODS[method].title, *(cell(method, samples) for samples in sizes)] for method in results.variant.growth
    )
    return table(["method", *(f"{samples} samples" for samples in sizes)], lines)


def learning_rates(results: Results) -> str:
    """Scores of every candidate on the validation seeds, the chosen one in bold.

    With a note where it is at the edge.
    """

    def lines() -> Iterator[list[str]]:
        for method in results.variant.methods:
            candidates, chosen = results.selection(method), results.chosen[method]
            for rate, runs in candidates.items():
                edge = " (edge)" if len(candidates) > 1 and rate in (min(candidates), max(candidates)) else ""
                overall = mean(overall_score(results.row(run)["scores"]) for run in runs)
                shown = f"**{rate:g}**{edge}" if rate == chosen else f"{rate:g}"
                yield [METHODS[method].title, shown, *_scores(results, runs), f"{overall:.1f}"]

    return table(["method", "learning rate", *LOST, "tasks", "(knowledge + tasks) / 2"], lines())


def baseline_rates(results: Results) -> str:
    """The recipe against each learning rate of the baseline: its own rate is chosen for each as for the baseline's."""
    recipe = results.selection(RECIPE)

    def lines() -> Iterator[list[str]]:
        for rate, base in results.selection(BASELINE).items():
            wanted = mean(map(results.tasks, base))
            enough = [other for other, runs in recipe.items() if mean(map(results.tasks, runs)) >= wanted]
            if enough:
                best = max(enough, key=lambda other: mean(map(results.kept, recipe[other])))
                lost, lost_by_base = (mean(results.lost(run, *KINDS) for run in runs) for runs in (recipe[best], base))
                ratio = f"{lost / lost_by_base:.2f}" if lost_by_base > 0 else "-"
                yield [f"{rate:g}", *_scores(results, base), f"{best:g}", *_scores(results, recipe[best]), ratio]
            else:
                yield [f"{rate:g}", *_scores(results, base), "none solves as many", "", "", "", ""]

    columns = [*LOST, "tasks"]
    return table(["LoRA's rate", *columns, "the recipe's rate", *columns, "lost / LoRA's"], lines())


def routing(results: Results) -> str:
    """Where each mixture's routers send the samples."""

    def lines() -> Iterator[list[str]]:
        for method in results.variant.methods:
            if METHODS[method].kind == "loramoe":
                runs = results.tested(method)
                means = (mean(results.weight(run, kind) for run in runs) for kind in (*KINDS, "tasks"))
                yield [METHODS[method].title, *(f"{weight:.2f}" for weight in means)]

    return table(["weight on the knowledge group", *KINDS, "tasks"], lines())


def linears(results: Results) -> str:
    """The same by linear, for the recipe."""
    rows = [results.row(run)["router"] for run in results.tested(RECIPE)]

    def lines() -> Iterator[list[str]]:
        for layer in rows[0]["questions"]["layers"]:
            means = (mean(router[kind]["layers"][layer][0] for router in rows) for kind in (*KINDS, "tasks"))
            yield [layer.removeprefix("model."), *(f"{weight:.2f}" for weight in means)]

    return table([METHODS[RECIPE].title, *KINDS, "tasks"], lines())


def tasks(results: Results) -> str:
    """Every task of every method on the test seeds."""

    def cells(title: str, scores: list[Row]) -> list[str]:
        drawn = ([by_task[task] for row in scores if task in (by_task := row["by_task"])] for task in TASKS)
        return [title, *(f"{mean(solved):.0f}" if solved else "-" for solved in drawn)]

    def lines() -> Iterator[list[str]]:
        yield cells("before fine-tuning", [results.before(run) for run in results.tested(BASELINE)])
        for method in results.variant.methods:
            yield cells(METHODS[method].title, [results.row(run)["scores"] for run in results.tested(method)])

    return table(["method", *TASKS], lines())


def ablation(results: Results, header: Sequence[str], select: Callable[[Run], Sequence[str] | None]) -> str:
    """Ablation runs whose first cells `select` gives (None leaves a run out), averaged over the validation seeds."""
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in ablation_runs(results.variant, results.chosen):
        if (cells := select(run)) is not None:
            grouped.setdefault((*cells, f"{run.learning_rate:g}"), []).append(run)

    def lines() -> Iterator[list[str]]:
        for cells, runs in grouped.items():
            weights = [[results.weight(run, kind) for run in runs] for kind in ("questions", "tasks")]
            text = [f"{mean(found):.2f}" if None not in found else "-" for found in weights]
            yield [*cells, *_scores(results, runs), *text]

    return table([*header, "learning rate", *LOST, "tasks", "weight, questions", "weight, tasks"], lines())


def _grid_cells(run: Run) -> list[str] | None:
    options = {**METHODS[run.method].options, **run.options}
    varied = set(run.options) <= {"balance_delta", "balance_loss_weight"} and METHODS[run.method].kind == "loramoe"
    if run.replay != REPLAY or not varied:
        return None
    title = "null experts" if "null_groups" in options else "LoRA experts in both groups"
    return [title, f"{options['balance_delta']:g}", f"{options['balance_loss_weight']:g}"]


def _expert_cells(run: Run) -> list[str] | None:
    if run.method != RECIPE or run.replay != REPLAY or set(run.options) & {"balance_delta", "balance_loss_weight"}:
        return None
    options = {**METHODS[RECIPE].options, **run.options}
    null, others = options.get("expert_groups") or [options["num_experts"] // 2] * 2
    return [str(null), str(others), str(options["r"])]


def _replay_cells(run: Run) -> list[str] | None:
    return None if run.options else [METHODS[run.method].title, f"{run.replay:.0%}"]


def _scores(results: Results, runs: list[Run]) -> list[str]:
    """Means of questions lost, statements lost and tasks."""
    return [f"{mean(results.lost(run, kind) for run in runs):.1f}" for kind in KINDS] + [
        f"{mean(map(results.tasks, runs)):.1f}"
    ]


def _interval(values: tuple[float, float, float], form: str = ".1f") -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]" if math.isfinite(values[1]) else mean


# --- the whole


def write_report(rows: Sequence[Row], output: Path) -> str:
    """Write `report.md` and its figures.

    Returns:
        The main table and whether the bar is met.

    Raises:
        ValueError: the rows are not all rows of one variant.
    """
    results = Results(rows)
    variant, main = results.variant, f"{methods(results)}\n\n{bar(results)}"
    test = f"{len(variant.test_seeds)} test seeds ({', '.join(map(str, variant.test_seeds))})"
    validation = f"{len(variant.validation_seeds)} validation seeds ({', '.join(map(str, variant.validation_seeds))})"
    most, fewer = f"{variant.samples[-1]} samples", f"{variant.ablation_samples} samples"
    sections = {
        f"Methods: {most}, {test}, mean and 95 % interval": main,
        f"Growing data: questions lost / statements lost / tasks, {test}": growth(results),
        f"Learning rates: {most}, {validation}": learning_rates(results),
        f"The recipe against each learning rate of LoRA: {most}, {validation}": baseline_rates(results),
        f"Where the routers send the samples: {most}, {test}": f"{routing(results)}\n\n{linears(results)}",
        f"Balancing: {fewer}, {validation}": ablation(results, ["knowledge group", "delta", "beta"], _grid_cells),
        f"Experts: {fewer}, {validation}": ablation(results, ["null experts", "LoRA experts", "r"], _expert_cells),
        f"Replay: {fewer}, {validation}": ablation(results, ["method", "replay"], _replay_cells),
        f"Tasks: percent solved, {most}, {test}": tasks(results),
    }
    made = sorted({f"{row['date']}, {row['device']}: {_versions(row)}" for row in rows})
    minutes = sum(row["seconds"]["all"] for row in rows) / 60
    text = f"# Knowledge retention, variant {variant.name}\n\n{variant.about}\n\n{len(rows)} rows, {minutes:.0f} minutes of computing, all processes "
    text += f"together. {'; '.join(made)}.\n"
    text += "".join(f"\n## {title}\n\n{section}\n" for title, section in sections.items() if section)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")
    plot_frontier(frontier_records(results), output / "frontier.png")
    plot_learning_rates(results, output / "learning-rates.png")
    if variant.growth:
        plot_growth(results, output / "growth.png")
    return main


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())
