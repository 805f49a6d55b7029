import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import peft_loramoe
from peft_loramoe.groups import ExpertGroups
from research.retention import abilities, report, routers, tasks, terms, training
from research.retention.__main__ import main
from research.retention.knowledge import Encoder, read, read_facts
from research.retention.methods import METHODS, VARIANTS, Run
from research.retention.runs import read_rows
from research.retention.scoring import Item, answer_logits, packed_answer_logits, score
from tiny import VOCAB, tiny_llama, tiny_tokenizer


pytestmark = pytest.mark.version_independent


class TinyEncoder(Encoder):
    def ids(self, text):
        return [1 + sum(map(ord, word)) % (VOCAB - 1) for word in text.split()] or [1]


@pytest.fixture
def tiny(monkeypatch):
    """The study with a tiny model instead of SmolLM2."""
    monkeypatch.setattr(training, "load", lambda name=None, **options: (tiny_llama().eval(), tiny_tokenizer()))
    monkeypatch.setattr(routers, "load", lambda name=None: (tiny_llama().eval(), tiny_tokenizer()))
    monkeypatch.setattr(training, "Encoder", TinyEncoder)
    monkeypatch.setattr(routers, "Encoder", TinyEncoder)
    monkeypatch.setattr(training, "SCORED_TASKS", 16)
    monkeypatch.setattr(routers, "BLOCKS", (0, 1))


# --- data


@pytest.mark.parametrize(
    "number, words",
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (86, "eighty-six"),
        (300, "three hundred"),
        (705, "seven hundred and five"),
    ],
)
def test_numbers_in_words(number, words):
    assert tasks.number_in_words(number) == words


def test_scored_prompts_are_in_no_training_set():
    scored = {sample.prompt for sample in tasks.samples(400, "scored", scored=True)}
    trained = {sample.prompt for seed in range(3) for sample in tasks.samples(1280, seed, scored=False)}
    assert not scored & trained


def test_scored_facts_and_replayed_facts_have_no_entity_in_common():
    replayed = {fact.entity for fact in read_facts() if fact.use == "replay"}
    assert replayed and not replayed & {fact.entity for fact in read_facts() if fact.use != "replay"}


def test_held_back_anchors_are_not_trained_on():
    encoder = TinyEncoder(tiny_tokenizer())
    assert len(training.training_anchors(encoder)) == len(read("anchors.jsonl")) - len(read("anchors.jsonl")[::10])


def test_texts_of_anchors_are_not_scored():
    scored = {row["text"][:60] for row in read("texts.jsonl")}
    assert not scored & {row["text"][:60] for row in read("anchors-text.jsonl")}


@pytest.mark.parametrize("kind", ["prose", "chat"])
def test_anchors_of_a_kind_are_not_held_back(kind):
    held_back = {row["text"] for row in read("anchors.jsonl")[::10]}
    assert not held_back & {row["text"] for row in read(f"anchors-{kind}.jsonl")}


def test_anchors_of_a_file_take_the_place_of_the_studys(tmp_path):
    file = tmp_path / "anchors.jsonl"
    file.write_text("".join(json.dumps({"text": f"anchor {i}"}) + "\n" for i in range(3)))
    encoder, run = TinyEncoder(tiny_tokenizer()), Run("retain", 3, samples=80, options={"anchor_file": str(file)})
    expected = {tuple(encoder.text(f"anchor {i}").answer) for i in range(3)}
    batches = training.training_batches(run.settings, run, encoder)
    assert {tuple(item.answer) for _, _, anchors in batches for item in anchors} == expected


# --- training


def test_every_step_has_as_many_anchors_beside_the_same_samples():
    one = Run("retain", seed=3, samples=80)
    encoder = TinyEncoder(tiny_tokenizer())
    with_anchors = training.training_batches(one.settings, one, encoder)
    without = training.training_batches(replace(one.settings, anchors=0.0), one, encoder)
    assert [len(anchors) for _, _, anchors in with_anchors] == [2, 2, 2, 2]
    assert [items for items, _, _ in with_anchors] == [items for items, _, _ in without]


