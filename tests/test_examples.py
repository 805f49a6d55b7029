import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_loramoe import LoRAMoEConfig


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
RECORD = {"instruction": "Name the capital of France.", "input": "", "output": "Paris", "task_type": 0}


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the other example look for it there
    spec.loader.exec_module(module)
    return module


toy_world = load_example("toy_world")
finetune = load_example("finetune")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy_world.build_world(folder, toy_world.build_facts(4), steps=1, seed=0)
    return folder


@pytest.fixture(scope="session")
def tokenizer(toy_folder):
    return finetune.AutoTokenizer.from_pretrained(toy_folder)


def run_script(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- the toy world ----------------------------------------------------------------------------------------------------


def test_facts_are_true_and_complete():
    facts = toy_world.build_facts(120)
    assert len(facts) == 120 * 5
    assert {fact.answer for fact in facts if fact.country == "Japan"} == {"Tokyo", "Yen", "Asia", "81", "jp"}
    capital = next(f for f in facts if f.country == "Japan" and f.relation == "capital")
    assert (capital.statement, capital.question) == ("The capital of Japan is Tokyo.", "What is the capital of Japan?")


@pytest.mark.parametrize("countries", [0, 10_000])
def test_number_of_countries_is_checked(countries):
    with pytest.raises(ValueError, match=f"{countries} countries were asked for, but there are 1 to"):
        toy_world.build_facts(countries)


def test_exercises_are_different_and_reproducible():
    records = toy_world.downstream_records(200, seed=3)
    assert records == toy_world.downstream_records(200, seed=3)
    assert len({(record["instruction"], record["input"]) for record in records}) == 200
    answers = {"Spell the digits.": "zero nine", "Add one to each digit.": "1 0", "Name the largest digit.": "9"}
    assert {name: " ".join(task([0, 9])) for name, task in toy_world.DOWNSTREAM_TASKS.items()} == answers


def test_toy_model_can_be_quantised(toy_folder):
    model = finetune.AutoModelForCausalLM.from_pretrained(toy_folder)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_words_have_the_same_tokens_wherever_they_stand(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert ids("Japan is in Asia") == ids("Japan") + ids("is") + ids("in") + ids("Asia")
    assert tokenizer.unk_token_id not in ids("12 seven Spell the digits.")


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_only_the_answer_is_learned(tokenizer):
    sample = finetune.encode({**RECORD, "input": "1 2"}, tokenizer)
    learned = [token for token, label in zip(sample["input_ids"], sample["labels"]) if label != -100]
    answer = tokenizer("Paris", add_special_tokens=False).input_ids
    assert learned == [*answer, tokenizer.eos_token_id] == sample["labels"][-len(answer) - 1 :]
    assert sample["input_ids"][0] == tokenizer.bos_token_id


def test_prompt_of_a_tokenizer_without_chat_template(tokenizer, toy_folder):
    plain = finetune.AutoTokenizer.from_pretrained(toy_folder)
    plain.chat_template = None
    sample = finetune.encode(RECORD, plain)
    prompt = plain(finetune.PLAIN_PROMPT.format(RECORD["instruction"])).input_ids
    assert sample["input_ids"][: len(prompt)] == prompt and sample["labels"][: len(prompt)] == [-100] * len(prompt)


def test_collator_pads_and_stacks_task_types():
    samples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "task_type": 1},
        {"input_ids": [8], "labels": [8], "task_type": -1},
    ]
    batch = finetune.collate(samples, pad_token_id=2)
    expected = {
        "input_ids": [[5, 6, 7], [8, 2, 2]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "task_types": [1, -1],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_long_records_are_left_out_aloud(tokenizer, capsys):
    records = [RECORD, {**RECORD, "input": "1 " * 50}]
    assert len(finetune.encode_all(records, tokenizer, 40, "training records")) == 1
    assert "training records: 1 of 2 records are longer than --max-length 40" in capsys.readouterr().out
    with pytest.raises(finetune.InputError, match="every record is longer than --max-length 2; raise it"):
        finetune.encode_all(records, tokenizer, 2, "training records")


# --- options and input errors -----------------------------------------------------------------------------------------


def test_every_config_option_has_a_flag():
    arguments = ["--num-experts", "4", "--expert-groups", "[1, 3]", "--null-groups", "[0]", "--top-k", "2", "--use-rslora"]
    arguments += ["--target-modules", "all-linear", "--balance-delta", "0.3", "--task-type-names", '["a", "b"]']
    args = finetune.parse_arguments(arguments)
    config = finetune.build_config(args)
    assert (config.num_experts, config.expert_groups, config.null_groups, config.top_k) == (4, [1, 3], [0], 2)
    assert (config.target_modules, config.balance_delta, config.use_rslora) == ("all-linear", 0.3, True)
    assert (config.task_type_names, config.r, config.lora_alpha) == (["a", "b"], 4, 32)
    text = finetune.build_parser().format_help()
    assert all(f"--{field.name.replace('_', '-')}" in text for field in finetune.config_fields())


def test_own_model_has_its_own_defaults():
    demo = finetune.parse_arguments([])
    own = finetune.parse_arguments(["--model", "m", "--train-file", "t.json", "--no-bf16"])
    assert (demo.load_in_4bit, demo.gradient_checkpointing) == (True, False)
    assert (own.load_in_4bit, own.gradient_checkpointing, own.bf16) == (False, True, False)
    assert finetune.build_config(own).balance_delta == LoRAMoEConfig().balance_delta


def without(column):
    return {name: value for name, value in RECORD.items() if name != column}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file has no records"),
        ("[]", "the file has no records"),
        (json.dumps(RECORD) + '\n\n{"instruction": }', r"line 3: not valid JSON \(Expecting value, column 17\)"),
        ('[\n{"instruction": "x"},\n]', r"line \d: not valid JSON"),
        (json.dumps(RECORD) + "\n" + json.dumps(without("output")), "line 2: the column 'output' is missing"),
        (json.dumps([RECORD, without("task_type")]), "record 2: the column 'task_type' is missing"),
        (json.dumps({**RECORD, "output": 42}), "line 1: output is 42; write it as a string"),
        (json.dumps({**RECORD, "output": " "}), "line 1: output is ' '; give the answer"),
        ("17", "line 1: 17 is not an object"),
        (json.dumps({**RECORD, "task_type": "qa"}), "line 1: unknown task_type 'qa'; write one of 'facts', 'skills'"),
        (json.dumps({**RECORD, "task_type": 2}), "line 1: unknown task_type 2; .* an integer from 0 to 1"),
        (json.dumps({**RECORD, "task_type": True}), "line 1: unknown task_type True"),
    ],
)
def test_errors_of_the_train_file_name_the_place(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(finetune.InputError, match=f"train.jsonl[:,] ?{message}"):
        finetune.read_records(path, LoRAMoEConfig(task_type_names=["facts", "skills"]))


def test_unknown_name_without_names_says_how_to_give_them(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", {**RECORD, "task_type": "qa"})
    with pytest.raises(finetune.InputError, match="give them with --task-type-names"):
        finetune.read_records(path, LoRAMoEConfig())


def test_names_and_numbers_are_task_types(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", *({**RECORD, "task_type": t} for t in ("skills", 0, -1)))
    records = finetune.read_records(path, LoRAMoEConfig(task_type_names=["facts", "skills"]))
    assert [record["task_type"] for record in records] == [1, 0, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--train-file", "missing.json"], "error: missing.json: cannot be read"),
        (["--num-experts", "1"], "error: num_experts=1 must be at least 2"),
        (["--countries", "0"], "error: --countries: 0 countries were asked for"),
    ],
)
def test_input_errors_end_the_script_without_a_traceback(tmp_path, capsys, arguments, message):
    assert finetune.main([*arguments, "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_model_and_train_file_go_together(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--model", "m"])
    assert "--model and --train-file go together" in capsys.readouterr().err


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_in_miniature(tmp_path):
    arguments = ["--countries", 3, "--pretrain-steps", 4, "--exercises", 12, "--max-steps", 2, "--output-dir", tmp_path]
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "adapter loaded in a new process: same logits, bit by bit" in done.stdout
    assert "import peft_loramoe" in done.stdout and "PeftModel.from_pretrained" in done.stdout
    for cell in ("facts never shown", "digit exercises", "group 0 (knowledge)", "group 1 (downstream)"):
        assert cell in done.stdout
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["samples"] == {"facts shown in fine-tuning": 8, "facts never shown": 7, "digit exercises (new ones)": 2}
    assert results["accuracy"]["after"].keys() == results["samples"].keys()

    saved = torch.load(tmp_path / "verify.pt")
    torch.save({**saved, "logits": saved["logits"] + 1}, tmp_path / "verify.pt")
    changed = run_script("--verify", tmp_path)
    assert changed.returncode == 1 and "logits differ by up to 1" in changed.stderr


@pytest.mark.slow
def test_own_model_and_train_file(tmp_path, toy_folder):
    records = [{**RECORD, "task_type": task_type} for task_type in ("facts", "skills") for _ in range(10)]
    train_file = write_lines(tmp_path / "train.jsonl", *records)
    done = run_script(
        *("--model", toy_folder, "--train-file", train_file, "--output-dir", tmp_path / "out", "--max-steps", 1),
        *("--task-type-names", '["facts", "skills"]', "--null-groups", "[0]", "--batch-size", 2),
    )
    assert done.returncode == 0, done.stderr
    assert "same logits, bit by bit" in done.stdout and "group 0 (facts)" in done.stdout
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["null_groups"], config["r"]) == ([0], 4)
