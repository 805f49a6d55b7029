"""The command line: each command as `main` runs it, and the console script with the real lm-eval."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipapp
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_loramoe.analysis import RouterStatistics, RouterTrace, expert_similarity, expert_usage, router_statistics
from peft_loramoe.cli import main
from peft_loramoe.cli.models import read_batches
from peft_loramoe.cli.run import STARTUP
from peft_loramoe.cli.tables import show_statistics
from perplexity_task import NAME, word_perplexity, write_task
from tiny import loramoe, tiny_llama, tiny_tokenizer, token_batch


WEIGHTS = "adapter_model.safetensors"
# Without words that begin with those of the padding and end tokens.
TEXTS = [("w3 w4 w5 w6 w7", 0), ("w8 w9 w20", 1), ("w21 w22 w23 w24 w25 w26", 1), ("w27 w3 w30 w31", 0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved(folder, base, **options):
    """An adapter whose routers decide."""
    options = {"num_experts": 4, "lora_alpha": 16, "task_type_names": ["facts", "skills"], **options}
    model = loramoe(AutoModelForCausalLM.from_pretrained(base), **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router"):
                parameter.mul_(10)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    return saved(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def twelve(base):
    """An adapter like those of `LoRAMoEConfig.retain`: twelve experts, half of them null."""
    names = ["knowledge", "tasks"]
    return saved(base.parent / "twelve", base, num_experts=12, null_groups=[0], task_type_names=names)


@pytest.fixture
def revisions(monkeypatch):
    """Filled with the names and revisions of the models, tokenizers and configurations that are loaded."""
    asked = []
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        read = getattr(transformers, name).from_pretrained

        def from_pretrained(source, *args, read=read, revision="main", **options):
            asked.append((str(source), revision))
            return read(source, *args, revision=revision, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)
    return asked


@pytest.fixture(scope="module")
def loras(base):
    folders = [base.parent / "lora0", base.parent / "lora1"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def calibration(base):
    file = base.parent / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "task_type": kind}) for text, kind in TEXTS) + "\n\n")
    return file


def logits(folder, base):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def call(*words):
    assert main([str(word) for word in words]) == 0


def printed(capsys, *words):
    """What a command prints as JSON."""
    capsys.readouterr()
    call(*words, "--json")
    return json.loads(capsys.readouterr().out)


# --- inspect

LAYOUTS = {
    "plain": {},
    "null group": {"null_groups": [0]},
    "patterns": {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
}


def cosines(vectors):
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return unit @ unit.T


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_norms_and_similarities_are_those_of_the_full_matrices(options, tmp_path, capsys):
    model = loramoe(num_experts=4, **options)
    model.save_pretrained(tmp_path)
    found = printed(capsys, "inspect", tmp_path)
    kept = [i for i, expert in enumerate(found["experts"]) if not expert["null"]]
    assert len(kept) == (2 if "null_groups" in options else 4)
    vectors = []
    for layer in found["layers"]:
        experts = model.base_model.model.get_submodule(layer["layer"]).loramoe_experts["default"]
        pairs = zip(experts.A.double().split(experts.r), experts.B.double().split(experts.r, dim=1))
        vectors.append(torch.stack([(experts.scaling * B @ A).detach().flatten() for A, B in pairs]))
    for one, full in [*zip(found["layers"], vectors), (found, torch.cat(vectors, dim=1))]:
        assert [i for i, norm in enumerate(one["norms"]) if norm is not None] == kept
        assert [one["norms"][i] for i in kept] == pytest.approx(full.norm(dim=1).tolist())
        similarity = torch.tensor([[one["similarity"][i][j] for j in kept] for i in kept], dtype=torch.float64)
        torch.testing.assert_close(similarity, cosines(full))


def test_experts_are_not_compared_over_layers_that_differ_in_them(tmp_path, capsys):
    loramoe(num_experts=4, num_experts_pattern={"up_proj": 6}).save_pretrained(tmp_path)
    found = printed(capsys, "inspect", tmp_path)
    assert found["norms"] is None and {len(layer["norms"]) for layer in found["layers"]} == {4, 6}
    call("inspect", tmp_path)
    assert "The layers differ in their groups" in capsys.readouterr().out


def test_inspect_prints_configuration_size_and_experts(adapter, capsys):
    call("inspect", adapter)
    output = capsys.readouterr().out
    size = sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())
    for part in (
        f"{size:,} parameters, float32",
        "4 experts in each of 6 linears",
        "lora_alpha=16",
        "1 skills",
        "2+2",
    ):
        assert part in output, output
    assert "down_proj      2" in output and "0.mlp" not in output


def test_inspect_shows_every_linear_in_numerical_order(tmp_path, capsys):
    loramoe(tiny_llama(num_hidden_layers=11), target_modules=["up_proj"], num_experts=4).save_pretrained(tmp_path)
    call("inspect", tmp_path, "--layers")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[lines.index("Linears in model.layers") + 1 :] if "up_proj" in line]
    assert [row[0] for row in rows] == [f"{i}.mlp.up_proj" for i in range(11)]
    assert all(len(row) == 1 + 3 + 4 + 1 for row in rows)  # name, groups, r, scaling, four norms, similarity


@pytest.mark.parametrize(
    "words",
    [
        "inspect {adapter}",
        "inspect {adapter} --layers",
        "surgery list {adapter} --calibration {calibration} --layers",
        "surgery remove {adapter} --experts 3 -o {out} --calibration {calibration} --layers",
        "export-lora {adapter} -o {out} --calibration {calibration} --layers",
        "analyze {adapter} --data {calibration}",
        "trace {adapter} --text w3",
    ],
)
def test_tables_fit_80_columns_and_break_no_word(words, twelve, calibration, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    paths = {"adapter": twelve, "calibration": calibration, "out": tmp_path / "out"}
    call(*(word.format(**paths) for word in words.split()))
    printed = capsys.readouterr().out
    assert not [line for line in printed.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert len(re.findall(r"(up|gate|down)_proj\b", printed)) == printed.count("roj")


def test_inspect_says_that_values_are_not_finite(adapter, tmp_path, capsys):
    changed_copy(adapter, tmp_path / "bad", lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    call("inspect", tmp_path / "bad")
    assert "has values that are not finite" in capsys.readouterr().err


def test_inspect_names_what_belongs_to_no_expert(base, tmp_path, capsys):
    saved(tmp_path / "more", base, modules_to_save=["lm_head"])
    call("inspect", tmp_path / "more")
    assert "1 further tensors: base_model.model.lm_head.weight" in capsys.readouterr().out


def changed_copy(source, folder, change):
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


# --- convert, upcycle


def test_convert_to_the_authors_layout_and_back(tmp_path, base, adapter, capsys):
    call("convert", adapter, "--to", "authors", "-o", tmp_path / "authors")
    assert "peft-loramoe: warning: The authors' code does not support" in capsys.readouterr().err
    assert json.loads((tmp_path / "authors" / "adapter_config.json").read_text())["lora_nums"] == 4
    call("convert", tmp_path / "authors", "-o", tmp_path / "back")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_loras_become_experts(tmp_path, loras, capsys):
    call(
        "upcycle",
        *loras,
        "-o",
        tmp_path / "both",
        "--set",
        "freeze_experts=true",
        "--set",
        "balance_formula=variance_to_mean",
    )
    assert "2 experts of rank 4, in groups of [2]" in capsys.readouterr().out
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["num_experts"], config["freeze_experts"]) == (2, True)
    assert config["balance_formula"] == "variance_to_mean"


def test_a_lora_is_split(tmp_path, base, loras):
    call("upcycle", loras[0], "--num-experts", 2, "--method", "split", "-o", tmp_path / "split")
    torch.testing.assert_close(logits(tmp_path / "split", base), logits(loras[0], base))


# --- export-lora

EXPORTS = {
    "uniform": ([], {"gates": "uniform", "rank": 8}),
    "mean": (["--gates", "mean"], {"gates": "mean", "task_type": None}),
    "mean of a type": (["--gates", "mean", "--task-type", "skills"], {"gates": "mean", "task_type": 1}),
    "groups": (["--gates", "groups", "--weights", "1", "0"], {"gates": "groups"}),
    "truncated": (["--rank", "3"], {"rank": 3}),
    "share": (["--rank", "0.9"], {}),
    "threshold": (["--max-kl-share", "99", "--no-each-layer"], {"max_kl_share": 99, "poor": False}),
}


@pytest.mark.parametrize("options, report", EXPORTS.values(), ids=EXPORTS)
def test_an_export_is_measured(options, report, tmp_path, base, adapter, calibration, capsys):
    batches = ["--calibration", calibration, "--batch-size", "3"]
    found = printed(capsys, "export-lora", adapter, "-o", tmp_path / "lora", *batches, *options)
    assert {name: found[name] for name in report} == report
    assert found["tokens"] == sum(len(text.split()) for text, _ in TEXTS) and 0 < found["kl_divergence"] < math.inf
    assert (found["layers"][0]["kl_divergence"] is None) == ("--no-each-layer" in options)
    assert found == json.loads((tmp_path / "lora" / "export_report.json").read_text())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(base))


def test_long_texts_are_cut(tmp_path, adapter, calibration, capsys):
    options = ["-o", tmp_path / "lora", "--calibration", calibration, "--max-length", "3"]
    assert printed(capsys, "export-lora", adapter, *options)["tokens"] == 3 * len(TEXTS)


def test_an_unmeasured_export_says_so(tmp_path, adapter, capsys):
    call("export-lora", adapter, "-o", tmp_path / "lora")
    output, errors = capsys.readouterr()
    assert "unmeasured" in output and f"Wrote {tmp_path / 'lora'}" in output
    assert "peft-loramoe: warning: The error of the LoRA" in errors


# --- surgery


def test_experts_are_listed_with_their_load(adapter, calibration, capsys):
    records = printed(capsys, "surgery", "list", adapter, "--calibration", calibration)
    assert [record["task_type"] for record in records[:4]] == ["facts", "facts", "skills", "skills"]
    assert sum(record["load"] for record in records[:4]) == pytest.approx(1)
    call("surgery", "list", adapter)
    output = " ".join(capsys.readouterr().out.split())
    assert "0 0 facts 1 0 facts 2 1 skills 3 1 skills The load was not measured" in output
    call("surgery", "list", adapter, "--calibration", calibration, "--layers")
    output = capsys.readouterr().out
    loads = " ".join(f"{record['load']:.3f}" for record in records[:4])
    assert "Loads in model.layers" in output and f"0.mlp.gate_proj  {loads}" in output


OPERATIONS = {
    "add": (["--name", "new"], [2, 2, 4], True),
    "add nearest": (["--count", "1", "--group", "0", "--start", "nearest"], [3, 2], False),
    "add filled up": (["--count", "3", "--name", "new", "--fill-with-null"], [2, 2, 3, 1], True),
    "remove": (["--experts", "1", "3"], [1, 1], False),
    "reorder": (["--order", "2", "3", "1", "0"], [2, 2], True),
    "merge": (["--experts", "0", "1"], [1, 2], False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_writes_an_adapter_that_loads(name, tmp_path, base, adapter, calibration, capsys):
    options, groups, same = OPERATIONS[name]
    data = [] if name == "reorder" else ["--calibration", calibration]
    change = printed(capsys, "surgery", name.split()[0], adapter, "-o", tmp_path / "new", *data, *options)
    assert {tuple(layer["expert_groups"]) for layer in change["layers"]} == {tuple(groups)}
    before, after = logits(adapter, base), logits(tmp_path / "new", base)
    assert torch.allclose(before, after, atol=1e-4) == same
    if data:
        assert (change["relative_error"] < 1e-5) == same


def test_an_operation_prints_what_it_did(tmp_path, adapter, calibration, capsys):
    call("surgery", "remove", adapter, "-o", tmp_path / "new", "--experts", 0, "--calibration", calibration)
    output = capsys.readouterr().out
    assert "1+2" in output and "Relative change of the mixtures' outputs: 0." in output
    call("surgery", "remove", adapter, "-o", tmp_path / "unmeasured", "--experts", 0)
    assert "The change of the outputs was not measured" in capsys.readouterr().out
    call("surgery", "reorder", adapter, "-o", tmp_path / "reordered", "--order", 0, 1, 2, 3)
    assert "measured" not in capsys.readouterr().out


# --- analyze, trace, plot


def test_analyze_measures_every_text(base, adapter, calibration, capsys):
    found = printed(capsys, "analyze", adapter, "--data", calibration, "--batch-size", 3)
    model, tokenizer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), tiny_tokenizer()
    alone = [{**tokenizer(text, return_tensors="pt"), "task_types": [kind]} for text, kind in TEXTS]
    for batch in alone:
        batch.pop("token_type_ids", None)
    expected = router_statistics(model, alone)  # without padding
    assert found["task_type_names"] == {"default": ["facts", "skills"]}
    for name, fields in {"experts": ("weight", "importance"), "layers": ("entropy", "load_entropy")}.items():
        for one, other in zip(found[name], getattr(expected, name), strict=True):
            assert [one.pop(field) for field in fields] == pytest.approx(
                [other.pop(field) for field in fields], abs=1e-5
            )
            assert one == other
    assert {record["status"] for record in found["expert_usage"]} <= {"dead", "dominating", "used"}
    assert found["expert_similarity"] == [pytest.approx(pair, abs=1e-5) for pair in expert_similarity(model)]
    weights = {(record["task_type"], record["group"]): record["weight"] for record in found["group_weights"]}
    assert len(weights) == 4 and weights[0, 0] + weights[0, 1] == pytest.approx(1)


def test_texts_are_padded_on_the_right_for_models_that_count_from_the_left(tmp_path, capsys):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=1, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")  # pads on the left
    adapter = saved(tmp_path / "adapter", tmp_path / "base")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text, _ in TEXTS))
    together, alone = (
        printed(capsys, "analyze", adapter, "--data", file, "--batch-size", size)["experts"]
        for size in (len(TEXTS), 1)
    )
    assert [one["weight"] for one in together] == pytest.approx([one["weight"] for one in alone], abs=1e-6)


def test_texts_that_begin_with_bos_get_no_second_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "w2"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "w2 w5 w9"}\n{"text": "w5"}')
    (batch,) = read_batches(file, tokenizer, 2, 512)
    assert [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])] == [
        [2, 5, 9],
        [2, 5],
    ]


def test_analyze_prints_weights_entropy_usage_and_similarity(adapter, calibration, capsys):
    call("analyze", adapter, "--data", calibration)
    output = " ".join(capsys.readouterr().out.split())
    for part in (
        "mean over 6 linears",
        "2 facts",
        "group skills",
        "uniform router: 1.386 nats",
        "Dead experts: 0 of 24",
        "one group",
    ):
        assert part in output, output
    assert "Wrote" not in output


def test_dead_experts_and_null_groups_are_named(capsys):
    names = ("adapter", "layer", "task_type")
    experts = [
        {
            **dict(zip(names, ("default", layer, -1))),
            "expert": i,
            "group": i % 2,
            "null": i == 0,
            "weight": weight,
            "importance": 0,
        }
        for layer in ("fc1", "fc2")
        for i, weight in enumerate((0.99, 0.01))
    ]
    means = {"samples": 3, "tokens": 1234, "entropy": 0.25, "load_entropy": 0.5, "num_experts": 2}
    layers = [{**dict(zip(names, ("default", layer, -1))), **means} for layer in ("fc1", "fc2")]
    statistics = RouterStatistics(experts, layers, {"default": None})
    pair = {"layer": "fc1", "expert": 0, "other": 1, "group": 0, "other_group": 1, "cosine": None}
    show_statistics(statistics, expert_usage(statistics), [pair])
    output = " ".join(capsys.readouterr().out.split())
    for part in ("group 0", "(null)", "3 samples", "1,234", "0.990", "0.250", "0.500", "uniform router: 0.693 nats"):
        assert part in output, output
    assert "Dead experts: 2 of 4: fc1 1, fc2 1" in output and "Dominating experts: 2 of 4: fc1 0, fc2 0" in output
    assert "two groups" not in output  # no pair whose similarity is known


@pytest.mark.parametrize("kind", ["groups", "load", "entropy"])
def test_statistics_are_drawn(kind, tmp_path, adapter, calibration, capsys):
    statistics, figures = tmp_path / "statistics.json", [tmp_path / "figure.png", tmp_path / "figure.svg"]
    call("analyze", adapter, "--data", calibration, "-o", statistics)
    call("plot", kind, statistics, "--adapter", "default", "-o", figures[0], "-o", figures[1])
    output = capsys.readouterr().out
    assert all(f"Wrote {file}." in output for file in (statistics, *figures))
    assert figures[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in figures[1].read_bytes()


def test_a_text_is_traced_and_drawn(tmp_path, adapter, capsys):
    call("trace", adapter, "--text", TEXTS[0][0], "-o", tmp_path / "trace.json")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("'")]
    trace = RouterTrace.load(tmp_path / "trace.json")
    assert [row[0] for row in rows] == [repr(word) for word in TEXTS[0][0].split()]
    for position, (_, *weights) in enumerate(rows):
        of_facts = [sum(probabilities[position][:2]) for probabilities in trace.layers.values()]
        mean = sum(of_facts) / len(of_facts)
        assert [float(weight) for weight in weights] == pytest.approx([mean, 1 - mean], abs=1e-3)
    assert printed(capsys, "trace", adapter, "--text", TEXTS[0][0]) == dataclasses.asdict(trace)
    figures = {group: tmp_path / f"{group}.svg" for group in ("0", "facts", "skills")}
    for group, file in figures.items():
        call("plot", "trace", tmp_path / "trace.json", "--group", group, "-o", file)
    drawn = {group: file.read_text() for group, file in figures.items()}
    assert drawn["0"] == drawn["facts"] != drawn["skills"]


def test_a_frontier_is_drawn(tmp_path, capsys):
    records = [
        {"label": "LoRA", "downstream": 81, "retention": 86.5},
        {"label": "base", "downstream": 3, "retention": 100},
    ]
    (tmp_path / "models.json").write_text(json.dumps(records))
    call("plot", "frontier", tmp_path / "models.json", "-o", tmp_path / "frontier.png")
    assert f"Wrote {tmp_path / 'frontier.png'}." in capsys.readouterr().out
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


# --- models


@pytest.fixture
def without_weights(base, tmp_path):
    """The base model's configuration alone."""
    (tmp_path / "config-only").mkdir()
    (tmp_path / "config-only" / "config.json").write_text((base / "config.json").read_text())
    return tmp_path / "config-only"