def test_options_replace_those_of_the_method_and_of_its_configuration():
    settings = Run("retain", 1, options={"router_lr_multiplier": 3, "balance_delta": 0.5}).settings
    assert settings.router_lr_multiplier == 3 and settings.config["balance_delta"] == 0.5
    assert METHODS["retain"].config["balance_delta"] != 0.5


def test_anchors_in_the_balance_term_only_leave_the_tasks_loss_alone():
    one = Run("retain", seed=3, samples=20)
    encoder = TinyEncoder(tiny_tokenizer())
    method = one.settings
    [(items, types, anchors)] = training.training_batches(method, one, encoder)
    losses = []
    for beside in (anchors, []):
        model = training.adapt(tiny_llama(), method, 3, encoder)
        losses.append(training.losses(model, method, items, types, beside, None, log=False))
    (task, anchor, _, term, _), (task_alone, anchor_alone, _, term_alone, _) = losses
    assert torch.equal(task, task_alone)
    assert anchor > 0 and anchor_alone == 0
    assert not torch.equal(term, term_alone)


@pytest.mark.parametrize("method", ["lora", "corda", "mica", "osf", "full"])
def test_every_tuner_starts_as_the_base_model_and_learns(method):
    encoder, run = TinyEncoder(tiny_tokenizer()), Run(method, seed=3, samples=40)
    items = [encoder.sample(sample) for sample in tasks.samples(8, 3, scored=False)]
    expected, _ = answer_logits(tiny_llama().eval(), items)
    model = training.adapt(tiny_llama(), run.settings, 3, encoder).eval()
    torch.testing.assert_close(answer_logits(model, items)[0], expected, atol=2e-4, rtol=0)
    training.train(model, run.settings, run, encoder)
    assert (answer_logits(model, items)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["lora+kl", "corda+kl", "mica+kl", "osf+kl", "full+kl", "retain, kl"])
def test_the_divergence_from_the_base_model_is_zero_at_the_start_only(method):
    encoder, run = TinyEncoder(tiny_tokenizer()), Run(method, seed=3, samples=20)
    settings = run.settings
    [(items, types, anchors)] = training.training_batches(settings, run, encoder)
    model = training.adapt(tiny_llama(), settings, 3, encoder)
    before = tiny_llama() if settings.changes_base else None
    divergence = training.losses(model, settings, items, types, anchors, None, before, log=False)[2]
    assert abs(divergence) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    divergence = training.losses(model, settings, items, types, anchors, None, before, log=False)[2]
    assert divergence > 1e-4


@pytest.mark.parametrize("method", ["lora", "retain", "osf", "full"])
def test_scale_interpolates_between_the_base_model_and_the_trained_one(method):
    encoder, run = TinyEncoder(tiny_tokenizer()), Run(method, seed=3, samples=40)
    items = [encoder.sample(sample) for sample in tasks.samples(8, 3, scored=False)]
    base = tiny_llama().eval()
    before = copy.deepcopy(base.state_dict()) if method == "full" else None
    expected, _ = answer_logits(base, items)
    model = training.adapt(base, run.settings, 3, encoder)
    training.train(model, run.settings, run, encoder)
    trained, _ = answer_logits(model, items)
    with training.scaled(model, 0.0, before):
        torch.testing.assert_close(answer_logits(model, items)[0], expected)
    with training.scaled(model, 0.5, before):
        halfway, _ = answer_logits(model, items)
    assert (halfway - expected).norm() < (trained - expected).norm()
    assert torch.equal(answer_logits(model, items)[0], trained)


# --- scores


