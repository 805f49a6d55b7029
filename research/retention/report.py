"""`report.md` and a figure from the rows of a study."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..palette import COLOURS, RECOMMENDED
from ..toy.intervals import mean_interval, ratio_interval
from .methods import METHODS, Run


Row = dict[str, Any]
Measure = Callable[[Row, Row], float]
MATCHING = 3.0  # points of tasks solved
OURS = ("retain", "retain, kl")


def rise(row: Row, base: Row) -> float:
    """How much more loss the fine-tuned model has on ordinary text, nats per token."""
    return row["scores"]["text"]["loss"] - base["scores"]["text"]["loss"]


def rise_of_kind(kind: str) -> Measure:
    """The same for the texts of one kind."""
    return lambda row, base: row["scores"]["text"]["loss_by_kind"][kind] - base["scores"]["text"]["loss_by_kind"][kind]


def divergence(row: Row, base: Row) -> float:
    """How much more loss the model has on answers sampled from the base model: an estimate of KL(base || model)."""
    if "request" not in row["scores"]:
        return float("nan")
    return row["scores"]["request"]["loss"] - base["scores"]["request"]["loss"]


def solved(row: Row, base: Row) -> float:
    """Percent of the tasks' new items that are solved."""
    return percent(row["scores"]["task"]["greedy"])


def task_loss(row: Row, base: Row) -> float:
    """The loss on the tasks' new items, nats per token."""
    return row["scores"]["task"]["loss"]


def kept(form: str, how: str) -> Measure:
    """Percent of the facts that the base model got right which the fine-tuned model still gets right."""

    def measure(row: Row, base: Row) -> float:
        before, after = base["scores"][form][how], row["scores"][form][how]
        return percent("".join(b for a, b in zip(before, after) if a == "1"))

    return measure


def facts_ranked(row: Row, base: Row) -> float:
    """Percent of the facts, over both formats, that are still ranked right."""
    return (kept("statement", "ranked")(row, base) + kept("question", "ranked")(row, base)) / 2


def null(name: str) -> Measure:
    """Mean router weight of the first expert group."""
    return lambda row, base: row["null_weight"][name]["mean"] if row["null_weight"] else float("nan")


def percent(marks: str) -> float:
    """The share of "1" in a string, in percent."""
    return 100 * marks.count("1") / max(1, len(marks))


MEASURES: dict[str, tuple[Measure, str]] = {
    "tasks solved, %": (solved, ".1f"),
    "task loss": (task_loss, ".3f"),
    "text loss, rise": (rise, ".3f"),
    "requests, KL to the base model": (divergence, ".3f"),
    "statements ranked right, %": (kept("statement", "ranked"), ".1f"),
    "questions ranked right, %": (kept("question", "ranked"), ".1f"),
    "statements completed right, %": (kept("statement", "greedy"), ".1f"),
    "questions answered right, %": (kept("question", "greedy"), ".1f"),
    "null weight: tasks": (null("task"), ".2f"),
    "anchors": (null("anchor"), ".2f"),
    "text": (null("text"), ".2f"),
    "questions": (null("question"), ".2f"),
}

