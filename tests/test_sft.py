import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from example_scripts import RECORD, build_toy, run_script, write_lines
from peft_loramoe import LoRAMoEConfig


NAMES = ["facts", "skills"]
CHAT = [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris"}]
TWO_ANSWERS = [*CHAT, {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "in Europe"}]
TEXT = {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 1}
UNMARKED = "{{ bos_token }}{% for message in messages %}{{ message.content }} {{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def tokenizer(toy_folder):
    return AutoTokenizer.from_pretrained(toy_folder)


@pytest.fixture
def arguments(tmp_path, toy_folder):
    """A function that writes the records and gives the command line that trains on them for two steps."""

    def build(*options, records=(RECORD,) * 8):
        train_file = write_lines(tmp_path / "train.jsonl", *records)
        given = ["--model", toy_folder, "--train-file", train_file, "--output-dir", tmp_path / "out", "--max-steps", 2]
        small = ["--no-bf16", "--batch-size", 2, "--gradient-accumulation-steps", 1]
        return [str(value) for value in (*given, *small, *options)]

    return build


@pytest.fixture
def trainer(arguments):
    return lambda *options, **data: sft.build_trainer(sft.parse_arguments(arguments(*options, **data)))


def learned(row):
    return [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]


# --- options ----------------------------------------------------------------------------------------------------------


def parse(*options):
    return sft.parse_arguments(["--model", "m", "--train-file", "t.json", *options])


def test_every_config_option_has_a_flag():
    given = ["--num-experts", "4", "--expert-groups", "[1, 3]", "--null-groups", "[0]", "--top-k", "2", "--use-rslora"]
    given += ["--target-modules", "all-linear", "--balance-delta", "0.3", "--task-type-names", '["a", "b"]']
    config = sft.build_config(parse(*given))
    assert (config.num_experts, config.expert_groups, config.null_groups, config.top_k) == (4, [1, 3], [0], 2)
    assert (config.target_modules, config.balance_delta, config.use_rslora) == ("all-linear", 0.3, True)
    assert (config.task_type_names, config.r) == (["a", "b"], 4)
    text = sft.build_parser().format_help()
    assert all(f"--{field.name.replace('_', '-')}" in text for field in sft.config_fields())


@pytest.mark.parametrize(
    ("preset", "config"),
    [("retain", LoRAMoEConfig.retain), ("paper", LoRAMoEConfig.paper), ("plain", LoRAMoEConfig)],
)
def test_presets(preset, config):
    given = ["--preset", preset, "--r", "6"]
    assert sft.build_config(parse(*given)) == config(r=6, task_type="CAUSAL_LM")


def test_retain_is_the_default():
    assert sft.build_config(parse()) == LoRAMoEConfig.retain(task_type="CAUSAL_LM")


def test_options_that_contradict_the_preset_are_refused():
    with pytest.raises(sft.InputError, match=r"retain\(null_groups=None\): group 0 is not null"):
        sft.build_config(parse("--null-groups", "null"))


def test_training_options_reach_the_trainer():
    given = ["--epochs", "2", "--learning-rate", "1e-3", "--no-bf16", "--packing", "--max-length", "64", "--save-steps", "0"]
    training = sft.build_training_config(parse(*given, "--trainer-args", '{"optim": "sgd", "learning_rate": 0.5}'))
    assert (training.num_train_epochs, training.bf16, training.packing, training.max_length) == (2, False, True, 64)
    assert (training.optim, training.learning_rate, training.save_strategy) == ("sgd", 0.5, "no")
    assert training.gradient_checkpointing and training.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim=sgd", "--trainer-args 'optim=sgd' is not a JSON object"),
        ("[1]", r"--trainer-args '\[1\]' is not a JSON object"),
        ('{"learning_rat": 1}', "SFTConfig has no option 'learning_rat'; did you mean 'learning_rate'?"),
        ('{"qqq": 1}', "SFTConfig has no option 'qqq'; the documentation of trl.SFTConfig"),
        ('{"lr_scheduler_type": "sloped"}', "SFTConfig refuses the training options: .*sloped.* is not a valid"),
    ],
)
def test_wrong_trainer_args_are_named(text, message):
    with pytest.raises(sft.InputError, match=message):
        sft.build_training_config(parse("--trainer-args", text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --train-file or --dataset"),
        (["--train-file", "t.json", "--dataset", "d"], "give either --train-file or --dataset"),
        (["--train-file", "t.json", "--eval-split", "test"], "--eval-split test is a split of --dataset; with --train-file"),
    ],
)
def test_sources_of_data_that_exclude_each_other(capsys, options, message):
    with pytest.raises(SystemExit):
        sft.main(["--model", "m", *options])
    assert message in capsys.readouterr().err