@pytest.mark.parametrize("method", [None, "lora", "retain"])
def test_packed_items_have_the_logits_of_padded_ones(method):
    encoder, model = TinyEncoder(tiny_tokenizer()), tiny_llama().eval()
    items = [encoder.sample(sample) for sample in tasks.samples(8, 3, scored=False)]
    if method:
        model = training.adapt(model, METHODS[method], 3, encoder).train()
    types = [0, 1] * (len(items) // 2) if method == "retain" else None
    packed, packed_tokens = packed_answer_logits(model, items, types)
    term = peft_loramoe.balance_loss(model) if types else None
    padded, tokens = answer_logits(model, items, types)
    torch.testing.assert_close(packed, padded)
    assert torch.equal(packed_tokens, tokens)
    if types:
        torch.testing.assert_close(peft_loramoe.balance_loss(model), term)


def test_scores_are_those_of_one_item_at_a_time():
    model = tiny_llama().eval()
    items = [Item([5, 6, 7], [8, 9], (3,)), Item([4], [2, 3, 4, 5], (1, 9))]
    scores, _ = score(model, items)
    for item, result in zip(items, scores):
        logits = model(torch.tensor([item.before + item.answer])).logits[0, len(item.before) - 1 : -1]
        table = logits.log_softmax(-1)
        expected = table[range(len(item.answer)), item.answer].detach()
        assert result.log_likelihood == pytest.approx(float(expected.sum()), abs=1e-4)
        assert result.greedy == (table.argmax(-1).tolist() == item.answer)
        assert result.ranked == all(table[0, item.answer[0]] > table[0, option] for option in item.options)


# --- terms


@pytest.mark.parametrize("name", ["class_equal", "cross_entropy"])
def test_repeating_the_samples_of_a_type_changes_nothing(name):
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(2, 3, 4, generator=generator).softmax(-1)
    groups, types, order = ExpertGroups((2, 2)), torch.tensor([0, 1, 1]), [0, 0, 0, 1, 2]
    once = terms.TERMS[name](importance, types, groups, 0.7)
    repeated = terms.TERMS[name](importance[:, order], types[order], groups, 0.7)
    torch.testing.assert_close(once, repeated)


@pytest.mark.parametrize("name", list(terms.TERMS))
def test_every_term_is_smallest_at_the_target(name):
    groups, types = ExpertGroups((2, 2)), torch.tensor([0, 1])
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        terms.TERMS[name](logits.softmax(-1), types, groups, 0.7).backward()
        optimizer.step()
    weights = logits.softmax(-1)[0, :, :2].sum(-1)
    torch.testing.assert_close(weights, torch.tensor([0.85, 0.15]), atol=1e-2, rtol=0)


def test_a_normalised_router_does_not_see_the_length_of_x():
    method = replace(METHODS["retain"], normalised_router=True)
    model = training.adapt(tiny_llama(), method, 0, TinyEncoder(tiny_tokenizer()))
    experts = next(module for module in model.modules() if isinstance(module, terms.NormalisedRouterExperts))
    x = torch.randn(3, experts.A.shape[1])
    torch.testing.assert_close(experts(x)[1], experts(7 * x)[1], atol=1e-4, rtol=0)


# --- commands


def test_runs_end_as_rows_once_and_become_a_report(tiny, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    command = ["run", "--methods", "base", "lora", "retain", "null+replay", "--seeds", "1", "2", "--samples", "40"]
    command += ["--part", "0.1", "--scales", "1", "--output", str(rows)]
    main(command)
    written = rows.read_text()
    main(command)
    assert rows.read_text() == written
    table = read_rows(rows)
    assert [row["run"]["method"] for row in table] == ["base", "lora", "retain", "null+replay"] * 2
    assert table[3]["log"]["gradients"][0]["term"]["router"][0] > 0
    assert set(table[2]["null_weight"]) == {"statement", "question", "text", "anchor", "request", "task"}

    main(["report", str(rows)])
    text = rows.with_suffix(".md").read_text()
    assert "| retain | 2 |" in text and "| lora | 2 |" in text
    assert rows.with_suffix(".png").exists()

    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = written.splitlines(keepends=True)
    first.write_text("".join(lines[:5]))
    second.write_text("".join(lines[5:]))
    main(["report", str(first), str(second)])
    assert second.with_suffix(".md").read_text() == text.replace("rows.png", "second.png")


def test_a_report_of_rows_that_are_not_there_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "absent.jsonl")])
    assert "absent.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_names_each_run_once_and_the_base_model_first(name):
    runs = VARIANTS[name]
    assert len({run.key for run in runs}) == len(runs)
    assert runs[0].method == "base" and all(run.settings.tuner for run in runs[1:])


