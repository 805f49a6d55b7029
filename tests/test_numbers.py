"""The numbers on the pages are those of the results files, in tables and in sentences."""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import hypot
from pathlib import Path

import pytest


pytestmark = pytest.mark.version_independent

ROOT = Path(__file__).parents[1]
NUMBER = r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?(?:e-\d+)?"
RESULTS = ROOT / "research" / "retention" / "results"
RETENTION = sorted(RESULTS.glob("*.md"))
TOY = ROOT / "research" / "toy" / "results"
CPU = ROOT / "docs" / "results" / "performance.md"
BENCHMARKS = ROOT / "benchmarks" / "results"
GPU = ROOT / "docs" / "results" / "performance-gpu.md"
VLLM = ROOT / "docs" / "results" / "serving-float32.md"
DIFFERENCE = "largest difference of a log-probability"

LIGHT = "retain, kl (anchor_kl_weight 0.3)"
WITHOUT_TERM = "retain, kl (anchor_kl_weight 0.3, balance_loss_weight 0.0)"
KL = "lora+kl (anchor_kl_weight 0.3)"

Row = tuple[str, ...]


def tables(text: str) -> list[list[Row]]:
    """The tables of a page as rows of cells, the header first."""
    found = re.findall(r"(?:^ *\|.*\|\n)+", text, re.MULTILINE)
    rows = [
        [tuple(cell.strip(" *") for cell in re.split(r" *\| *", line.strip()[1:-1])) for line in table.splitlines()]
        for table in found
    ]
    return [[table[0], *table[2:]] for table in rows]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


# tables


def entries(*files: Path) -> list[set[float]]:
    """The numbers of all rows of a results page that have the same first cell, such as one method."""
    found: dict[tuple[Path, str], set[float]] = {}
    for file in files:
        for row in [row for table in tables(file.read_text(encoding="utf-8")) for row in table[1:]]:
            found.setdefault((file, row[0]), set()).update(numbers(" | ".join(row)))
    return list(found.values())


def of_json(name: str, values: Callable[[dict], set[float]]) -> list[set[float]]:
    """The numbers that `values` makes of each row of a file of benchmarks/results."""
    results = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    rows = results["rows"] if "rows" in results else [row for part in results.values() for row in part["rows"]]
    return [values(row) for row in rows]


def of_routers() -> list[set[float]]:
    rows = [json.loads(line) for line in (RESULTS / "routers.jsonl").read_text().splitlines()]
    kinds = [[kind for kind in row.values() if isinstance(kind, dict)] for row in rows]
    return [{kind["mean"] for kind in of_row if "mean" in kind} for of_row in kinds]


def serving(row: dict) -> set[float]:
    rate = row["batch"] / row["next_token"]["seconds"][1]
    ratios = {round(value, 2) for step in ("next_token", "first_token") for value in row[step]["ratio"]}
    return ratios | {round(rate, 1) if rate < 20 else round(rate)}


def dispersion(row: dict) -> set[float]:
    return {round(row[f"matched_type_{kind}"] / row[f"other_type_{kind}"], 3) for kind in (0, 1)}


# Page, a column of the table, the columns that are compared, and the numbers that a row may have.
TABLES = [
    ("README.md", "tasks solved", slice(1, None), lambda: entries(*RETENTION)),
    ("docs/evidence.md", "tasks solved", slice(1, None), lambda: entries(*RETENTION)),
    ("docs/evidence.md", "found (95 % interval)", slice(1, 2), lambda: entries(*RETENTION)),
    ("docs/evidence.md", "grammar", slice(1, None), lambda: entries(RESULTS / "third.md")),
    ("docs/evidence.md", "found in the third test", slice(1, 2), lambda: entries(RESULTS / "third.md")),
    ("docs/evidence.md", "divergence, weight 0.3", slice(1, None), lambda: entries(RESULTS / "rivals.md")),
    ("docs/choosing.md", "tasks solved", slice(1, None), lambda: entries(*RETENTION)),
    (
        "research/toy/README.md",
        "questions lost",
        slice(1, None),
        lambda: entries(TOY / "report.md", TOY / "moe/report.md"),
    ),
    ("docs/balance.md", "tasks solved", slice(1, None), lambda: entries(*RETENTION)),
    ("docs/balance.md", "importance", slice(3, None), lambda: of_json("balance_minimum.json", dispersion)),
    ("docs/balance.md", "ordinary text", slice(1, None), of_routers),
    ("docs/serving.md", "next token / LoRA's", slice(2, None), lambda: of_json("serving.json", serving)),
]


