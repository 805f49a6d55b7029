import dataclasses
import json
import math
import random
import re
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from example_scripts import run_module
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.cli import main as command_line
from research.toy import intervals, protocol, report, runs, world
from research.toy.__main__ import main
from research.toy.experiment import World, build_adapted_model, pretrain_model
from research.toy.protocol import METHODS, VARIANTS, Run
from research.toy.results import Results


pytestmark = pytest.mark.version_independent

MINIATURE = VARIANTS["miniature"]


# --- world


def test_every_fact_is_asked_and_stated_with_the_same_answer():
    facts = world.build_facts(cities=3, relations=2)
    assert facts.cities == ["Shanghai", "Beijing", "Shenzhen"]
    assert [question.text for question in facts.questions[:2]] == [
        "Question: Which country is Shanghai in? Answer: China",
        "Question: Which capital governs Shanghai? Answer: Beijing",
    ]
    assert [form.text for form in facts.statements[0]] == [
        "Shanghai lies in China",
        "The country of Shanghai is China",
    ]
    for question, forms in zip(facts.questions, facts.statements):
        assert {form.answer for form in forms} == {question.answer}


@pytest.mark.parametrize(("cities", "relations"), [(0, 1), (10**6, 1), (1, 0), (1, 6)])
def test_facts_that_do_not_exist_are_refused(cities, relations):
    with pytest.raises(ValueError, match=rf"{cities} cities and {relations} relations were asked for; there are"):
        world.build_facts(cities, relations)


@pytest.mark.parametrize(
    ("task", "items", "answer"),
    [
        ("Spell the digits", ["3", "0"], "three zero"),
        ("Add one to each digit", ["9", "1"], "0 2"),
        ("Name the largest digit", ["4", "7", "1"], "7"),
        ("Write the next letters", ["a", "j"], "b a"),
        ("Write the letters backwards", ["a", "b", "c"], "c b a"),
        ("Leave out the first letter", ["a", "b", "c"], "b c"),
        ("Swap the cities", ["Rome", "Oslo"], "Oslo Rome"),
        ("Name the second city", ["Rome", "Oslo"], "Oslo"),
    ],
)
def test_tasks_have_the_right_answers(task, items, answer):
    _, solve = world.TASKS[task]
    assert " ".join(solve(items)) == answer


def test_scored_exercises_share_no_items_with_those_to_train_on():
    cities, generator = world.build_facts(30, 1).cities, random.Random(0)
    drawn = {scored: [world.draw_task(cities, generator, scored) for _ in range(2000)] for scored in (False, True)}
    items = {scored: {s.prompt.partition(". ")[2] for s in samples} for scored, samples in drawn.items()}
    assert not items[False] & items[True]
    assert {sample.task for sample in drawn[True]} == set(world.TASKS)


def test_instructions_of_tasks_do_not_occur_in_pretraining():
    generator = random.Random(0)
    skills = " ".join(world.draw_skill(["Rome", "Oslo"], generator) for _ in range(500))
    assert not [task for task in world.TASKS if task in skills]


def test_facts_that_are_replayed_are_not_scored():
    toy = World(VARIANTS["toy"])
    run = Run("lora", 200, samples=2000, learning_rate=1e-3, replay=0.2)
    samples = toy.training_samples(run)
    replayed = [sample.text for sample in samples if sample.task_type == world.KNOWLEDGE]
    assert len(samples) == 2000
    assert len(replayed) == 400
    scored = toy.scored_samples(200)
    assert (len(scored["questions"]), len(scored["statements"])) == (420, 840)
    cities = {
        city for city in toy.facts.cities if any(f" {city}?" in text or f" {city} in?" in text for text in replayed)
    }
    assert len(cities) == 45
    scored_cities = {toy.facts.cities[toy.facts.city_of[fact]] for fact in toy.split(200)[1]}
    assert not cities & scored_cities
    statements = {form for fact in toy.split(200)[1] for form in toy.facts.statements[fact]}
    assert set(scored["statements"]) == statements
    assert {sample.task_type for sample in scored["tasks"]} == {world.DOWNSTREAM}


def test_seeds_replay_different_facts():
    toy = World(VARIANTS["toy"])
    assert sorted(toy.split(200)[0]) != sorted(toy.split(201)[0])