# --- records ----------------------------------------------------------------------------------------------------------


def without(column):
    return {name: value for name, value in RECORD.items() if name != column}


def chat(*turns):
    return json.dumps({"messages": turns, "task_type": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no records"),
        ("[]", "there are no records"),
        (json.dumps(RECORD) + '\n\n{"instruction": }', r"line 3: not valid JSON \(Expecting value, column 17\)"),
        ('[\n{"instruction": "x"},\n]', r"line \d: not valid JSON"),
        (json.dumps(RECORD) + "\n" + json.dumps(without("output")), "line 2: the column 'output' is missing"),
        (json.dumps([RECORD, without("task_type")]), "record 2: the column 'task_type' is missing"),
        (json.dumps({"prompt": "x", "task_type": 0}), "line 1: the column 'completion' is missing"),
        (json.dumps({**RECORD, "output": 42}), "line 1: output is 42; write it as a string"),
        (json.dumps({**RECORD, "output": " "}), "line 1: output is ' '; give the answer"),
        (json.dumps({**TEXT, "completion": ""}), "line 1: completion is ''; give the answer"),
        (json.dumps({**TEXT, "prompt": CHAT[:1]}), "line 1: prompt is .*; write it as a string"),
        ("17", "line 1: 17 is not an object"),
        (json.dumps({**RECORD, "task_type": "qa"}), "line 1: unknown task_type 'qa'; write one of 'facts', 'skills'"),
        (json.dumps({**RECORD, "task_type": 2}), "line 1: unknown task_type 2; .* an integer from 0 to 1"),
        (json.dumps({**RECORD, "task_type": True}), "line 1: unknown task_type True"),
        (chat(), r"line 1: messages is \[\]; write a list of turns"),
        (chat(CHAT[0], "Paris"), "line 1: messages: turn 2 is 'Paris'; write an object with the strings role and content"),
        (chat(CHAT[0], {**CHAT[1], "tool_calls": [1]}), "line 1: messages: turn 2 is .*tool_calls.* no more"),
        (chat(CHAT[0], {"role": "assistant", "content": 3}), "line 1: messages: turn 2 is .*strings role and content"),
        (chat(*CHAT, CHAT[0]), "line 1: messages ends with a turn of 'user'; end with the assistant's answer"),
        (chat(CHAT[1]), "line 1: messages has one turn only; write what is asked"),
        (chat(CHAT[0], {"role": "assistant", "content": "\n"}), r"line 1: messages is '\\n'; give the answer"),
        (json.dumps(RECORD) + "\n" + json.dumps(TEXT), "line 2: the prompt is text, but in .*line 1 it is a conversation"),
    ],
)
def test_errors_of_the_train_file_name_the_place(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(sft.InputError, match=f"train.jsonl[:,] ?{message}"):
        sft.read_file(path, LoRAMoEConfig(task_type_names=NAMES))


def test_unknown_name_without_names_says_how_to_give_them(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", {**RECORD, "task_type": "qa"})
    with pytest.raises(sft.InputError, match="give them with --task-type-names"):
        sft.read_file(path, LoRAMoEConfig())


def test_names_and_numbers_are_task_types(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", *({**RECORD, "task_type": t} for t in ("skills", 0, -1)))
    records = sft.read_file(path, LoRAMoEConfig(task_type_names=NAMES))
    assert [record.task_type for record in records] == [1, 0, -1]


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": CHAT[0]["content"], "input": "", "output": "Paris"},
        {"instruction": CHAT[0]["content"], "output": "Paris"},
        {"instruction": "", "input": CHAT[0]["content"], "output": "Paris", "source": "ignored"},
    ],
)
def test_formats_say_the_same(columns):
    record = sft.check_record("here", {**columns, "task_type": 1}, LoRAMoEConfig())
    assert record == sft.Record("here", CHAT[:1], CHAT[1:], 1)


def test_splits_of_a_data_set(tmp_path, toy_folder):
    write_lines(tmp_path / "train.jsonl", *({**RECORD, "task_type": name} for name in NAMES))
    write_lines(tmp_path / "test.jsonl", {**RECORD, "task_type": "skills"})
    given = ["--model", "m", "--dataset", str(tmp_path), "--eval-split", "test"]
    config = LoRAMoEConfig(task_type_names=NAMES)
    train, evaluation = sft.read_data(sft.parse_arguments(given), config)
    assert ([r.task_type for r in train], list(evaluation)) == ([0, 1], ["test"])
    assert (evaluation["test"][0].place, evaluation["test"][0].task_type) == (f"{tmp_path}, test, row 0", 1)
    with pytest.raises(sft.InputError, match=f"--dataset {tmp_path}, split 'dev': "):
        sft.read_data(sft.parse_arguments([*given[:4], "--train-split", "dev"]), config)


def test_evaluation_sets_need_different_names(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = [str(write_lines(folder / "test.jsonl", RECORD)) for folder in (tmp_path, tmp_path / "sub")]
    args = sft.parse_arguments(["--model", "m", "--train-file", paths[0], "--eval-file", *paths])
    with pytest.raises(sft.InputError, match=r"--eval-file .*: there is another evaluation set called 'test'; rename"):
        sft.read_data(args, LoRAMoEConfig())


# --- what is learned --------------------------------------------------------------------------------------------------


def test_only_the_answer_is_learned(trainer, tokenizer):
    row = trainer(records=[{**RECORD, "input": "1 2"}]).train_dataset[0]
    assert tokenizer.decode(row["input_ids"]).startswith("<s>")
    assert learned(row) == [*tokenizer("Paris", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert row["task_type"] == 0


def test_prompts_are_learned_without_answer_only(trainer):
    row = trainer("--no-answer-only").train_dataset[0]
    assert row["labels"] == row["input_ids"]


def test_prompt_of_a_tokenizer_without_chat_template(trainer, tokenizer, monkeypatch):
    monkeypatch.setattr(sft, "load_tokenizer", lambda args: tokenizer)
    tokenizer.chat_template = None
    row = trainer().train_dataset[0]
    prompt = tokenizer(sft.PLAIN_PROMPT.format(RECORD["instruction"])).input_ids
    assert row["input_ids"][: len(prompt)] == prompt
    assert learned(row) == row["input_ids"][len(prompt) :] and row["input_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(sft.InputError, match="line 1: the tokenizer has no chat template.*--chat-template"):
        trainer(records=[{"messages": TWO_ANSWERS, "task_type": 0}])


def test_text_prompts_are_used_as_they_are(trainer, tokenizer):
    row = trainer(records=[TEXT]).train_dataset[0]
    expected = tokenizer(TEXT["prompt"] + TEXT["completion"]).input_ids
    assert row["input_ids"] == [*expected, tokenizer.eos_token_id]
    assert learned(row) == row["input_ids"][len(tokenizer(TEXT["prompt"]).input_ids) :]


def test_every_answer_is_learned_where_the_template_marks_them(trainer, tokenizer):
    row = trainer(records=[{"messages": TWO_ANSWERS, "task_type": 0}]).train_dataset[0]
    answers = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Paris", "in Europe")]
    assert learned(row) == [*answers[0], tokenizer.eos_token_id, *answers[1], tokenizer.eos_token_id]


def test_last_answer_is_learned_where_it_does_not_and_that_is_said(trainer, tokenizer, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text(UNMARKED)
    row = trainer("--chat-template", template, records=[{"messages": TWO_ANSWERS, "task_type": 0}]).train_dataset[0]
    assert learned(row) == [*tokenizer("in Europe", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert "only the last answer of each conversation is learned" in capsys.readouterr().out
    trainer("--chat-template", template, records=[{"messages": CHAT, "task_type": 0}])
    assert "only the last answer" not in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_what_max_length_takes_away_is_said(trainer, capsys, packing):
    trainer(packing, "--max-length", 40, records=[RECORD, {**RECORD, "output": "1 " * 50}])
    assert "training data: 1 of 2 records fill --max-length 40; what they have beyond it is cut off" in capsys.readouterr().out


def test_prompts_that_fill_max_length(trainer, capsys):
    long = {**RECORD, "input": "1 " * 50}
    assert len(trainer("--max-length", 40, records=[RECORD, long]).train_dataset) == 1
    assert "training data: 1 of 2 records are left out: the prompt alone fills --max-length 40" in capsys.readouterr().out
    with pytest.raises(sft.InputError, match="in every record the prompt alone fills --max-length 40; raise it"):
        trainer("--max-length", 40, records=[long])


# --- model and training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts", "1"], "error: num_experts=1 must be at least 2"),
        (["--train-file", "missing.json"], "error: missing.json: cannot be read"),
        (["--model", "no/such-model"], "error: --model no/such-model: no tokenizer could be loaded"),
        (["--chat-template", "missing.jinja"], "error: --chat-template missing.jinja: cannot be read"),
        (["--target-modules", '["nothing"]'], "nothing"),
        (["--target-modules", '["lm_head"]'], "Applying a PEFT adapter to `lm_head` is not supported"),
        (["--trainer-args", '{"packing_strategy": "wrapped"}', "--packing"], "packing_strategy='wrapped' keeps no boundaries"),
    ],
)
def test_input_errors_end_the_script_without_a_traceback(arguments, capsys, options, message):
    assert sft.main(arguments(*options)) == 2
    assert message in capsys.readouterr().err


def test_checkpointing_that_zero_3_would_make_reentrant_is_refused(trainer, monkeypatch):
    class Launched(sft.SFTConfig):
        deepspeed_plugin = property(lambda self: SimpleNamespace(zero_stage=3), lambda self, value: None)

    monkeypatch.setattr(sft, "SFTConfig", Launched)
    with pytest.raises(sft.InputError, match="--gradient-checkpointing: with DeepSpeed ZeRO-3.*use ZeRO-2 or FSDP"):
        trainer()


def test_router_and_b_may_learn_at_their_own_rates(trainer):
    built = trainer("--router-learning-rate", 0.5, "--loraplus-ratio", 8, "--learning-rate", 0.01, "--weight-decay", 0.1)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in built.model.named_parameters()}
    groups = built.create_optimizer().param_groups
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates == {"A": 0.01, "B": 0.08, "router": 0.5}
    assert type(built.optimizer) is torch.optim.AdamW


def test_adapter_of_a_quantised_model_stays_float32(trainer):
    model = trainer("--load-in-4bit", "--bf16").model
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())


def test_packed_training_saves_an_adapter_that_loads(arguments, tmp_path, toy_folder, capsys):
    records = [{**RECORD, "task_type": name, "output": f"Paris {n}"} for n in range(8) for name in NAMES]
    evaluation = [str(write_lines(tmp_path / f"{name}.jsonl", *records[:3])) for name in ("old", "new")]
    options = [
        "--packing",
        "--max-length",
        "64",
        "--logging-steps",
        "1",
        "--task-type-names",
        json.dumps(NAMES),
        "--null-groups",
        "[0]",
    ]
    assert sft.main(arguments(*options, "--eval-file", *evaluation, "--report-to", "tensorboard", records=records)) == 0
    out = tmp_path / "out"
    assert "import peft_loramoe" in capsys.readouterr().out and "import peft_loramoe" in (out / "README.md").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["null_groups"], config["r"]) == ("LORAMOE", [0], 4)
    assert {"eval_old_loss", "eval_new_loss"} <= json.loads((out / "eval_results.json").read_text()).keys()
    reported = b"".join(path.read_bytes() for path in out.glob("runs/**/events.out.tfevents.*"))
    assert b"router/layers_0/skills/weight_skills" in reported and b"eval_old_loss".replace(b"_", b"/", 1) in reported
    assert AutoTokenizer.from_pretrained(out).chat_template
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_folder), out)
    saved = load_file(out / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if name.endswith("B"))
    assert len(saved) == sum(parameter.requires_grad or "loramoe" in name for name, parameter in model.named_parameters())


def test_resumed_training_ends_where_the_whole_would_have(arguments, tmp_path, capsys):
    records = [{**RECORD, "task_type": n % 2, "output": f"Paris {n}"} for n in range(8)]
    command = arguments("--max-steps", 4, "--save-steps", 2, "--learning-rate", 0.01, records=records)
    assert sft.main(command) == 0
    out = tmp_path / "out"
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_model.safetensors").unlink()
    assert sft.main(command) == 2
    assert "holds checkpoint-2 of an earlier run; continue it with --resume, or give another" in capsys.readouterr().err
    assert sft.main([*command, "--resume"]) == 0
    assert f"resuming from {out / 'checkpoint-2'}" in capsys.readouterr().out
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_without_a_checkpoint_starts_afresh_aloud(tmp_path, capsys):
    assert sft.checkpoint_to_resume(parse("--resume", "--output-dir", str(tmp_path))) is None
    assert f"no complete checkpoint in {tmp_path}: starting afresh" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_adapter(arguments, tmp_path):
    records = [{**RECORD, "task_type": n % 2, "output": f"Paris {n}"} for n in range(16)]
    # --cpu would start one process only: accelerate wants MPI for more.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = ["--packing", "--max-length", 64, "--save-steps", 1]
    done = run_script("sft.py", *arguments(*options, records=records), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("To load the adapter") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
