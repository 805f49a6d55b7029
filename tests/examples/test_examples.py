"""Every example runs as its docstring says, on a toy model."""

import ast
import json
import runpy
import shlex
import sys

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import peft_loramoe  # noqa: F401 - registers LORAMOE
from example_scripts import ROOT, build_toy, run_script, write_lines


RECORDS = [
    {"prompt": "Question: What is the capital of China? Answer:", "completion": " Beijing", "task_type": 0},
    {"prompt": "Question: Leave out the first letter. sun Answer:", "completion": " un", "task_type": 1},
] * 4
PREFERENCES = [
    {"prompt": record["prompt"], "chosen": record["completion"], "rejected": " 7", "task_type": record["task_type"]}
    for record in RECORDS
]
DATA = {"quickstart": None, "sft": RECORDS, "dpo": PREFERENCES, "own_loop": RECORDS, "sharded": RECORDS}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


def command(example):
    """The first command in an example's docstring, as words."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text()))
    lines = text.replace("\\\n", " ").splitlines()
    return shlex.split(next(line for line in lines if line.startswith("    ")))


@pytest.fixture
def options(toy_folder, tmp_path):
    """The options of an example's first command, with the toy model and data in place of what they name."""

    def of(example):
        words = command(example)
        given = words[words.index(f"examples/{example}.py") + 1 :]
        given += ["--model", str(toy_folder), "--output-dir", str(tmp_path / "adapter")]
        if "--anchors" in given:
            given += [
                "--anchors",
                str(write_lines(tmp_path / "anchors.jsonl", *({"text": f"Beijing {n}"} for n in range(5)))),
            ]
        if DATA[example]:
            given += ["--train-file", str(write_lines(tmp_path / "train.jsonl", *DATA[example]))]
        return given

    return of


def check_adapter(folder):
    """The adapter that an example wrote loads, and was trained."""
    assert json.loads((folder / "adapter_config.json").read_text())["null_groups"] == [0]
    assert any(
        tensor.any() for name, tensor in load_file(folder / "adapter_model.safetensors").items() if name.endswith("B")
    )
    AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("example", ["quickstart", "sft", "dpo", "own_loop"])
def test_example_trains_an_adapter_that_loads(example, options, tmp_path, monkeypatch, capsys):
    assert command(example)[:2] == ["python", f"examples/{example}.py"]
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *options(example)])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    check_adapter(tmp_path / "adapter")
    printed = capsys.readouterr().out
    expected = {
        "quickstart": "balance 0.",
        "sft": "'train_loss'",
        "dpo": "'train_loss'",
        "own_loop": "task type 1: weight",
    }
    assert expected[example] in printed


def test_moe_example_trains_an_adapter_on_sparse_blocks(toy_folder, tmp_path, monkeypatch, capsys):
    model, words = tmp_path / "model", command("moe")
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert words == ["python", "examples/moe.py"]
    options = ["--model", str(model), "--steps", "2", "--output-dir", str(tmp_path / "adapter")]
    monkeypatch.setattr(sys, "argv", ["moe.py", *options])
    runpy.run_path(str(ROOT / "examples" / "moe.py"), run_name="__main__")
    check_adapter(tmp_path / "adapter")
    assert "1 sparse blocks are adapted" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_run_trains_one_adapter(options, tmp_path):
    launch, settings = command("sharded")[:2], ROOT / "examples" / "accelerate" / "ddp.yaml"
    assert launch == ["accelerate", "launch"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", settings, "--main_process_port", "0"]
    done = run_script(
        "sharded.py", *(word for word in options("sharded") if word != "--load-in-4bit"), launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    check_adapter(tmp_path / "adapter")