# --- protocol


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_no_choice_is_made_on_a_test_seed(variant):
    chosen = dict.fromkeys(variant.methods, 1e-3)
    choosing = protocol.selection_runs(variant) + protocol.ablation_runs(variant, chosen)
    assert {run.seed for run in choosing} == set(variant.validation_seeds)
    assert {run.seed for run in protocol.test_runs(variant, chosen)} == set(variant.test_seeds)
    assert not set(variant.validation_seeds) & set(variant.test_seeds)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_each_run_is_listed_once(variant):
    chosen = {method: variant.candidates(method)[0] for method in variant.methods}
    for listed in (
        protocol.selection_runs(variant),
        protocol.test_runs(variant, chosen),
        protocol.ablation_runs(variant, chosen),
    ):
        assert len({run.key for run in listed}) == len(listed)


def chosen_rates(scores):
    """What is chosen where each method has (knowledge, tasks) at each learning rate.

    Both seeds 5 points from these means.
    """
    rates = {METHODS[method].kind: list(of_method) for method, of_method in scores.items()}
    variant = replace(MINIATURE, methods=list(scores), validation_seeds=[0, 1], learning_rates=rates)
    rows = []
    for run in protocol.selection_runs(variant):
        knowledge, tasks = (value + (5 if run.seed else -5) for value in scores[run.method][run.learning_rate])
        rows.append(
            {"key": run.key, "scores": {"questions": knowledge - 1, "statements": knowledge + 1, "tasks": tasks}}
        )
    return protocol.choose_learning_rates(variant, rows)


BASELINE_SCORES = {1e-3: (90, 20), 2e-3: (80, 40), 4e-3: (50, 60)}


def test_baseline_gets_the_best_sum_of_knowledge_and_tasks():
    assert chosen_rates({"lora": BASELINE_SCORES}) == {"lora": 2e-3}


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ({1e-3: (95, 39), 2e-3: (85, 41), 4e-3: (70, 90)}, 2e-3),  # keeps the most of those that solve 40 %
        ({1e-3: (95, 10), 2e-3: (90, 39), 4e-3: (70, 30)}, 2e-3),  # solves the most of those that do not
        ({1e-3: (85, 60), 2e-3: (85, 70), 4e-3: (70, 90)}, 1e-3),  # a tie
    ],
)
def test_other_methods_keep_the_most_at_what_the_baseline_learns(scores, rate):
    assert chosen_rates({"lora": BASELINE_SCORES, "null": scores})["null"] == rate


def test_knowledge_and_tasks_count_alike():
    assert protocol.overall_score({"questions": 90, "statements": 70, "tasks": 20}) == 50