def test_a_variant_goes_on_after_its_rows(tiny, tmp_path, monkeypatch):
    runs = [Run("base", 1, 40, part=0.1), Run("lora", 1, 40, part=0.1)]
    rows = tmp_path / "rows.jsonl"
    for number in (1, 2, 2):
        monkeypatch.setitem(VARIANTS, "cpu", runs[:number])
        main(["variant", "cpu", "--output", str(rows)])
        assert [row["run"]["method"] for row in read_rows(rows)] == ["base", "lora"][:number]


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same_rows(tmp_path):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    scores = []
    for processes in ("1", "2"):
        rows = tmp_path / f"{processes}.jsonl"
        # a command of its own: processes do not import the module that was started as a command
        command = [sys.executable, "-m", "research.retention", "run", "--methods", "base", "lora"]
        command += ["--seeds", "1", "--samples", "40", "--part", "0.1"]
        subprocess.run([*command, "--model", model, "--processes", processes, "--output", rows], check=True)
        scores.append({row["key"]: row["scores"] for row in read_rows(rows)})
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_an_adapter_is_saved_under_the_name_of_its_run(tiny, tmp_path):
    command = ["run", "--methods", "retain, kl", "--seeds", "3", "--samples", "40", "--part", "0.1"]
    rows = tmp_path / "rows.jsonl"
    main([*command, "--set", "anchor_kl_weight=0.3", "--adapters", str(tmp_path / "saved"), "--output", str(rows)])
    (saved,) = (tmp_path / "saved").iterdir()
    assert saved.name == "retain-kl-3-anchor_kl_weight-0.3"
    loaded = PeftModel.from_pretrained(tiny_llama(), saved).eval()
    one = Run("retain, kl", 3, samples=40, part=0.1)
    assert training.evaluate(loaded, TinyEncoder(tiny_tokenizer()), one)["scores"] == read_rows(rows)[0]["scores"]