def test_without_calibration_the_base_model_is_not_read(tmp_path, base, adapter, without_weights):
    call("surgery", "reorder", adapter, "-o", tmp_path / "new", "--order", 0, 1, 2, 3, "--base-model", without_weights)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(without_weights)


def test_the_dtype_stays(tmp_path, adapter):
    def halve(tensors):
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})

    changed_copy(adapter, tmp_path / "half", halve)
    call("surgery", "reorder", tmp_path / "half", "-o", tmp_path / "new", "--order", 0, 1, 2, 3)
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / WEIGHTS).values()} == {torch.bfloat16}


ON_REVISIONS = {
    "analyze": "analyze {adapter} --data {texts}",
    "trace": "trace {adapter} --text w3",
    "export": "export-lora {adapter} -o {out} --calibration {texts}",
    "export without texts": "export-lora {adapter} -o {out}",
    "surgery": "surgery reorder {adapter} -o {out} --order 1 0 2 3",
}


@pytest.mark.parametrize("words", ON_REVISIONS.values(), ids=ON_REVISIONS)
@pytest.mark.parametrize("other", [False, True], ids=["the adapter's model", "another model"])
def test_the_revision_is_that_of_the_adapters_model(other, words, tmp_path, base, adapter, calibration, revisions):
    pinned, out = tmp_path / "pinned", tmp_path / "out"
    shutil.copytree(adapter, pinned)
    config = json.loads((pinned / "adapter_config.json").read_text())
    (pinned / "adapter_config.json").write_text(json.dumps({**config, "revision": "v2"}))
    words, model, revision = words.format(adapter=pinned, texts=calibration, out=out).split(), base, "v2"
    if other:
        model, revision = tmp_path / "copy", "main"
        shutil.copytree(base, model)
        words += ["--base-model", model]
    call(*words)
    assert set(revisions) == {(str(model), revision)}
    if out.exists():
        written = json.loads((out / "adapter_config.json").read_text())
        assert (written["base_model_name_or_path"], written["revision"]) == (str(model), None if other else "v2")