@pytest.fixture(scope="module")
def parameters():
    """Trainable parameters of each adapter on the toy model."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, **VARIANTS["toy"].model}
    counts = {}
    for name, method in METHODS.items():
        if method.kind != "full":
            config_class = LoraConfig if method.kind == "lora" else LoRAMoEConfig
            with torch.device("meta"):
                model = get_peft_model(
                    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), config_class(**method.options)
                )
            counts[name] = model.get_nb_trainable_parameters()[0]
    return counts


def test_lora_has_at_least_as_many_parameters_as_any_mixture(parameters):
    largest = max(count for name, count in parameters.items() if METHODS[name].kind == "loramoe")
    assert all(largest <= parameters[name] <= 1.05 * largest for name in ("lora", "lora-attention"))


def test_the_sparse_variants_lora_has_as_many_parameters_as_its_mixture_and_the_same_scale(tmp_path):
    variant = replace(
        VARIANTS["moe"], cities=4, relations=2, vocab_size=320, pretrain_steps=1, pretrain_rows=2, scored_exercises=8
    )
    pretrain_model(variant, 0, tmp_path / "model")
    counts, scales = {}, {}
    for method in variant.methods:
        options = variant.options(Run(method, 0, 8, 1e-3, 0.0))
        model = build_adapted_model(METHODS[method].kind, options, tmp_path / "model")
        counts[method] = model.get_nb_trainable_parameters()[0]
        scales[method] = options["lora_alpha"] / options["r"] / options.get("num_experts", 1)
    assert counts["null"] <= counts["lora"] <= 1.07 * counts["null"]
    assert scales == pytest.approx({"lora": 4 / 3, "null": 4 / 3})


def test_all_adapters_start_with_the_same_scale():
    starts = {
        name: method.options["lora_alpha"] / method.options["r"] / method.options.get("num_experts", 1)
        for name, method in METHODS.items()
        if method.kind != "full"
    }
    for options in protocol.EXPERTS:
        tried = {**METHODS["null"].options, **options}
        starts[str(options)] = tried["lora_alpha"] / tried["r"] / tried["num_experts"]
    assert starts == pytest.approx(dict.fromkeys(starts, 4 / 3))


# --- report


def test_mean_interval_is_student_s():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert intervals.mean_interval(values) == pytest.approx((2.875, low, high))


def test_ratio_interval_ends_where_the_paired_test_rejects():
    a, b = [1.0, 2.0, 1.5, 2.2], [4.0, 5.0, 4.2, 6.0]
    ratio, low, high = intervals.ratio_interval(a, b)
    assert ratio == pytest.approx(sum(a) / sum(b))
    assert low < ratio < high
    for end in (low, high):
        differences = [x - end * y for x, y in zip(a, b)]
        assert stats.ttest_1samp(differences, 0).pvalue == pytest.approx(0.05)


@pytest.mark.parametrize("denominators", [[1.0, -1.0, 0.5], [5.0]])
def test_ratio_interval_is_infinite_where_nothing_is_known(denominators):
    _, low, high = intervals.ratio_interval([1.0] * len(denominators), denominators)
    assert (low, high) == (-math.inf, math.inf)


def made_up_rows(lost, solved):
    """Rows of the miniature in which each method loses and solves the given points."""
    chosen = {method: MINIATURE.candidates(method)[0] for method in MINIATURE.methods}
    listed = protocol.selection_runs(MINIATURE) + protocol.test_runs(MINIATURE, chosen)
    listed += protocol.ablation_runs(MINIATURE, chosen)
    by_task = dict.fromkeys(world.TASKS, 50.0)
    rows = [
        {
            "key": f"pretraining {seed}",
            "pretraining": seed,
            "scores": {"questions": 100.0, "statements": 100.0, "tasks": 0.0, "by_task": {}},
        }
        for seed in MINIATURE.seeds
    ]
    for run in listed:
        kept, tasks = 100.0 - lost[run.method] - 0.2 * run.seed, float(solved[run.method])
        row = {
            "key": run.key,
            "run": dataclasses.asdict(run),
            "scores": {"questions": kept, "statements": kept, "tasks": tasks, "by_task": by_task},
            "trainable": 1000,
        }
        if METHODS[run.method].kind == "loramoe":
            weights = {"groups": [0.4, 0.6], "layers": {"model.layers.0.mlp.up_proj": [0.4, 0.6]}}
            row["router"] = dict.fromkeys(("questions", "statements", "tasks"), weights)
        rows.append(row)
    common = {
        "variant": "miniature",
        "date": "2026-01-01",
        "device": "cpu",
        "versions": {"torch": "2"},
        "seconds": {"all": 1},
    }
    return [{**row, **common} for row in rows]


LOST, SOLVED = (
    {"full": 30, "lora": 20, "unbalanced": 12, "null": 8},
    {"full": 60, "lora": 50, "unbalanced": 55, "null": 52},
)


def test_report_of_made_up_rows(tmp_path):
    main = report.write_report(made_up_rows(LOST, SOLVED), tmp_path)
    assert "| LoRA | 1 k | 0.001 | 20.3 [" in main
    assert "Null experts, delta 0.7: met. Other methods that would meet it: none." in main
    text = (tmp_path / "report.md").read_text()
    assert main in text
    assert "| LoRA | **0.001** (edge) | 20.0 |" in text
    figures = {"frontier.png", "growth.png", "learning-rates.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", *figures}


@pytest.mark.parametrize(
    ("lost", "solved", "verdict"),
    [
        ({}, {}, "met. Other methods that would meet it: none."),
        (
            {"null": 10},
            {},
            "missed (the interval of questions reaches above 0.45, the interval of statements reaches above",
        ),
        ({}, {"null": 49}, "missed (the interval of the tasks reaches below LoRA's)."),
        (
            {"full": 2, "unbalanced": 2},
            {},
            "met. Other methods that would meet it: full fine-tuning; LoRAMoE, no balancing.",
        ),
        ({"lora": -1, "null": 0}, {}, "missed"),  # nothing is lost in the mean, and the recipe loses more
    ],
)
def test_bar_needs_both_a_small_loss_and_the_tasks(lost, solved, verdict):
    results = Results(made_up_rows({**LOST, **lost}, {**SOLVED, **solved}))
    assert f"Null experts, delta 0.7: {verdict}" in report.bar(results)


def test_bar_says_where_an_interval_leaves_it_open():
    rows = made_up_rows(LOST, SOLVED)
    for row in rows:
        if row.get("run", {}).get("method") == "null" and row["run"]["seed"] == 1:
            row["scores"] = {**row["scores"], "questions": 100.0}
    assert "met (the interval of questions reaches above 0.45)" in report.bar(Results(rows))


def test_report_of_an_unfinished_study_is_refused():
    rows = made_up_rows(LOST, SOLVED)
    with pytest.raises(ValueError, match="1 rows are missing, such as .*; finish the study with `run` first"):
        Results(rows[:-1])


@pytest.mark.parametrize(
    ("names", "found"), [((), "none"), (("toy", "miniature"), "miniature, toy"), (("giant",), "giant")]
)
def test_rows_of_other_variants_are_refused(names, found):
    with pytest.raises(ValueError, match=f"must be of one variant of miniature, toy, moe, large, but are of: {found}"):
        Results([{"variant": name, "key": name} for name in names])


# --- runs


ROW = {"variant": "toy", "scores": {}}


@pytest.mark.parametrize("damaged", ['{"key": ', "[]", '{"key": "b"}'])
def test_damaged_rows_are_refused(tmp_path, damaged):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({'key': 'a', **ROW})}\n{damaged}\n")
    with pytest.raises(ValueError, match="line 2: no row of the study .*; remove the line to run it again"):
        runs.read_rows(file)


def test_the_newest_of_two_rows_counts(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"key": "a", "n": 1, **ROW}, {"key": "b", **ROW}, {"key": "a", "n": 2, **ROW}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert runs.read_rows(file) == [rows[2], rows[1]]


def test_folder_of_other_settings_is_refused(tmp_path, monkeypatch):
    runs.Study(MINIATURE, tmp_path)
    other = "holds rows of other settings than variant 'miniature' has now; use another folder"
    with pytest.raises(ValueError, match=other):
        runs.Study(replace(MINIATURE, batch_size=4), tmp_path)
    monkeypatch.setitem(METHODS, "null", METHODS["unbalanced"])
    with pytest.raises(ValueError, match=other):
        runs.Study(MINIATURE, tmp_path)


def test_rows_without_their_settings_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds rows of other settings"):
        runs.Study(MINIATURE, tmp_path)


class OneAfterTheOther:
    """A pool that does its work when it is given it; `fails` says for which argument it fails."""

    def __init__(self, fails=lambda *arguments: False):
        self.fails, self.done = fails, []

    def submit(self, function, *arguments):
        future = Future()
        if self.fails(*arguments):
            future.set_exception(MemoryError("full"))
        else:
            self.done.append(arguments)
            future.set_result({"scores": {}})
        return future


def test_seed_is_pretrained_again_if_its_row_or_its_model_is_missing(tmp_path):
    study = runs.Study(MINIATURE, tmp_path)
    for seed in (0, 1):
        (tmp_path / f"model-{seed}").mkdir()
    row = {"key": "x", "run": {"seed": 2}, **ROW}
    study.rows = [{"key": f"pretraining {seed}", "pretraining": seed, **ROW} for seed in (0, 2)] + [row]
    pool = OneAfterTheOther()
    study._pretrain(pool)
    assert [seed for _, seed, _ in pool.done] == [1, 2]
    assert row not in study.rows  # made with the old model of seed 2


def test_failed_run_is_named_and_the_others_are_kept(tmp_path):
    study = runs.Study(MINIATURE, tmp_path)
    listed = protocol.selection_runs(MINIATURE)[:3]
    pool = OneAfterTheOther(fails=lambda variant, run, *_: run is listed[1])
    with pytest.raises(RuntimeError, match=re.escape(f"{listed[1]} failed; `run` goes on from here")) as error:
        study._fine_tune(pool, "test", listed)
    assert isinstance(error.value.__cause__, MemoryError)
    assert {row["key"] for row in runs.read_rows(tmp_path / "rows.jsonl")} == {listed[0].key, listed[2].key}


def test_only_one_adapter_of_each_method_is_kept(tmp_path):
    study = runs.Study(MINIATURE, tmp_path)
    chosen = {method: MINIATURE.candidates(method)[0] for method in MINIATURE.methods}
    listed = protocol.test_runs(MINIATURE, chosen) + protocol.ablation_runs(MINIATURE, chosen)
    kept = [folder.name for run in listed if (folder := study._adapter(run))]
    assert sorted(kept) == ["adapter-lora", "adapter-null", "adapter-unbalanced"]


def tables(finished):
    """What was printed, without what libraries print on import."""
    assert finished.returncode == 0, finished.stderr
    return finished.stdout[finished.stdout.index("| method |") :]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, tables(run_module("research.toy", "run", "--variant", "miniature", "--output", folder, "--jobs", 1))


@pytest.mark.slow
def test_miniature_has_a_row_for_each_run(miniature):
    folder, printed = miniature
    rows = runs.read_rows(folder / "rows.jsonl")
    results = Results(rows)  # refuses missing rows
    assert len(rows) == len(results.by_key) == 25
    for row in rows:
        if "run" in row:
            assert row["config"] == {**METHODS[row["run"]["method"]].options, **row["run"]["options"]}
        assert all(0 <= row["scores"][kind] <= 100 for kind in ("questions", "statements", "tasks"))
        assert row["versions"]["torch"] == torch.__version__
    for row in rows:
        for weights in row.get("router", {}).values():
            assert sum(weights["groups"]) == pytest.approx(1, abs=2e-3)
    assert "| null experts, delta 0.7 |" in printed


@pytest.mark.slow
def test_miniature_writes_texts_that_the_commands_read(miniature, tmp_path):
    folder, _ = miniature
    adapter, statistics, report_file = (
        str(folder / "adapter-null"),
        tmp_path / "statistics.json",
        tmp_path / "results.json",
    )
    assert command_line(["analyze", adapter, "--data", str(folder / "texts.jsonl"), "-o", str(statistics)]) == 0
    assert {record["task_type"] for record in json.loads(statistics.read_text())["layers"]} == {-1, 0, 1}
    asked = ["--questions", str(folder / "questions.jsonl"), "--template", "{question}", "--shots", "0"]
    assert command_line(["evaluate", "--adapter", adapter, *asked, "-o", str(report_file)]) == 0
    assert json.loads(report_file.read_text())["closed_book"][0]["count"] == 6


@pytest.mark.slow
def test_miniature_goes_on_where_it_was_stopped(miniature):
    folder, printed = miniature
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = run_module("research.toy", "run", "--variant", "miniature", "--output", folder, "--jobs", 1)
    after = (folder / "rows.jsonl").read_text().splitlines()
    assert after[:-1] == lines[:-1]
    new, old = (json.loads(line[-1]) for line in (after, lines))
    assert (new["key"], new["scores"]) == (old["key"], old["scores"])  # runs are deterministic
    assert tables(again) == printed


@pytest.mark.slow
def test_report_command_writes_the_same_again(miniature, tmp_path):
    folder, printed = miniature
    written = run_module("research.toy", "report", folder / "rows.jsonl", "--output", tmp_path)
    assert tables(written) == printed
    assert (tmp_path / "frontier.png").read_bytes() == (folder / "frontier.png").read_bytes()


def test_no_jobs_are_refused(capsys):
    assert main(["run", "--variant", "miniature", "--jobs", "0"]) == 2
    assert "error: --jobs 0 must be at least 1." in capsys.readouterr().err


def test_missing_file_of_rows_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent.jsonl"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 2]")
