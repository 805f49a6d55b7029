import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import peft_loramoe
from example_scripts import RECORD, build_toy, write_lines
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.cli import main
from peft_loramoe.cli.arguments import build_parser
from peft_loramoe.cli.train import adapter_config, config_fields, training_config
from peft_loramoe.cli.train_run import base_model, checkpoint_to_resume, read_data, split_anchors, tokenize_texts
from peft_loramoe.cli.train_run import build as build_run
from peft_loramoe.fields import PRESETS
from peft_loramoe.training.anchor_pass import ANCHOR_OPTIONS, AnchorBatches


NAMES = ["facts", "skills"]
CHAT = [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris"}]
TWO_ANSWERS = [*CHAT, {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "in Europe"}]
UNMARKED = "{{ bos_token }}{% for message in messages %}{{ message.content }} {{ eos_token }}{% endfor %}"
MIXED = [{**RECORD, "task_type": n % 2, "output": f"Paris {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def arguments(tmp_path, toy_folder):
    """A function that writes the records and gives the command line that trains on them for two steps."""

    def build(*options, records=MIXED):
        train_file = write_lines(tmp_path / "train.jsonl", *records)
        given = ["--model", toy_folder, "--train-file", train_file, "--output-dir", tmp_path / "out", "--max-steps", 2]
        small = ["--no-bf16", "--batch-size", 2, "--gradient-accumulation-steps", 1]
        return ["train", *(str(value) for value in (*given, *small, *options))]

    return build


@pytest.fixture
def trainer(arguments):
    return lambda *options, **data: build_run(build_parser().parse_args(arguments(*options, **data)))[0]


def learned(row):
    return [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]


def parse(*options):
    return build_parser().parse_args(["train", "--model", "m", "--train-file", "t.json", *options])


# --- options


def test_every_config_option_has_a_flag(capsys):
    given = ["--num-experts", "4", "--expert-groups", "[1, 3]", "--null-groups", "[0]", "--top-k", "2", "--use-rslora"]
    given += ["--target-modules", "all-linear", "--balance-delta", "0.3", "--task-type-names", '["a", "b"]']
    config = adapter_config(parse(*given))
    assert (config.num_experts, config.expert_groups, config.null_groups, config.top_k) == (4, [1, 3], [0], 2)
    assert (config.target_modules, config.balance_delta, config.use_rslora) == ("all-linear", 0.3, True)
    assert (config.task_type_names, config.r) == (["a", "b"], 4)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in config_fields())


def test_help_of_anchor_options_has_the_defaults_of_the_mixin(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, default) in ANCHOR_OPTIONS.items():
        shown = text[text.rindex(f"--{name.replace('_', '-')} N") :]
        value = "a tenth of its samples" if default is None else f"{default:g}"
        assert f"(default: {value})" in shown[:200]


@pytest.mark.parametrize(
    ("preset", "config"),
    [("retain", LoRAMoEConfig.retain), ("paper", LoRAMoEConfig.paper), ("plain", LoRAMoEConfig)],
)
def test_presets(preset, config):
    assert adapter_config(parse("--preset", preset, "--r", "6")) == config(r=6, task_type="CAUSAL_LM")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_the_help_are_those_of_the_config(preset):
    config = getattr(LoRAMoEConfig, preset)()
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_retain_is_the_default():
    assert adapter_config(parse()) == LoRAMoEConfig.retain(task_type="CAUSAL_LM")


def test_options_that_contradict_the_preset_are_refused():
    with pytest.raises(ValueError, match=r"--preset retain \(null_groups=None\): group 0 is not null"):
        adapter_config(parse("--null-groups", "null"))


def test_training_options_reach_the_trainer():
    given = [
        "--epochs",
        "2",
        "--learning-rate",
        "1e-3",
        "--no-bf16",
        "--packing",
        "--max-length",
        "64",
        "--save-steps",
        "0",
    ]
    training = training_config(parse(*given, "--trainer-args", '{"optim": "sgd", "learning_rate": 0.5}'))
    assert (training.num_train_epochs, training.bf16, training.packing, training.max_length) == (2, False, True, 64)
    assert (training.optim, training.learning_rate, training.save_strategy) == ("sgd", 0.5, "no")
    assert training.gradient_checkpointing and training.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim=sgd", "--trainer-args 'optim=sgd' is not a JSON object"),
        ("[1]", r"--trainer-args \[1\] is not a JSON object"),
        ('{"learning_rat": 1}', "SFTConfig has no option 'learning_rat'; did you mean 'learning_rate'?"),
        ('{"qqq": 1}', "SFTConfig has no option 'qqq'; the documentation of trl.SFTConfig"),
        ('{"lr_scheduler_type": "sloped"}', "SFTConfig refuses the training options: .*sloped.* is not a valid"),
    ],
)
def test_wrong_trainer_args_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        training_config(parse("--trainer-args", text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --train-file or --dataset"),
        (["--train-file", "t.json", "--dataset", "d"], "give either --train-file or --dataset"),
        (
            ["--train-file", "t.json", "--eval-split", "test"],
            "--eval-split test has no effect without --dataset; with --train-file, give --eval-file",
        ),
        (
            ["--train-file", "t.json", "--train-split", "train"],
            "--train-split train has no effect without --dataset; leave it out",
        ),
        (
            ["--train-file", "t.json", "--dataset-config", "en"],
            "--dataset-config en has no effect without --dataset; leave it out",
        ),
        (["--train-file", "t.json", "--anchors-every", "1"], "--anchors-every 1 has no effect without anchors; give"),
        (
            ["--train-file", "t.json", "--anchor-kl-weight", "7"],
            "--anchor-kl-weight 7.0 has no effect without anchors; give some, or leave it out",
        ),
    ],
)
def test_options_that_exclude_each_other(capsys, options, message):
    assert main(["train", "--model", "m", *options]) == 2
    assert message in capsys.readouterr().err