def test_what_belongs_to_no_expert_stays(tmp_path, base):
    saved(tmp_path / "more", base, modules_to_save=["lm_head"])
    changed_copy(
        tmp_path / "more", tmp_path / "trained", lambda tensors: tensors["base_model.model.lm_head.weight"].fill_(3)
    )
    call("surgery", "reorder", tmp_path / "trained", "-o", tmp_path / "new", "--order", 0, 1, 2, 3)
    head = load_file(tmp_path / "new" / WEIGHTS)["base_model.model.lm_head.weight"]
    assert (head == 3).all()


# --- bad input


def test_every_command_has_a_help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = [
        "inspect",
        "convert",
        "upcycle",
        "export-lora",
        "surgery",
        "analyze",
        "trace",
        "plot",
        "evaluate",
        "run",
        "env",
        "train",
        "anchors",
        "label",
    ]
    operations = ["list", "add", "remove", "reorder", "merge"]
    figures = ["groups", "load", "entropy", "trace", "frontier"]
    nested = [["surgery", operation] for operation in operations] + [["plot", figure] for figure in figures]
    for words in ([], *([command] for command in commands), *nested):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        printed = capsys.readouterr().out
        assert stopped.value.code == 0 and f"usage: peft-loramoe {' '.join(words)}" in printed
        assert max(map(len, printed.splitlines())) <= 80