def test_each_scale_of_a_run_is_a_row_but_the_base_model_has_none(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = ["run", "--methods", "base", "lora", "--seeds", "1", "--samples", "40", "--part", "0.1"]
    for scales in (["1"], ["1", "0.5"]):
        main([*command, "--scales", *scales, "--output", str(rows)])
    assert [(row["run"]["method"], row["run"]["options"]) for row in read_rows(rows)] == [
        ("base", {}),
        ("lora", {}),
        ("lora", {"scale": 0.5}),
    ]


def test_routers_learn_from_the_term_alone(tiny, tmp_path):
    output = tmp_path / "routers.jsonl"
    main(["routers", "--names", "retain", "cross-entropy, x30", "--output", str(output)])
    for row in map(json.loads, output.read_text().splitlines()):
        assert row["anchor"]["mean"] > row["task"]["mean"]


# --- abilities


def test_items_of_abilities_are_distinct_and_have_one_right_answer(tmp_path):
    abilities.write_tasks(tmp_path)
    for name in abilities.ABILITIES:
        items = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len({json.dumps(item) for item in items}) == abilities.ITEMS
        for item in items:
            assert len(set(item["choices"])) == len(item["choices"]) and 0 <= item["right"] < len(item["choices"])


# --- report


def row_of(method, seed, text, solved, ranked):
    marks = {"greedy": "11", "ranked": ranked}
    scores = {
        "text": {"loss": text, "loss_by_kind": {"prose": text}},
        "task": {"greedy": solved, "loss": 0.1},
        "statement": marks,
        "question": marks,
    }
    run = {"method": method, "seed": seed, "options": {}, "part": 1.0}
    return {"run": run, "scores": scores, "null_weight": {}, "versions": {"torch": "2"}}


def test_pairs_are_compared_on_the_seeds_that_both_have():
    rows = [row_of("base", 1, 3.0, "00", "11")]
    rows += [row_of("lora", seed, 3.2, "10", "10") for seed in (1, 2, 3)]
    rows += [row_of("retain", seed, 3.05, "11", "11") for seed in (1, 2)]
    line = report.pairs_table(rows, "retain", ["lora"])[-1]
    fifty = "+50.0 (+50.0 to +50.0)"
    rise = "0.25 (0.25 to 0.25) |  | -0.150 (-0.150 to -0.150)"
    assert line == f"| lora | 2 | {rise} |  | {fifty} | +0.000 (+0.000 to +0.000) | {fifty} |"


def test_abilities_are_compared_to_the_base_models():
    rows = [row_of("base", 1, 3.0, "0", "1"), *(row_of("lora", seed, 3.0, "1", "1") for seed in (1, 2, 3))]
    accuracies = [(0.5, 0.7), (0.4, 0.6), (0.5, 0.9)]
    measured = [
        {"adapter": adapter, "results": {"a": {"acc,none": a}, "b": {"acc,none": b}}}
        for adapter, (a, b) in zip((None, "x/lora-1", "lora-2"), accuracies)
    ]
    table = report.abilities_table(rows, {"lm_eval": measured})
    assert table[2:] == ["| base | | 50.0 | 70.0 | |", "| lora | 2 | 45.0 | 75.0 | +0.0 (-127.1 to +127.1) |"]


@pytest.mark.parametrize(("text", "marks", "met"), [(3.02, "11", "yes"), (3.15, "00", "no")])
def test_the_conditions_of_the_protocol_are_judged(text, marks, met):
    solved = "1" * 50 if met == "yes" else "1" * 47 + "0" * 3
    rows = [row_of("base", 1, 3.0, "0" * 50, "11")]
    for seed in (1, 2):
        rows += [row_of("lora", seed, 3.2, "1" * 49 + "0", "10"), row_of("retain", seed, text, solved, marks)]
        rows += [row_of("lora+anchors", seed, 3.1, "1" * 49 + "0", "10")]
    lines = report.decision_table(rows, "retain")[5:-1]
    assert len(lines) == 5 and all(line.endswith(f"| {met} |") for line in lines)


def test_a_rival_that_solves_fewer_tasks_does_not_match():
    rows = [row_of("base", 1, 3.0, "0000", "11"), row_of("retain", 1, 3.02, "1111", "11")]
    rows += [row_of("lora", 1, 3.2, "1111", "11"), row_of("lora+anchors", 1, 3.0, "1110", "11")]
    assert list(report.matching(rows, "retain")) == ["lora"]


def test_another_setting_of_our_own_is_no_rival():
    rows = [row_of("base", 1, 3.0, "0000", "11")]
    rows += [row_of(method, 1, 3.02, "1111", "11") for method in ("lora", "retain", "retain, kl")]
    assert list(report.matching(rows, "retain, kl")) == ["lora"]


def test_options_of_all_rows_are_not_part_of_a_methods_name():
    rows = [row_of("lora", 1, 3.0, "1", "1"), row_of("lora", 2, 3.0, "1", "1")]
    for row in rows:
        row["run"]["options"] = {"lr": 0.1}
    rows[1]["run"]["options"]["scale"] = 0.5
    assert list(report.by_method(rows)) == ["lora", "lora (scale 0.5)"]


def test_a_report_without_the_base_model_is_an_error():
    with pytest.raises(ValueError, match="part=1.0"):
        report.means_table([row_of("lora", 1, 3.0, "1", "1")])


@pytest.mark.parametrize("method, share", [("retain", 0.05), ("paper", 0.15)])
def test_mixtures_train_at_most_as_many_parameters_as_lora(method, share):
    counts = []
    for name in (method, "lora"):
        base = tiny_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=1)
        model = training.adapt(base, METHODS[name], 0, TinyEncoder(tiny_tokenizer()))
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert (1 - share) * counts[1] <= counts[0] <= counts[1]