@pytest.mark.parametrize(
    "page,column,compared,allowed", TABLES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_numbers_of_tables_are_those_of_the_results(page, column, compared, allowed):
    found = [table for table in tables((ROOT / page).read_text(encoding="utf-8")) if column in table[0]]
    assert found, "the page has no such table any more"
    rows = allowed()
    for row in [row for table in found for row in table[1:]]:
        assert any(set(numbers(" | ".join(row[compared]))) <= entry for entry in rows), row


@pytest.mark.parametrize("page,benchmark", [("anchors.md", "anchors"), ("performance.md", "moe")])
def test_tables_are_those_that_the_benchmark_prints(page, benchmark):
    results = json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text())
    table = importlib.import_module(f"benchmarks.{benchmark}").table(results.get("rows", results))
    lines = [line for line in table.splitlines() if line.startswith("|")]
    shown = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    assert lines[2:] and not set(lines[2:]) - set(shown)


def test_the_tables_of_measurements_are_those_that_the_benchmarks_print(capsys):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    importlib.import_module("benchmarks.report").main(["--summary"])
    importlib.import_module("benchmarks.kernels").main(["--table"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 50 and not set(printed) - set(page.splitlines())


@pytest.mark.parametrize(("name", "page"), [("cpu", CPU), ("gpu", GPU)])
def test_the_page_of_all_measurements_is_what_the_report_prints(name, page, capsys):
    importlib.import_module("benchmarks.report").main([name])
    assert capsys.readouterr().out == page.read_text(encoding="utf-8")


# sentences


@dataclass(frozen=True)
class Cell:
    """The numbers of a cell of a results page: those of the only row that begins with `key`."""

    file: Path
    column: str
    key: Row
    section: str = ""  # how the heading above the table begins

    def __call__(self) -> list[float]:
        text = self.file.read_text(encoding="utf-8")
        if self.section:
            text = re.search(rf"^#+ {self.section}.*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)[0]
        found = [table for table in tables(text) if self.column in table[0]]
        rows = [(table[0], row) for table in found for row in table[1:] if row[: len(self.key)] == self.key]
        assert len(rows) == 1, f"{len(rows)} rows of {self}"
        return numbers(rows[0][1][rows[0][0].index(self.column)])


def retention(study: str, column: str, *key: str) -> Cell:
    return Cell(RESULTS / f"{study}.md", column, key)


def against(ours: str, column: str, rival: str, study: str = "rivals") -> Cell:
    """Of a setting of `retain` against a rival, in the second test if no other is named."""
    return Cell(RESULTS / f"{study}.md", column, (rival,), re.escape(ours))


def third_test(column: str, rival: str) -> Cell:
    """Of the default against a rival in the third test."""
    return against(LIGHT, column, rival, "third")


def fifth_test(column: str, rival: str) -> Cell:
    """Of the default against a rival of the fifth test."""
    return against(LIGHT, column, rival, "fifth")


def without_sign(cell: Cell) -> Callable[[], list[float]]:
    """By how much less: a difference and its interval, turned round."""
    return lambda: [-cell()[i] for i in (0, 2, 1)]


def toy(section: str, column: str, *key: str) -> Cell:
    return Cell(TOY / "report.md", column, key, section)


def sparse(section: str, column: str, *key: str) -> Cell:
    return Cell(TOY / "moe" / "report.md", column, key, section)


def cpu(column: str, *key: str, section: str = "") -> Callable[[], list[float]]:
    """The median, without the quantiles behind it."""
    return lambda: Cell(CPU, column, key, section)()[:1]


def peak_and_saved(method: str) -> Callable[[], list[float]]:
    return lambda: numbers(re.search(f"^{method}: saved.*", CPU.read_text(), re.MULTILINE)[0])[::-1]


def largest_difference() -> list[float]:
    ((header, *rows),) = tables(VLLM.read_text())
    return [max(float(row[header.index(DIFFERENCE)]) for row in rows)]


def spread_of_anchors() -> list[float]:
    """How far a round was from its variant's median, in per cent."""
    spread = of_json("anchors.json", lambda row: {abs(s / row["cpu_seconds"] - 1) for s in row["rounds"]})
    return [100 * max(set().union(*spread))]


def screened(**options: float) -> dict:
    """The row of `retain`, with these options, of the first screening."""
    rows = [json.loads(line) for line in (RESULTS / "screening.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["run"]["method"] == "retain" and row["run"]["options"] == options]
    return row


def null_replay() -> dict:
    rows = [json.loads(line) for line in (RESULTS / "screening.jsonl").read_text().splitlines()]
    return {row["run"]["method"]: row for row in rows}["null+replay"]


def middle_gradients() -> list[float]:
    """Norms in the middle third of the blocks after 24 steps: of A, the term's and the tasks', and of B."""
    (found,) = [step for step in null_replay()["log"]["gradients"] if step["step"] == 24]
    blocks = [found[loss][role] for role in ("A", "B") for loss in ("term", "loss")]
    return [hypot(*norms[len(norms) // 3 : 2 * len(norms) // 3]) for norms in blocks]


def null_weights_at_24(**options: float) -> list[float]:
    """Of the tasks and the anchors, in training."""
    (step,) = [step for step in screened(**options)["log"]["steps"] if step["step"] == 24]
    return [step["null_1"], step["null_0"]]


def of_router(name: str, *kinds: str) -> Callable[[], list[float]]:
    rows = [json.loads(line) for line in (RESULTS / "routers.jsonl").read_text().splitlines()]
    return lambda: [{row["name"]: row for row in rows}[name][kind]["mean"] for kind in kinds]


def million_parameters() -> list[float]:
    rows = [json.loads(line) for line in (RESULTS / "test.jsonl").read_text().splitlines()]
    return [{row["run"]["method"]: row["trainable"] / 1e6 for row in rows}[name] for name in ("lora", "retain")]


def comparisons(of: str) -> list[tuple[str, float]]:
    """Cases and ratios of the CPU targets whose name contains `of`."""
    cpu = importlib.import_module("benchmarks.rows").load("cpu")
    checked = importlib.import_module("benchmarks.targets").check({"cpu": cpu})
    return [(c.case, c.ratio) for c in checked if of in c.target and "seconds" in c.target and c.ratio is not None]


def target_ratio(case: str, other: str) -> Callable[[], list[float]]:
    """The ratio to another method that `python -m benchmarks.report --check` measures in a case."""

    def measured() -> list[float]:
        (found,) = [value for name, value in comparisons(f"seconds / {other}") if name == case]
        return [found]

    return measured


def extremes(group: str, *marks: str) -> list[float]:
    """Smallest and largest ratio of the cases of a group whose names have one of the marks in them."""
    found = [value for case, value in comparisons(f"cpu, {group}: ") if any(mark in case for mark in marks)]
    return [min(found), max(found)]


def gpu_ratio(group: str, ours: str, method: str, theirs: str) -> list[float]:
    """Of the times of LoRAMoE and another method, with these dtypes of the adapters, in the only case of a group."""
    rows = importlib.import_module("benchmarks.rows")
    (case,) = rows.groups(rows.load("gpu")["rows"])[group]
    return [rows.ratio(rows.variant(case, "loramoe", ours), rows.variant(case, method, theirs))[1]]


# Page, its words with {} in place of each number, and what gives these numbers, in order.
CLAIMS = [
    (
        "README.md",
        "takes {} of the time of PEFT's LoRA with as many parameters; with one token a small layer takes {} times",
        [
            cpu("/ PEFT LoRA", "dropout 0.05 backbone bf16", "LoRAMoE", "float32"),
            cpu("/ PEFT LoRA", "tokens 1", "LoRAMoE"),
        ],
    ),
    (
        "README.md",
        "takes {} of the time of PEFT's LoRA with bfloat16 adapters and {} with its default",
        [
            lambda dtype=dtype: gpu_ratio("training step of 8192 tokens", "float32", "lora", dtype)
            for dtype in ("bfloat16", "float32")
        ],
    ),
    ("docs/evidence.md", "have {} (LoRA) and {} million parameters", [million_parameters]),
    (
        "docs/evidence.md",
        "its loss rose by {} with LoRA, by {} with LoRA and the same anchors, and by {} with `retain`",
        [retention("third", "text loss, rise", method) for method in ("lora", KL, LIGHT)],
    ),
    (
        "docs/evidence.md",
        "{} % are solved instead of {} % ({} points, {} to +{})",
        [
            *(retention("third", "tasks solved, %", method) for method in (LIGHT, "lora")),
            third_test("tasks solved, difference", "lora"),
        ],
    ),
    ("docs/evidence.md", "in chat, `retain` drifts {} ({} to {}) as far", [third_test("requests, ratio", KL)]),
    (
        "docs/evidence.md",
        "with tasks at +{} points ({} to +{})",
        [against(LIGHT, "tasks solved, difference", "lora")],
    ),
    (
        "docs/evidence.md",
        "tasks is lower by {} ({} to {}), and the loss on ordinary text by {} ({} to {})",
        [
            without_sign(third_test(column, KL))
            for column in ("task loss, difference", "rise of text loss, difference")
        ],
    ),
    (
        "docs/evidence.md",
        "+{} points ({} to +{}), and drift in chat, {} ({} to {}), do not",
        [third_test(column, KL) for column in ("tasks solved, difference", "requests, ratio")],
    ),
    (
        "docs/evidence.md",
        "(`balance_loss_weight=0`; {} % of the tasks, text +{}, drift {})",
        [
            retention("third", column, WITHOUT_TERM)
            for column in ("tasks solved, %", "text loss, rise", "requests, KL to the base model")
        ],
    ),
    (
        "docs/evidence.md",
        "With the term, the loss on ordinary text is lower by {} ({} to {})",
        [without_sign(third_test("rise of text loss, difference", WITHOUT_TERM))],
    ),
    (
        "docs/evidence.md",
        "solved, {} points ({} to +{}), their loss, +{} ({} to +{}), and drift in chat, {} ({} to +{})",
        [third_test(f"{measure}, difference", WITHOUT_TERM) for measure in ("tasks solved", "task loss", "requests")],
    ),
    (
        "docs/evidence.md",
        "weight on ordinary text is {} with it and {} without",
        [retention("third", "text", method) for method in (LIGHT, WITHOUT_TERM)],
    ),
    (
        "docs/evidence.md",
        "in the second test, the drift was {} ({} to {})",
        [against("retain, kl", "requests, ratio", "lora+kl")],
    ),
    (
        "docs/evidence.md",
        "solves as many tasks ({} points, {} to +{}); the mixture's drift in chat is {} ({} to {}) of LoRA's, and",
        [against("retain, kl", column, "lora+kl") for column in ("tasks solved, difference", "requests, ratio")],
    ),
    (
        "docs/evidence.md",
        "its task loss is lower ({} against {}).",
        [retention("rivals", "task loss", method) for method in ("retain, kl", "lora+kl")],
    ),
    (
        "docs/evidence.md",
        "solves {} points more than `retain` with weight 0.3 ({} to +{})",
        [lambda: [-against(LIGHT, "tasks solved, difference", "full (scale 0.75)")()[i] for i in (0, 2, 1)]],
    ),
    (
        "docs/evidence.md",
        "drifts five times as far in chat (ratio {}, {} to {}).",
        [against(LIGHT, "requests, ratio", "full (scale 0.75)")],
    ),
    (
        "research/toy/README.md",
        "learns far more ({} % on the validation seeds) and loses {} and {} points.",
        [
            toy("Learning rates", column, "full fine-tuning", "0.001")
            for column in ("tasks", "questions lost", "statements lost")
        ],
    ),
    (
        "research/toy/README.md",
        "(validation seeds) it lost {} points of the questions",
        [toy("Balancing", "questions lost", "LoRA experts in both groups", "0.9", "0.3")],
    ),
    (
        "research/toy/README.md",
        "weight is {} on questions, {} on statements, which the routers never saw, and {} on tasks.",
        [
            toy("Where the routers", column, "null experts, delta 0.7")
            for column in ("questions", "statements", "tasks")
        ],
    ),
    (
        "research/toy/README.md",
        "they lost {} points of the questions. The cause",
        [lambda: toy("Methods", "questions lost", "null experts, delta 0.7, attention too")()[:1]],
    ),
    ("research/toy/README.md", "tasks ({} before)", [sparse("Methods", "tasks", "before fine-tuning")]),
    (
        "research/toy/README.md",
        "the mixture lost {} [{}, {}] and {} [{}, {}] times as much, and solved {} points more [{}, +{}].",
        [
            sparse("Methods", column, "null experts, delta 0.7")
            for column in ("questions lost / LoRA's", "statements lost / LoRA's", "tasks - LoRA's")
        ],
    ),
    (
        "research/toy/README.md",
        "{} % of the tasks for {} / {} points (rate 0.002) against LoRA's {} % for {} / {} (0.016).",
        [
            sparse("Learning rates", column, *key)
            for key in (("null experts, delta 0.7", "0.002"), ("LoRA", "0.016"))
            for column in ("tasks", "questions lost", "statements lost")
        ],
    ),
    (
        "research/toy/README.md",
        "with any rate that was tried, the mixture up to {} %",
        [sparse("Learning rates", "tasks", "null experts, delta 0.7", "0.008")],
    ),
    (
        "docs/performance.md",
        "at 1.00 of LoRA | {} | parity; quantiles {} and {} |",
        [
            target_ratio("dropout 0.0 backbone bf16; bf16 adapters", "PEFT LoRA"),
            lambda: Cell(CPU, "/ PEFT LoRA", ("dropout 0.0 backbone bf16", "LoRAMoE", "bf16"))()[1:],
        ],
    ),
    (
        "docs/performance.md",
        "at 0.60 of the expert loop | {} |",
        [target_ratio("dropout 0.0 backbone bf16; bf16 adapters", "expert loop")],
    ),
    (
        "docs/choosing.md",
        "loss on ordinary text by {} instead of {}, at {} instead of {} % of the tasks",
        [
            retention("third", column, method)
            for column in ("text loss, rise", "tasks solved, %")
            for method in (KL, "lora")
        ],
    ),
    (
        "docs/choosing.md",
        "on tasks is {} instead of LoRA's {}, {} instead of {} % are solved, and the drift in chat is {} instead of {};",
        [
            retention("third", column, method)
            for column in ("task loss", "tasks solved, %", "requests, KL to the base model")
            for method in (LIGHT, KL)
        ],
    ),
    (
        "docs/choosing.md",
        "then solved {} instead of {} % of the tasks in one test, and {} instead of {} % in another",
        [
            retention(study, "tasks solved, %", name)
            for study in ("third", "rivals")
            for name in ("lora (scale 0.75)", "lora")
        ],
    ),
    (
        "docs/evidence.md",
        "LoRA's rise is {}, the default's {}, and both solve {} % of the tasks (",
        [
            retention("frontier", "text loss, rise", "lora (samples 10240)"),
            retention("frontier", "text loss, rise", "retain, kl (samples 10240, anchor_kl_weight 0.3)"),
            retention("frontier", "tasks solved, %", "lora (samples 10240)"),
        ],
    ),
    (
        "docs/evidence.md",
        "forget much more**: {} and {}; CorDA with the same anchors and divergence forgets {} (",
        [
            retention("fifth", "text loss, rise", name)
            for name in ("osf (lr 3e-05)", "mica (lr 0.001)", "corda+kl (anchor_kl_weight 0.3)")
        ],
    ),
    (
        "docs/evidence.md",
        "is lower by {} ({} to {}), at {} points of the tasks ({} to +{}); against MiCA by {} ({} to {}), at +{} points ({} to +{}).",
        [
            measured
            for name in ("osf (lr 3e-05)", "mica (lr 0.001)")
            for measured in (
                without_sign(fifth_test("rise of text loss, difference", name)),
                fifth_test("tasks solved, difference", name),
            )
        ],
    ),
    (
        "docs/evidence.md",
        "tasks {} points ({} to +{}), their loss +{} ({} to +{}), rise of text loss +{} ({} to +{}), drift in chat {} ({} to {}) as far.",
        [
            fifth_test(column, "full+kl (anchor_kl_weight 1.0)")
            for column in (
                "tasks solved, difference",
                "task loss, difference",
                "rise of text loss, difference",
                "requests, ratio",
            )
        ],
    ),
    (
        "docs/evidence.md",
        "is lower by {} ({} to {}), and it drifts {} ({} to {}) as far in chat, at {} points of the tasks ({} to +{}).",
        [
            without_sign(fifth_test("rise of text loss, difference", "corda+kl (anchor_kl_weight 0.3)")),
            fifth_test("requests, ratio", "corda+kl (anchor_kl_weight 0.3)"),
            fifth_test("tasks solved, difference", "corda+kl (anchor_kl_weight 0.3)"),
        ],
    ),
    (
        "docs/choosing.md",
        "does as well as the mixture: {} % of the tasks, {} on ordinary text, a drift in chat of {} (",
        [
            retention("fifth", column, "full+kl (anchor_kl_weight 1.0)")
            for column in ("tasks solved, %", "text loss, rise", "requests, KL to the base model")
        ],
    ),
    (
        "docs/choosing.md",
        "solves {} % of the tasks, raises the loss on ordinary text by {} and drifts further in chat, {} (",
        [
            retention("rivals", column, "full (scale 0.75)")
            for column in ("tasks solved, %", "text loss, rise", "requests, KL to the base model")
        ],
    ),
    (
        "docs/performance.md",
        "takes {} times the frozen layer (target 1.65)",
        [target_ratio("experts 64; bf16 adapters", "frozen base")],
    ),
    (
        "docs/performance.md",
        "few tokens at 1.2 of LoRA | {} to {} with 1 and 4 tokens",
        [lambda: extremes("small inputs", " tokens 1;", " tokens 4;")],
    ),
    ("docs/performance.md", "at 1.00 of LoRA | {} to {} | the same |", [lambda: extremes("decoding", "cache")]),
    (
        "docs/performance.md",
        "with one token takes {} ms for forward and backward, LoRA's {} ms.",
        [cpu("ms (20-80 %)", "tokens 1", "LoRAMoE"), cpu("ms (20-80 %)", "tokens 1", "PEFT LoRA")],
    ),
    (
        "docs/performance.md",
        "the training step above takes {} times LoRA's time",
        [cpu("/ PEFT LoRA", "", "LoRAMoE", "float32", section="compiled training step")],
    ),
    (
        "docs/performance.md",
        "would take at {} TB/s",
        [lambda: [json.loads((BENCHMARKS / "kernels.json").read_text())["about"]["bytes_per_second"] / 1e12]],
    ),
    (
        "docs/performance.md",
        "with 64 tokens took {} ms of host time on this machine, LoRA's {}.",
        [Cell(GPU, "CPU ms", ("tokens 64", method)) for method in ("LoRAMoE", "PEFT LoRA")],
    ),
    (
        "docs/performance.md",
        "in float32, too, a layer takes {} times LoRA's time",
        [
            lambda: Cell(
                GPU,
                "/ PEFT LoRA",
                ("dropout 0.05 backbone float32 d 4096->11008 tokens 4096", "LoRAMoE", "float32"),
            )()[:1]
        ],
    ),
    (
        "docs/performance.md",
        "moe_peft's layers take {} times the time of the frozen base, mixlora's {}.",
        [
            lambda name=name: Cell(GPU, "/ frozen base", ("", name), "training step of a small model")()[:1]
            for name in ("moe_peft", "mixlora")
        ],
    ),
    ("docs/performance.md", "{} bytes per token at 128 -> 344, of which {} are saved", [peak_and_saved("LoRAMoE")]),
    ("docs/performance.md", "LoRA's are {} and {}.", [peak_and_saved("PEFT LoRA")]),
    ("docs/anchors.md", "steps of one kind differed by up to {} % from their median", [spread_of_anchors]),
    (
        "docs/serving.md",
        "The log-probabilities of the two engines are {} apart at most, and those of the base model alone {}.",
        [
            largest_difference,
            Cell(VLLM, DIFFERENCE, ("none",)),
        ],
    ),
    (
        "docs/balance.md",
        "deep model: {} at the start, where the task loss is {} and",
        [lambda: [null_replay()["log"]["steps"][0][name] for name in ("term", "task")]],
    ),
    ("docs/balance.md", "has the norm {}, the task loss's {}; with respect to B, {} and {}.", [middle_gradients]),
    (
        "docs/balance.md",
        "That fine-tuning raised the loss on ordinary text by {},",
        [retention("screening", "text loss, rise", "null+replay")],
    ),
    (
        "docs/balance.md",
        "the term that is not detached did as well ({}).",
        [retention("screening", "text loss, rise", "retain (balance_detach False)")],
    ),
    (
        "docs/balance.md",
        "as many anchors scattered at random, the loss rose by {} instead of {}.",
        [
            retention("screening", "text loss, rise", "retain (anchor_schedule shuffled)"),
            retention("screening", "text loss, rise", "retain"),
        ],
    ),
    (
        "docs/balance.md",
        "after 24 of 33 steps is {} on tasks and {} on anchors; with ten times the rate, {} and {}.",
        [lambda: null_weights_at_24(router_lr_multiplier=1), null_weights_at_24],
    ),
    (
        "docs/balance.md",
        "hardly changed these weights: {} on tasks and {} on ordinary",
        [of_router("delta .9", "task", "text")],
    ),
    ("docs/balance.md", "experts' rate ({} on text, {} on tasks)", [of_router("normalised x, x1", "text", "task")]),
    (
        "docs/balance.md",
        "separate the types further ({} and {} on text)",
        [
            retention("screening", "text", f"retain ({options})")
            for options in ("term class_equal", "router_lr_multiplier 30, term cross_entropy")
        ],
    ),
    (
        "docs/upstream.md",
        "a log-probability that is {} off",
        [lambda: numbers(re.search(r"and by (\S+) in a batch with a plain LoRA only", VLLM.read_text())[1])],
    ),
    (
        "docs/compatibility.md",
        "{} % of the tasks instead of {} %",
        [
            retention("rivals-screening", "tasks solved, %", "retain (lora_alpha 384, r 24, target_modules ['mlp'])"),
            retention("rivals-screening", "tasks solved, %", "retain"),
        ],
    ),
]


def pattern(words: str) -> str:
    return re.escape(words).replace(r"\{\}", r"(-?\d+(?:\.\d+)?(?:e-\d+)?)")


def as_printed(value: float, text: str) -> float:
    """The value as precise as the text."""
    digits, _, exponent = text.partition("e")
    return float(format(value, f".{len(digits.partition('.')[2])}{'e' if exponent else 'f'}"))


@pytest.mark.parametrize("page,words,sources", CLAIMS, ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_of_sentences_are_those_of_the_results(page, words, sources):
    found = re.search(pattern(words), (ROOT / page).read_text(encoding="utf-8"))
    assert found, "the page has no such sentence any more"
    values = [value for source in sources for value in source()]
    printed = [as_printed(value, text) for value, text in zip(values, found.groups(), strict=True)]
    assert [float(text) for text in found.groups()] == printed


# Pages whose sentences have no other measurements than those in CLAIMS.
PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    *(f"research/{name}/README.md" for name in ("retention", "toy", "method_comparison")),
]
MARKUP = (r"^```.*?^```", r"^    .*?$", r"^ *\|.*?$", r"`[^`\n]+`", r"\]\([^)]*\)", r"https?://\S+")
# What has a decimal point or a per cent sign and is not measured: versions, settings, statistics, estimates.
NOT_MEASURED = (
    r"\d+\.\d+\.\d+(?: to 5\.x)?",
    r"(?:Python|torch|[Pp]eft|PEFT|transformers|TRL|Llama-|Apache-)[ <]?\d+\.\d+(?:(?:, | and | to |; )\d+\.\d+)?",
    r"^## Protocol\n.*?^## ",
    r"(?:delta|beta) 0\.\d",
    r"A delta of 0\.9 instead of 0\.7",
    r"with 10 %, each of the three methods",
    r"scaled by 0\.\d+",
    r"0\.3\)? times",
    r"[Ww]eights? 0\.3",
    r"by 0\.75 say",
    r"at most 0\.2 of LoRA's and 0\.5 of LoRA's with anchors",
    r"by less than 0\.01, so",
    r"reach above 0\.45",
    r"95 % interval",
    r"20 and 80 % quantile",
    r"\[Dou et al\., ACL 2024, section 3\.3",
    r"\(arXiv 2410\.07348\)",
    r"(?:With|and) 2 % (?:of type 0|replay)",
    r"between 0\.1 and 0\.4, and 1 costs tasks",
    r"more than  \(0\.1\) of the effect",
    r"has 0\.6 billion parameters",
    r"(?:Before 1|What 0)\.\d",
    r"0\.4 removes",
    r"(?:Qwen|Ernie )\d\.\d",
    r"compute capability 8\.0",
    r"compute capability 9\.0",
    r"capability 8\.0 and newer",
    r"Met: 0\.65",
)


def unaccounted(page: str, text: str) -> list[str]:
    """The numbers of a page's sentences, with the words around them, that neither list has."""
    for part in (*(pattern(words) for name, words, _ in CLAIMS if name == page), *MARKUP, *NOT_MEASURED):
        text = re.sub(part, "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r".{0,60}(?<![\w.])\d+(?:\.\d+|(?:\.\d+)? ?%).{0,30}", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_sentence_has_a_source(page):
    assert not unaccounted(page, (ROOT / page).read_text(encoding="utf-8"))


def test_a_number_without_a_source_is_found():
    (found,) = unaccounted("README.md", "With torch 2.13 it forgets 0.731 nats and solves many tasks.")
    assert "0.731" in found