# (words, part of the message); {adapter}, {texts}, {out} and so on are replaced by paths.
BAD = {
    "no command": ("", "arguments are required: COMMAND"),
    "no operation": ("surgery", "arguments are required: OPERATION"),
    "unknown command": ("tune", "invalid choice: 'tune'"),
    "no output": ("convert {adapter}", "arguments are required: -o/--output"),
    "no adapter": ("inspect {nowhere}", "nowhere: there is no such folder."),
    "an empty folder": ("inspect {empty}", "has no adapter_config.json, so it is not an adapter folder"),
    "a LoRA": ("inspect {lora}", "has peft_type='LORA', not 'LORAMOE' (use `convert` for"),
    "another rank": ("inspect {wrong}", "the files do not belong together"),
    "half a file": ("inspect {half}", "the file is incomplete or damaged"),
    "a folder that exists": ("convert {adapter} --to authors -o {empty}", "exists already"),
    "an export that exists": ("export-lora {adapter} -o {empty}", "exists already"),
    "nothing to convert": ("convert {adapter} -o {out}", "already has this package's layout"),
    "an unknown format": ("convert {adapter} -o {out} --to qlora", "invalid choice: 'qlora'"),
    "one LoRA alone": ("upcycle {lora} -o {out}", "One source needs --num-experts"),
    "one LoRA twice": ("upcycle {lora} {lora} -o {out}", "give it once, with --num-experts"),
    "no value": ("upcycle {lora} -o {out} --set top_k", "--set top_k: must be OPTION=VALUE"),
    "an unknown option": (
        "upcycle {lora} -o {out} --num-experts 2 --set speed=3",
        "speed is not an option of LoRAMoEConfig",
    ),
    "a wrong type": ("upcycle {lora} -o {out} --num-experts 2 --set top_k=two", "top_k='two' must be an integer"),
    "a name for a number": ("upcycle {lora} -o {out} --num-experts two", "invalid int value: 'two'"),
    "no base model": ("export-lora {homeless} -o {out}", "pass it as --base-model"),
    "an unknown base model": ("export-lora {adapter} -o {out} --base-model {nowhere}", "there is no such folder."),
    "another base model": (
        "export-lora {adapter} -o {out} --base-model {other}",
        "size mismatch for base_model.model",
    ),
    "gates that are not measured": (
        "export-lora {adapter} -o {out} --gates mean",
        "--gates mean needs calibration data: pass calibration, or use --gates uniform",
    ),
    "gates without weights": (
        "export-lora {adapter} -o {out} --gates groups",
        "--gates groups with no --weights: 'groups' and",
    ),
    "an unknown task type": (
        "export-lora {adapter} -o {out} --gates mean --task-type sports --calibration {texts}",
        "unknown name 'sports'",
    ),
    "a rank of nothing": ("export-lora {adapter} -o {out} --rank x", "'x' must be an integer, or the share to keep"),
    "no texts": ("surgery list {adapter} --calibration {nowhere}", "No such file"),
    "an empty file": ("surgery list {adapter} --calibration {nothing}", "has no record"),
    "no JSON": ("surgery list {adapter} --calibration {config}", "line 1: no valid JSON"),
    "no text": ("surgery list {adapter} --calibration {textless}", "line 2: must be a record like"),
    "batches of none": (
        "surgery list {adapter} --calibration {texts} --batch-size 0",
        "'0' must be an integer, at least 1",
    ),
    "texts for a classifier": (
        "surgery list {classifier} --calibration {texts}",
        "Texts need a causal language model",
    ),
    "an unknown expert": ("surgery remove {adapter} -o {out} --experts 7", "Expert 7 is unknown"),
    "groups torn apart": ("surgery reorder {adapter} -o {out} --order 0 2 1 3", "would be split"),
    "too few to merge": ("surgery merge {adapter} -o {out} --experts 1", "expected 2 arguments"),
    "nothing to analyze": ("analyze {adapter}", "arguments are required: --data"),
    "a type that is no type": (
        "analyze {adapter} --data {half_type}",
        "half_type, line 2: task_type=0.5 must be an index or a name",
    ),
    "an unknown type of text": ("analyze {adapter} --data {sports}", "unknown name 'sports'"),
    "statistics without a folder": (
        "analyze {adapter} --data {texts} -o {out}/s.json",
        "does not exist; create it first",
    ),
    "no text to trace": ("trace {adapter}", "arguments are required: --text"),
    "an empty text": ("trace {adapter} --text=", "--text '' has no tokens"),
    "a classifier's trace": ("trace {classifier} --text w3", "Texts need a causal language model"),
    "statistics in a folder's place": ("analyze {adapter} --data {texts} -o {empty}", "is a folder; name a file"),
    "a trace without a folder": ("trace {adapter} --text w3 -o {out}/t.json", "does not exist; create it first"),
    "no kind of figure": ("plot", "arguments are required: KIND"),
    "no figure": ("plot load {nothing}", "arguments are required: -o/--output"),
    "another suffix": ("plot load {nothing} -o {out}.txt", "must end in .png, .svg, .pdf"),
    "a figure without a folder": ("plot frontier {models} -o {out}/f.png", "does not exist; create it first"),
    "no statistics": ("plot load {models} -o {out}.png", "was not written by RouterStatistics.save"),
    "no trace": ("plot trace {models} -o {out}.png", "was not written by RouterTrace.save"),
    "no models": ("plot frontier {nowhere} -o {out}.png", "No such file"),
    "models that are no JSON": ("plot frontier {config} -o {out}.png", "config, line 1: no valid JSON (Expecting"),
    "one model alone": ("plot frontier {other}/config.json -o {out}.png", "must hold a list of records"),
    "a model without a label": ("plot frontier {models} -o {out}.png", "cannot be drawn: records[0] lacks label"),
    "run in the second place": ("--traceback run", "run: error: must be the first argument"),
    "nothing to run": ("run --", "run needs a program"),
    "an unknown program": ("run -- no_such_program", "is neither a file, nor a console script"),
    "an option to run": ("run -- --model hf", "--model is not a program"),
    "no module": ("run -- -m", "run -m needs the name of a module"),
    "an unknown module": ("run -- -m no_such_module", "there is no such module"),
    "an unknown parent": ("run -- -m no_such.module", "No module named 'no_such'"),
    "a folder of modules": ("run -- -m peft", "a package without __main__"),
    "no Python": ("run -- {config}", "is not a Python program"),
}