# --- --config


def config_file(folder, text):
    (folder / "train.yaml").write_text(text)
    return ["train", "--config", str(folder / "train.yaml")]


def test_a_file_gives_the_options(tmp_path):
    text = """
        model: m
        train_file: [a.jsonl, b.jsonl]
        learning-rate: 1e-3
        packing: true
        bf16: false
        resume: false
        null-groups: [0]
        top-k: null
        target_modules: all-linear
        trainer_args: {optim: adafactor}
    """
    options = build_parser().parse_args(config_file(tmp_path, text))
    assert (options.model, options.train_file) == ("m", [Path("a.jsonl"), Path("b.jsonl")])
    assert (options.learning_rate, options.packing, options.bf16, options.resume) == (1e-3, True, False, False)
    assert (options.null_groups, options.target_modules) == ([0], "all-linear") and not hasattr(options, "top_k")
    assert options.trainer_args == {"optim": "adafactor"}


def test_flags_override_the_file(tmp_path):
    given = config_file(tmp_path, "model: m\ntrain-file: a.jsonl\nepochs: 2\nseed: 3\n")
    options = build_parser().parse_args([*given, "--epochs", "5", "--train-file", "b.jsonl"])
    assert (options.epochs, options.seed, options.train_file) == (5.0, 3, [Path("b.jsonl")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "there is no option 'learning_rat'; did you mean learning-rate?"),
        ("config: a.yaml", "there is no option 'config'"),
        ("no-packing: true", "there is no option 'no-packing'"),
        ("packing: maybe", "packing is 'maybe'; write true or false"),
        ("epochs: [1, 2]", "epochs is [1, 2]; write one value"),
        ("epochs: many", "argument --epochs: 'many' must be a number above 0"),
        ("- epochs", "must hold lines like `learning-rate: 1e-3`, not ['epochs']"),
        ("epochs: {", "cannot be read as YAML"),
        ("rank-pattern: " + "[" * 3000, "cannot be read as YAML (it is nested too deeply)"),
        ("rank-pattern: {a: 2026-01-01}", "rank-pattern is {'a': datetime.date(2026, 1, 1)}, which JSON cannot say"),
        ("rank-pattern: &a [*a]", "which JSON cannot say (Circular reference detected)"),
        ("max-length: 8\nmax_length: 9", "'max-length' stands there 2 times; write it once"),
    ],
)
def test_errors_of_the_file_name_the_key(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as error:
        main([*config_file(tmp_path, text), "--model", "m", "--train-file", "t.json"])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "missing.yaml"])
    assert "missing.yaml cannot be read" in capsys.readouterr().err


