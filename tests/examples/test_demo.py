import json

import pytest
import torch

from example_scripts import run_module
from examples import demo


def test_wrong_number_of_countries_ends_the_demo_without_a_traceback(tmp_path, capsys):
    assert demo.main(["--countries", "0", "--output-dir", str(tmp_path)]) == 2
    assert "error: --countries: 0 countries were asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_in_miniature(tmp_path):
    arguments = [
        "--countries",
        3,
        "--pretrain-steps",
        4,
        "--exercises",
        12,
        "--max-steps",
        2,
        "--output-dir",
        tmp_path,
    ]
    done = run_module("examples.demo", *arguments)
    assert done.returncode == 0, done.stderr
    assert "adapter loaded in a new process: same logits, bit by bit" in done.stdout
    assert "import peft_loramoe" in done.stdout and "PeftModel.from_pretrained" in done.stdout
    for cell in ("facts never shown", "digit exercises", "group 0 (knowledge)", "group 1 (downstream)"):
        assert cell in done.stdout
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["samples"] == {
        "facts shown in fine-tuning": 8,
        "facts never shown": 7,
        "digit exercises (new ones)": 2,
    }
    assert results["accuracy"]["after"].keys() == results["samples"].keys()

    saved = torch.load(tmp_path / "verify.pt")
    torch.save({**saved, "logits": saved["logits"] + 1}, tmp_path / "verify.pt")
    changed = run_module("examples.demo", "--verify", "--output-dir", tmp_path)
    assert changed.returncode == 1 and "logits differ by up to 1" in changed.stderr