@pytest.fixture(scope="module")
def paths(base, adapter, loras, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    names = (
        "out",
        "empty",
        "nowhere",
        "homeless",
        "wrong",
        "half",
        "nothing",
        "textless",
        "config",
        "classifier",
        "other",
    )
    names += ("sports", "half_type", "models")
    found = {name: folder / name for name in names} | {"adapter": adapter, "lora": loras[0], "texts": calibration}
    found["empty"].mkdir()

    def copied(name, **options):
        changed_copy(adapter, found[name], lambda tensors: None)
        file = found[name] / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **options}))

    copied("homeless", base_model_name_or_path=None)
    copied("wrong", r=3)
    copied("classifier", task_type="SEQ_CLS")
    copied("half")
    (found["half"] / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-9])
    found["nothing"].write_text("\n")
    found["textless"].write_text('{"text": "w3"}\n{"texts": "w4"}\n')
    found["config"].write_text("{")
    found["sports"].write_text('{"text": "w3", "task_type": "sports"}')
    found["half_type"].write_text('{"text": "w3", "task_type": 0}\n{"text": "w3", "task_type": 0.5}')
    found["models"].write_text('[{"downstream": 1, "retention": 2}]')
    tiny_llama(intermediate_size=40).config.save_pretrained(found["other"])
    return found


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, paths, capsys, monkeypatch):
    protect_process(monkeypatch)
    try:
        code = main(words.format(**paths).split())
    except SystemExit as stopped:  # argparse
        code = stopped.code
    output, errors = capsys.readouterr()
    errors = [line for line in errors.splitlines() if line.strip() and "it/s]" not in line]  # progress bars
    assert (code, output, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("peft-loramoe") and ": error: " in errors[0] and message in errors[0]
    assert not [*paths["out"].parent.glob("out*")]


def test_the_traceback_is_shown_on_demand(paths):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        main(["--traceback", "inspect", str(paths["nowhere"])])


# --- run
# ---

PROGRAM = """
import json, os, sys
from peft import PeftType
json.dump([__name__, sys.argv, sys.path[0], "LORAMOE" in PeftType.__members__, os.environ["PYTHONPATH"]], sys.stdout)
sys.exit(3)
"""


def protect_process(monkeypatch):
    """`run` prepares the process for the program."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")


@pytest.mark.parametrize(
    "command", [["{script}"], ["python", "{script}"], ["-m", "program"], ["--", "python3", "-m", "program"]]
)
def test_scripts_and_modules_run_as_main(command, tmp_path, capsys, monkeypatch):
    protect_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with pytest.raises(SystemExit, match="3"):
        main(["run", *(word.format(script=script) for word in command), "--lr", "1", "--"])
    name, argv, first_path, registered, python_path = json.loads(capsys.readouterr().out)
    assert (name, registered, python_path) == ("__main__", True, f"{STARTUP}{os.pathsep}before")
    assert (argv, first_path) == ([str(script), "--lr", "1", "--"], str(tmp_path))


@pytest.mark.parametrize("words", [["-c", PROGRAM], ["python", "-c", PROGRAM], ["-"], ["--", "python3", "-"]])
def test_code_and_standard_input_run_as_main(words, capsys, monkeypatch):
    protect_process(monkeypatch)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROGRAM))
    with pytest.raises(SystemExit, match="3"):
        main(["run", *words, "--lr"])
    name, argv, first_path, registered, _ = json.loads(capsys.readouterr().out)
    assert (name, argv, first_path, registered) == ("__main__", ["-c" if "-c" in words else "-", "--lr"], "", True)


def test_programs_read_standard_input(tmp_path):
    (tmp_path / "program.py").write_text("print(input())")
    command = [sys.executable, "-m", "peft_loramoe", "run", str(tmp_path / "program.py")]
    assert subprocess.run(command, input="a line", capture_output=True, text=True, timeout=120).stdout == "a line\n"


def test_console_scripts_run(capsys, monkeypatch):
    protect_process(monkeypatch)
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--", "tqdm", "--version"])
    assert capsys.readouterr().out.strip() == version("tqdm")
    folder = sysconfig.get_path("scripts")
    assert (sys.argv[0], sys.path[0]) == (str(Path(folder, "tqdm")), folder)


@pytest.mark.parametrize("command", [["program.py"], ["-m", "program"]])
def test_a_program_that_ends_by_itself_has_succeeded(command, tmp_path, monkeypatch):
    protect_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text("value = 1")
    assert main(["run", *command]) is None


def test_what_the_program_raises_is_not_hidden(tmp_path, monkeypatch):
    protect_process(monkeypatch)
    (tmp_path / "program.py").write_text("raise ValueError('its own')")
    with pytest.raises(ValueError, match="its own"):
        main(["run", str(tmp_path / "program.py")])


FAKES = {
    "sitecustomize.py": "print('the hidden sitecustomize')",
    "peft.py": "PeftType = 'old'",
    "peft_loramoe.py": "import peft; peft.PeftType = 'LORAMOE'",
}


def child(folder, code, **files):
    """What a Python process prints that a program under `run` starts, with stand-ins for the slow packages."""
    for name, text in {**FAKES, **files}.items():
        (folder / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STARTUP), str(folder)])}
    command = [sys.executable, "-c", f"import sys; {code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=60)


CHILDREN = {
    "imports peft": ("import peft; print(peft.PeftType)", "LORAMOE"),
    "asks for peft first": (
        "from importlib.util import find_spec; find_spec('peft'); import peft; print(peft.PeftType)",
        "LORAMOE",
    ),
    "imports peft_loramoe": ("import peft_loramoe, peft; print(peft.PeftType)", "LORAMOE"),
    "does without peft": ("print('peft_loramoe' in sys.modules)", "False"),
    "does not see the folder": ("print(any('startup' in path for path in sys.path))", "False"),
}


@pytest.mark.parametrize("code, expected", CHILDREN.values(), ids=CHILDREN)
def test_child_processes_know_loramoe_once_they_import_peft(code, expected, tmp_path):
    result = child(tmp_path, code)
    assert (result.stdout.splitlines(), result.stderr) == (["the hidden sitecustomize", expected], "")


def test_a_sitecustomize_that_raises_does_not_keep_loramoe_from_children(tmp_path):
    result = child(
        tmp_path, "import peft; print(peft.PeftType)", **{"sitecustomize.py": "raise RuntimeError('its own')"}
    )
    assert result.stdout.split() == ["LORAMOE"] and "its own" in result.stderr


@pytest.mark.parametrize("kind", ["folder", "pyz"])
def test_folders_and_archives_with_a_main_run(kind, tmp_path, capsys, monkeypatch):
    protect_process(monkeypatch)
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "__main__.py").write_text(f"import helper_of_the_program\n{PROGRAM}")
    (folder / "helper_of_the_program.py").touch()
    target = folder
    if kind == "pyz":
        target = tmp_path / "program.pyz"
        zipapp.create_archive(folder, target, interpreter="/usr/bin/env python3")
    with pytest.raises(SystemExit, match="3"):
        main(["run", str(target), "--lr"])
    sys.modules.pop("helper_of_the_program", None)
    name, argv, first_path, registered, _ = json.loads(capsys.readouterr().out)
    assert (name, argv, first_path, registered) == ("__main__", [str(target), "--lr"], str(target), True)


def test_an_archive_without_a_main_is_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("data.txt", "text")
    assert main(["run", str(tmp_path / "data.zip")]) == 2
    assert "the archive has no __main__.py" in capsys.readouterr().err


# Each command runs in a fork of a process that has imported what all of them need.
INTERRUPTED = """
import json, os, sys, time, torch
from peft_loramoe.cli import main
from peft_loramoe.interop import files

def stop(tensors, path, *_):
    path.write_bytes(b"half of the ")
    os.kill(os.getpid(), kind)
    time.sleep(30)

torch.save = files.save_file = stop
codes = []
for kind, words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""
WRITERS = {
    "convert": "convert {adapter} -o {out} --to authors",
    "export-lora": "export-lora {adapter} -o {out}",
    "upcycle": "upcycle {lora} --num-experts 2 -o {out}",
    "surgery": "surgery reorder {adapter} -o {out} --order 0 1 2 3",
}


STOPS = {f"{command}-{kind.name}": (command, kind) for command in WRITERS for kind in (signal.SIGTERM, signal.SIGKILL)}


@pytest.fixture(scope="module")
def stopped(adapter, loras, tmp_path_factory):
    """The exit code, the folder and the error output of each command that was stopped while it wrote."""
    folders = {name: tmp_path_factory.mktemp(name) for name in STOPS}
    calls = []
    for name, (command, kind) in STOPS.items():
        words = WRITERS[command].format(adapter=adapter, lora=loras[0], out=folders[name] / "output").split()
        calls.append((int(kind), words))
    command = [sys.executable, "-c", INTERRUPTED, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {name: (code, folders[name], done.stderr) for name, code in zip(STOPS, codes, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_a_command_that_is_stopped_leaves_no_output(name, stopped):
    (_, kind), (code, folder, errors) = STOPS[name], stopped[name]
    hidden = [path.name.startswith(".output") for path in folder.iterdir()]
    if kind == signal.SIGTERM:
        assert (code, hidden) == (128 + kind, []), errors
    else:  # nothing can be cleaned up
        assert (code, hidden) == (-kind, [True]), errors


def test_a_child_of_another_environment_is_told(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'peft_loramoe'\", name='peft_loramoe')"
    result = child(tmp_path, "import peft; print(peft.PeftType)", **{"peft_loramoe.py": missing})
    assert result.stdout.splitlines()[1] == "old" and "peft_loramoe is not installed for" in result.stderr


# --- lm-eval


@pytest.mark.slow
def test_lm_eval_loads_adapters_only_through_run(tmp_path, base, adapter):
    texts = [text for text, _ in TEXTS]
    tasks = write_task(tmp_path / "tasks", texts)
    model = f"pretrained={base},peft={adapter},dtype=float32"
    options = ["--model", "hf", "--model_args", model, "--tasks", NAME, "--include_path", tasks]
    options += ["--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / "results"]
    scripts = Path(sysconfig.get_path("scripts"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with_run, without = (
        subprocess.Popen([*launcher, *options], stderr=subprocess.PIPE, text=True, env=environment)
        for launcher in ([scripts / "peft-loramoe", "run", "--", "lm_eval"], [scripts / "lm_eval"])
    )
    assert "KeyError: 'LORAMOE'" in without.communicate(timeout=300)[1] and without.returncode == 1
    errors = with_run.communicate(timeout=300)[1]
    assert with_run.returncode == 0, errors
    (file,) = (tmp_path / "results").rglob("results*.json")
    measured = json.loads(file.read_text())["results"][NAME]["word_perplexity,none"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert measured == pytest.approx(word_perplexity(model, texts), rel=1e-5)