RATIOS: dict[str, Measure] = {"rise of text loss, ratio": rise, "requests, ratio": divergence}
DIFFERENCES: dict[str, tuple[Measure, str]] = {
    "rise of text loss, difference": (rise, "+.3f"),
    "requests, difference": (divergence, "+.3f"),
    "tasks solved, difference": (solved, "+.1f"),
    "task loss, difference": (task_loss, "+.3f"),
    "facts ranked right, difference": (facts_ranked, "+.1f"),
}


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of each method, by seed, in the order of the table of methods.

    A method's name is followed by its options and the number of samples, but for those that all rows have.
    """

    def options_of(row: Row) -> dict[str, Any]:
        return {"samples": row["run"].get("samples"), **row["run"]["options"]}

    of_all = set.intersection(*({*map(str, options_of(row).items())} for row in rows))
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["run"]["method"])):
        options = ", ".join(
            f"{name} {value}" for name, value in options_of(row).items() if str((name, value)) not in of_all
        )
        name = row["run"]["method"] + (f" ({options})" if options else "")
        found[name][row["run"]["seed"]] = row
    return dict(found)


def base_row(rows: Sequence[Row], trained: Row) -> Row:
    """The scores of the base model that a row's model was made from, on the same share of the items.

    Raises:
        ValueError: there is no such row.
    """
    part, quantised = trained["run"]["part"], trained["run"]["options"].get("load_in_4bit", False)
    for row in rows:
        run = row["run"]
        same = run["part"] == part and run["options"].get("load_in_4bit", False) == quantised
        if run["method"] == "base" and same:
            return row
    raise ValueError(
        f"There is no row of the method 'base' with part={part}, load_in_4bit={quantised}; run it first "
        "(--methods base)."
    )


def means_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the mean over the seeds of every measure, for each method."""
    lines = ["| method | seeds | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for name, of_seed in by_method(rows).items():
        cells = []
        for measure, style in MEASURES.values():
            mean = mean_of(rows, list(of_seed.values()), measure)
            cells.append("" if mean != mean else format(mean, style))
        lines.append(f"| {name} | {len(of_seed)} | " + " | ".join(cells) + " |")
    return lines


def pairs_table(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> list[str]:
    """Markdown: one method against others on the seeds that both have, with 95 % intervals."""
    lines = [f"| against | seeds | {' | '.join((*RATIOS, *DIFFERENCES))} |"]
    lines.append("|---" * (2 + len(RATIOS) + len(DIFFERENCES)) + "|")
    methods = by_method(rows)
    for rival in rivals:
        seeds = sorted(set(methods.get(ours, {})) & set(methods.get(rival, {})))
        if not seeds:
            continue
        pairs = [(methods[ours][seed], methods[rival][seed]) for seed in seeds]
        bases = [base_row(rows, row) for row, _ in pairs]
        cells = []
        for measure in RATIOS.values():
            ours_and_theirs = ([measure(row, base) for row, base in zip(column, bases)] for column in zip(*pairs))
            cells.append(_interval(ratio_interval(*ours_and_theirs), ".2f"))
        for measure, style in DIFFERENCES.values():
            differences = [measure(a, base) - measure(b, base) for (a, b), base in zip(pairs, bases)]
            cells.append(_interval(mean_interval(differences), style))
        lines.append(f"| {rival} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def _interval(values: tuple[float, float, float], style: str) -> str:
    if math.isnan(values[0]):  # not measured
        return ""
    return "{} ({} to {})".format(*(format(value, style) for value in values))


def matching(rows: Sequence[Row], ours: str) -> dict[str, tuple[list[Row], list[Row]]]:
    """The rivals that solve as many tasks, to within `MATCHING` points, on the seeds that both have.

    Returns:
        For each, its rows and ours, in the order of the seeds.
    """
    methods, found = by_method(rows), {}
    for name, of_seed in methods.items():
        seeds = sorted(set(of_seed) & set(methods.get(ours, {})))
        if not seeds or next(iter(of_seed.values()))["run"]["method"] in ("base", *OURS):
            continue
        theirs, own = ([methods[method][seed] for seed in seeds] for method in (name, ours))
        if mean_of(rows, theirs, solved) >= mean_of(rows, own, solved) - MATCHING:
            found[name] = theirs, own
    return found


def mean_of(rows: Sequence[Row], chosen: Sequence[Row], measure: Measure) -> float:
    """Mean of a measure over rows."""
    return sum(measure(row, base_row(rows, row)) for row in chosen) / len(chosen)


def decision_table(rows: Sequence[Row], ours: str, plain: str = "lora") -> list[str]:
    """Markdown: the conditions of the protocol."""
    rivals = matching(rows, ours)
    methods = by_method(rows)
    seeds = sorted(set(methods.get(ours, {})) & set(methods.get(plain, {})))
    if not seeds or not rivals:
        return []
    own, lora = ([methods[name][seed] for seed in seeds] for name in (ours, plain))
    rises = [[rise(row, base_row(rows, row)) for row in column] for column in (own, lora)]
    ratio, _, highest = ratio_interval(*rises)
    best = min(rivals, key=lambda name: mean_of(rows, rivals[name][0], rise))
    best_rise, own_rise = (mean_of(rows, chosen, rise) for chosen in rivals[best])
    best_facts, own_facts = (mean_of(rows, chosen, facts_ranked) for chosen in rivals[best])
    own_tasks, lora_tasks = mean_of(rows, own, solved), mean_of(rows, lora, solved)
    conditions = [
        (f"text loss rises by at most 0.2 of `{plain}`'s rise", f"{ratio:.2f}", ratio <= 0.2),
        ("the upper end of that ratio's 95 % interval is below 1/3", f"{highest:.2f}", highest < 1 / 3),
        (f"and by at most 0.5 of the best rival's, `{best}`", f"{own_rise:.3f} to {best_rise:.3f}",
         own_rise <= 0.5 * best_rise),
        (f"facts are ranked no worse than with `{best}`", f"{own_facts:.1f} to {best_facts:.1f} %",
         own_facts >= best_facts),
        (f"tasks solved are not below `{plain}`'s", f"{own_tasks:.1f} to {lora_tasks:.1f} %", own_tasks >= lora_tasks),
    ]  # fmt: skip
    return [
        f"Conditions of the protocol for `{ours}`, means over the seeds {', '.join(map(str, seeds))}.",
        f"The best rival has the smallest rise of those that solve at most {MATCHING} points fewer:",
        "",
        "| condition | found | met |",
        "|---|---|---|",
        *(f"| {condition} | {found} | {'yes' if met else 'no'} |" for condition, found, met in conditions),
        "",
    ]


def kinds_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the rise of the loss on each kind of text, mean over the seeds, for each method."""
    kinds = sorted(base_row(rows, rows[0])["scores"]["text"].get("loss_by_kind", ()))
    lines = ["| method | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, of_seed in by_method(rows).items():
        means = [mean_of(rows, list(of_seed.values()), rise_of_kind(kind)) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(format(value, ".3f") for value in means) + " |")
    return lines


def abilities_table(rows: Sequence[Row], evaluated: dict[str, Any]) -> list[str]:
    """Markdown: the accuracy on lm-eval's tasks, of the base model and of each method's saved adapters.

    Args:
        rows: of the study.
        evaluated: what `peft-loramoe evaluate --output` wrote about the adapters.
    """
    found = {
        Path(measured["adapter"] or "").name: {name: 100 * of["acc,none"] for name, of in measured["results"].items()}
        for measured in evaluated["lm_eval"]
    }
    base = found[""]  # without an adapter
    lines = ["| method | seeds | " + " | ".join(base) + " | mean, difference to the base model |"]
    lines.append("|---" * (len(base) + 3) + "|")
    lines.append("| base | | " + " | ".join(f"{value:.1f}" for value in base.values()) + " | |")
    for name, of_seed in by_method(rows).items():
        runs = [found[run] for row in of_seed.values() if (run := Run(**row["run"]).name) in found]
        if not runs:
            continue
        means = [sum(run[task] for run in runs) / len(runs) for task in base]
        changes = [(sum(run.values()) - sum(base.values())) / len(base) for run in runs]
        cells = [*(f"{value:.1f}" for value in means), _interval(mean_interval(changes), "+.1f")]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def write_report(rows: Sequence[Row], file: Path, evaluated: dict[str, Any] | None = None) -> None:
    """Write the tables to a Markdown file, and a figure beside it; `evaluated` is what `abilities_table` takes."""
    trained = [row for row in rows if row["run"]["method"] != "base"]
    versions = ", ".join(f"{package} {version}" for package, version in trained[0]["versions"].items())
    lines = [
        "# What fine-tuning costs in knowledge: SmolLM2-135M-Instruct",
        "",
        f"Written by `python -m research.retention report`; {len(trained)} runs, {versions}.",
        "",
        *means_table(rows),
        "",
    ]
    methods = by_method(rows) if len({row["run"]["seed"] for row in trained}) > 1 else {}
    for ours, of_seed in methods.items():
        run = next(iter(of_seed.values()))["run"]
        if run["method"] in OURS and "scale" not in run["options"]:
            lines += [
                f"## {ours}",
                "",
                *decision_table(rows, ours),
                f"`{ours}` against the others, over the same seeds (mean of the pairs, 95 % interval; of ratios, "
                "Fieller's):",
                "",
                *pairs_table(rows, ours, [name for name in methods if name not in (ours, "base")]),
                "",
            ]
    if evaluated:
        lines += ["## Abilities", "", "Accuracy on lm-eval's tasks of `abilities.py`, %:", ""]
        lines += [*abilities_table(rows, evaluated), ""]
    lines += ["## Kinds of text", "", "Rise of the loss on each kind, nats per token:", "", *kinds_table(rows), ""]
    lines.append(f"![Tasks solved against the rise of text loss]({file.with_suffix('.png').name})")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, file.with_suffix(".png"))


def plot(rows: Sequence[Row], file: Path) -> None:
    """Tasks solved against the rise of text loss.

    The mean of each method, or of its settings where it was not run as it is in the table of methods; a small point
    for each run; and a small circle for the mean of each other setting, with the factor beside it if what was trained
    was scaled.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    labelled: set[str] = set()
    small: dict[str, dict[str, Any]] = {}
    methods = by_method(rows)
    for name, of_seed in methods.items():
        chosen = list(of_seed.values())
        method, options = chosen[0]["run"]["method"], chosen[0]["run"]["options"]
        if method == "base":
            continue
        bases = [base_row(rows, row) for row in chosen]
        x, y = ([measure(row, base) for row, base in zip(chosen, bases)] for measure in (rise, solved))
        recommended = name in RECOMMENDED
        title = f"{method} (recommended weight)" if recommended else method
        label = title if title not in labelled else None
        labelled.add(title)
        style = {"color": COLOURS[method], "linestyle": "none", "label": label}
        as_in_table = name == method or (method not in methods and "scale" not in options)
        if not (as_in_table or recommended):  # another setting of the method
            middle = sum(x) / len(x), sum(y) / len(y)
            axes.plot(*middle, "o", markersize=5, fillstyle="none", **style)
            if "scale" in options:
                factor = f"\N{MULTIPLICATION SIGN} {options['scale']}"
                axes.annotate(factor, middle, (5, -3), textcoords="offset points", fontsize=8, color=COLOURS[method])
            small["another setting, mean"] = {"marker": "o", "markersize": 5, "fillstyle": "none"}
            continue
        if len(x) > 1:
            axes.plot(x, y, ".", markersize=6, alpha=0.5, **{**style, "label": None})
            small["one run"] = {"marker": ".", "markersize": 6, "alpha": 0.5}
        marker, size = ("*", 16) if recommended else ("o", 8)
        axes.plot(sum(x) / len(x), sum(y) / len(y), marker, markersize=size, **style)
    for label, look in small.items():
        axes.plot([], [], color="grey", linestyle="none", label=label, **look)
    axes.set_xlabel("rise of the loss on ordinary text, nats per token (left is better)")
    axes.set_ylabel("tasks solved, % (up is better)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