# --- data


def test_splits_of_a_data_set(tmp_path):
    write_lines(tmp_path / "train.jsonl", *({**RECORD, "task_type": name} for name in NAMES))
    write_lines(tmp_path / "test.jsonl", {**RECORD, "task_type": "skills"})
    given = ["train", "--model", "m", "--dataset", str(tmp_path)]
    config = LoRAMoEConfig(task_type_names=NAMES)
    train, evaluation = read_data(build_parser().parse_args([*given, "--eval-split", "test"]), config)
    assert ([r.task_type for r in train], list(evaluation)) == ([0, 1], ["test"])
    assert (evaluation["test"][0].place, evaluation["test"][0].task_type) == (f"{tmp_path}, test, row 0", 1)
    with pytest.raises(ValueError, match=f"--dataset {tmp_path}, split 'dev': "):
        read_data(build_parser().parse_args([*given, "--train-split", "dev"]), config)


def test_evaluation_sets_need_different_names(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = [str(write_lines(folder / "test.jsonl", RECORD)) for folder in (tmp_path, tmp_path / "sub")]
    options = build_parser().parse_args(["train", "--model", "m", "--train-file", paths[0], "--eval-file", *paths])
    with pytest.raises(ValueError, match=r"--eval-file .*: there is another evaluation set called 'test'; rename"):
        read_data(options, LoRAMoEConfig())


def test_prompts_are_learned_without_answer_only(trainer):
    row = trainer("--no-answer-only").train_dataset[0]
    assert row["labels"] == row["input_ids"]


def test_text_and_conversations_train_together(trainer):
    records = [RECORD, {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 1}]
    assert sorted(trainer(records=records).train_dataset["task_type"]) == [0, 1]


def test_every_answer_is_learned_where_the_template_marks_them(trainer, toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    row = trainer(records=[{"messages": TWO_ANSWERS, "task_type": 0}]).train_dataset[0]
    answers = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Paris", "in Europe")]
    assert learned(row) == [*answers[0], tokenizer.eos_token_id, *answers[1], tokenizer.eos_token_id]


def test_last_answer_is_learned_where_it_does_not_and_that_is_said(trainer, tmp_path, toy_folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    template = tmp_path / "template.jinja"
    template.write_text(UNMARKED)
    row = trainer("--chat-template", template, records=[{"messages": TWO_ANSWERS, "task_type": 0}]).train_dataset[0]
    assert learned(row) == [*tokenizer("in Europe", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert "Only the last answer of each conversation is learned" in capsys.readouterr().out
    trainer("--chat-template", template, records=[{"messages": CHAT, "task_type": 0}])
    assert "Only the last answer" not in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_what_max_length_takes_away_is_said(trainer, packing):
    with pytest.warns(
        UserWarning, match="training data: 1 of 2 records are longer than --max-length 40; their end is cut off"
    ):
        trainer(packing, "--max-length", 40, records=[RECORD, {**RECORD, "output": "1 " * 50}])


def test_prompts_that_fill_max_length(trainer):
    long = {**RECORD, "input": "1 " * 50}
    with pytest.warns(UserWarning, match="1 of 2 records are left out: the prompt alone fills --max-length 40"):
        assert len(trainer("--max-length", 40, records=[RECORD, long]).train_dataset) == 1
    with pytest.raises(ValueError, match="in every record the prompt alone fills --max-length 40; raise it"):
        trainer("--max-length", 40, records=[long])


def test_data_of_one_type_without_anchors_are_warned_about(trainer):
    with pytest.warns(UserWarning, match="All records are of one kind, so nothing tells the routers"):
        trainer(records=[{"prompt": "x", "completion": "y"}] * 2)


# --- model and training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts", "1"], "error: --num-experts 1 must be"),
        (["--router-lr-multiplier", "0"], "error: --router-lr-multiplier 0.0 must be in (0, "),
        (["--null-groups", "null"], "--preset retain (no --null-groups): group 0 is not null"),
        (["--anchors-every", "2", "--anchors", "missing.jsonl"], "missing.jsonl cannot be read: No such file"),
        (["--train-file", "missing.json"], "error: missing.json cannot be read"),
        (["--report-to", "nothing", "--train-file", "missing.json"], "--report-to nothing: transformers has no such"),
        (
            ["--report-to", "clearml", "--train-file", "missing.json"],
            "--report-to clearml: its package is not installed",
        ),
        (["--model", "no/such-model"], "error: --model no/such-model: there is no such folder"),
        (["--chat-template", "missing.jinja"], "error: --chat-template missing.jinja cannot be read"),
        (["--target-modules", '["nothing"]'], "nothing"),
        pytest.param(
            ["--target-modules", '["lm_head"]'],
            "Applying a PEFT adapter to `lm_head` is not supported",
            marks=pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="this TRL trains it"),
        ),
        (
            ["--trainer-args", '{"packing_strategy": "wrapped"}', "--packing"],
            "packing_strategy='wrapped' keeps no boundaries",
        ),
    ],
)
def test_input_errors_are_one_line(arguments, capsys, options, message):
    assert main(arguments(*options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: '0' must be an integer, at least 1"),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps: '0' must be an integer, at least 1"),
        (["--max-length", "0"], "--max-length: '0' must be an integer, at least 1"),
        (["--max-steps", "0"], "--max-steps: '0' must be an integer, at least 1"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' must be a number above 0"),
        (["--epochs", "-1"], "--epochs: '-1' must be a number above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        parse(*options)
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_created_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(arguments("--output-dir", folder)) == 2
        assert f"--output-dir {folder}: {tmp_path / 'file'} is a file; choose" in capsys.readouterr().err


ANCHOR_FILES = {
    "empty": (b"", "holds no anchor"),
    "another tokenizer": (b'{"text": "<|begin_of_text|> Paris"}', "which the tokenizer does not know"),
    "too long": (b'{"text": "' + b"Paris " * 200 + b'"}', "more than --max-length 48"),
    "identical": (b'{"text": "Paris"}\n' * 9, "are the same text"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "line 1: the byte 0xe9 is no UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), ANCHOR_FILES.values(), ids=ANCHOR_FILES)
def test_bad_anchors_are_one_line(arguments, tmp_path, capsys, content, message):
    (tmp_path / "anchors.jsonl").write_bytes(content)
    assert main(arguments("--anchors", tmp_path / "anchors.jsonl", "--max-length", 48)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_checkpointing_that_zero_3_would_make_reentrant_is_refused(trainer, monkeypatch):
    launched = property(lambda self: SimpleNamespace(zero_stage=3), lambda self, value: None)
    monkeypatch.setattr(SFTConfig, "deepspeed_plugin", launched, raising=False)
    with pytest.raises(ValueError, match="--gradient-checkpointing: with DeepSpeed ZeRO-3.*use ZeRO-2 or FSDP"):
        trainer()


def test_router_and_b_may_learn_at_their_own_rates(trainer):
    rates = ("--router-lr-multiplier", 50, "--loraplus-lr-ratio", 8, "--learning-rate", 0.01, "--weight-decay", 0.1)
    built = trainer(*rates)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in built.model.named_parameters()}
    groups = built.create_optimizer().param_groups
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates == {"A": 0.01, "B": 0.08, "router": 0.5}
    assert type(built.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(("flags", "bf16"), [(["--device", "cpu"], False), (["--device", "cpu", "--bf16"], True)])
def test_bfloat16_has_to_be_asked_for_on_a_cpu(flags, bf16, tmp_path):
    options = parse("--output-dir", str(tmp_path / "out"), *flags)
    assert training_config(options).bf16 is bf16
    assert base_model(options).dtype == ("bfloat16" if bf16 else "float32")


def test_adapter_of_a_quantised_model_stays_float32(trainer):
    model = trainer("--load-in-4bit", "--bf16").model
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())


@pytest.mark.parametrize("options", [[], ["--preset", "plain", "--balance-loss-weight", "0"]], ids=["retain", "plain"])
def test_weights_in_4_bits_are_not_packed_for_inference(options, trainer, monkeypatch):
    """As bitsandbytes does on a CPU with AVX512-BF16, after which they pass no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    built = trainer("--load-in-4bit", "--no-bf16", *options)
    linears = [m for m in built.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert linears and not any(linear.support_avx512bf16_for_cpu for linear in linears)
    assert built.evaluate(built.train_dataset)["eval_loss"] > 0
    assert not any(getattr(linear.weight.quant_state, "packing_format_for_cpu", False) for linear in linears)


def test_packed_training_saves_an_adapter_that_loads(arguments, tmp_path, toy_folder, capsys):
    records = [{**RECORD, "task_type": name, "output": f"Paris {n}"} for n in range(8) for name in NAMES]
    evaluation = [str(write_lines(tmp_path / f"{name}.jsonl", *records[:3])) for name in ("old", "new")]
    options = ["--packing", "--max-length", "64", "--logging-steps", "1", "--task-type-names", json.dumps(NAMES)]
    assert main(arguments(*options, "--eval-file", *evaluation, "--report-to", "tensorboard", records=records)) == 0
    out = tmp_path / "out"
    assert (
        "import peft_loramoe" in capsys.readouterr().out and "import peft_loramoe" in (out / "README.md").read_text()
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["null_groups"], config["r"]) == ("LORAMOE", [0], 4)
    assert {"eval_old_loss", "eval_new_loss"} <= json.loads((out / "eval_results.json").read_text()).keys()
    reported = b"".join(path.read_bytes() for path in out.glob("runs/**/events.out.tfevents.*"))
    assert b"router/layers_0/skills/weight_skills" in reported and b"eval/old_loss" in reported
    assert AutoTokenizer.from_pretrained(out).chat_template
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_folder), out)
    saved = load_file(out / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if name.endswith("B"))
    assert len(saved) == sum(
        parameter.requires_grad or "loramoe" in name for name, parameter in model.named_parameters()
    )


def test_resumed_training_ends_where_the_whole_would_have(arguments, tmp_path, capsys):
    command = arguments("--max-steps", 4, "--save-steps", 2, "--learning-rate", 0.01)
    assert main(command) == 0
    out = tmp_path / "out"
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_model.safetensors").unlink()
    assert main(command) == 2
    assert (
        "holds checkpoint-2 of an earlier run; continue it with --resume, or give another" in capsys.readouterr().err
    )
    assert main([*command, "--resume"]) == 0
    assert f"resuming from {out / 'checkpoint-2'}" in capsys.readouterr().out
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_without_a_checkpoint_starts_afresh_aloud(tmp_path, capsys):
    assert checkpoint_to_resume(parse("--resume", "--output-dir", str(tmp_path))) is None
    assert f"no complete checkpoint in {tmp_path}: starting afresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds adapter_model.safetensors of an earlier run; give another folder"),
        (["--resume"], "of an earlier run, and no complete checkpoint to resume from; give another folder"),
    ],
)
def test_an_adapter_is_not_overwritten(options, message, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "checkpoint-2").mkdir()  # torn
    with pytest.warns(UserWarning, match="checkpoint-2"), pytest.raises(ValueError, match=message):
        checkpoint_to_resume(parse(*options, "--output-dir", str(tmp_path)))


def test_anchors_train_and_a_tenth_measures(arguments, tmp_path, capsys):
    anchors = write_lines(tmp_path / "anchors.jsonl", *({"text": f"Paris {n}"} for n in range(20)))
    records = [{"prompt": f"{n}", "completion": " one"} for n in range(8)]
    weights = ("--anchor-loss-weight", 0.2, "--anchor-kl-weight", 0.1)
    options = ("--anchors", anchors, *weights, "--anchors-per-batch", 2, "--logging-steps", 1)
    assert main(arguments(*options, records=records)) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 training records: 8 tasks; 20 anchors, 2 of them held back to measure on\n")
    assert "  anchors " in out and "  anchors' KL " in out and "null weight: knowledge 0." in out
    assert [line.split()[1:4] for line in out.splitlines() if "anchors held" in line] == [["held", "back", "2"]]


def test_anchors_reach_the_trainer(trainer, tmp_path):
    anchors = write_lines(tmp_path / "anchors.jsonl", *({"text": f"Paris {n}"} for n in range(20)))
    built = trainer("--anchors", anchors, "--anchor-loss-weight", 0.25, "--anchors-per-batch", 3, "--anchors-every", 2)
    given = built._anchors
    assert (given._loss_weight, given._kl_weight, given._per_batch, given._every) == (0.25, 0.3, 3, 2)
    assert len(given._batches) == 18


def test_anchor_options_are_checked_before_anything_is_read(arguments, capsys):
    assert main(arguments("--anchors", "missing.jsonl", "--anchor-loss-weight", -1, "--model", "no/such")) == 2
    assert "error: --anchor-loss-weight -1.0 must be in [0, 1e+06]" in capsys.readouterr().err


def test_anchors_held_back_are_tokenized_as_those_trained_on(toy_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    assert "<|turn|>" not in tokenizer.all_special_tokens
    texts = ["<|turn|>Paris", "Paris in"]
    rows = tokenize_texts([{"text": text} for text in texts], tokenizer, None)
    assert rows["input_ids"][0][0] != begin[1] == rows["input_ids"][1][0]
    trained_on = [row.tolist() for row in AnchorBatches(texts, tokenizer)._rows]
    assert list(rows["input_ids"]) == list(rows["labels"]) == trained_on


def test_an_anchor_held_back_may_not_be_too_long(toy_folder):
    with pytest.raises(ValueError, match="more than max_length=8"):
        tokenize_texts([{"text": "Paris " * 9}], AutoTokenizer.from_pretrained(toy_folder), 8)


def test_few_anchors_are_all_trained_on(tmp_path):
    path = write_lines(tmp_path / "anchors.jsonl", *({"text": f"text {n}"} for n in range(1000)))
    kept, held_back = split_anchors(path)
    assert (len(kept), len(held_back)) == (938, 62)
    assert split_anchors(write_lines(path, *({"text": f"text {n}"} for n in range(9))))[1] == []


def test_a_file_without_anchors_is_refused(arguments, tmp_path, capsys):
    assert main(arguments("--anchors", write_lines(tmp_path / "anchors.jsonl"))) == 2
    assert "anchors.jsonl holds no anchor" in capsys.readouterr().err


# --- what is shown


def test_what_a_run_prints(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(arguments("--logging-steps", "1")) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 training records: 4 knowledge, 4 tasks\n")
    assert "step 1/2  loss " in out and "  balance term " in out and "  null weight: " in out
    table = out[out.index("Learned and kept") :]
    assert "training data, knowledge" in table and "training data, tasks" in table and "null group" in table
    assert not [line for line in table[: table.index("Wrote")].splitlines() if len(line) > 80]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_adapter(arguments, tmp_path):
    records = [{**RECORD, "task_type": n % 2, "output": f"Paris {n}"} for n in range(16)]
    # --cpu would start one process only: accelerate wants MPI for more.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launcher, "-m", "peft_loramoe"]
    command += arguments("--packing", "--max-length", 64, "--save-steps", 1, records=records)
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_loramoe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("To load the adapter") == done.stdout.count("Learned and kept") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()
    }
