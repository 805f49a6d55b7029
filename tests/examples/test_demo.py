import json

import pytest
import torch

from example_scripts import build_toy, run_module
from examples import demo
from research.retention import base_model


def test_unknown_option_of_train_ends_the_demo_with_usage(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--model", str(tmp_path), "--no-such-option", "--output-dir", str(tmp_path)])
    assert "--no-such-option" in capsys.readouterr().err


def test_missing_model_ends_the_demo_without_a_traceback(tmp_path, capsys):
    assert demo.main(["--model", str(tmp_path / "none"), "--output-dir", str(tmp_path)]) == 2
    assert "error: --model" in capsys.readouterr().err


def test_default_model_comes_from_the_package_and_gets_a_short_chat_template(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "prepare", lambda folder: tmp_path / "smollm")
    args, _ = demo.parse_arguments(["--output-dir", str(tmp_path), "--samples", "8"])
    options = demo.prepare(args)
    assert options[options.index("--model") + 1] == str(tmp_path / "smollm")
    assert options[options.index("--chat-template") + 1] == str(tmp_path / "chat.jinja")
    trained = [json.loads(line)["instruction"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    scored = [json.loads(line)["instruction"] for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert all(prompt.startswith(("Long date:", "To JSON:", "Sort:")) for prompt in trained + scored)
    assert len(trained) == 8 and len(scored) == demo.SCORED and not set(trained) & set(scored)


def test_table_has_each_models_answers_and_scores_side_by_side():
    questions = [("Class of fox?", "zel"), ("Color of the sky?", "blue")]
    table = demo.results_table(
        questions,
        {
            "base model": {"answers": ["A fox.", "Blue."], "solved": 0.0, "loss": 3.1},
            "LoRA": {"answers": ["zel", ""], "solved": 0.9, "loss": 3.5},
        },
    )
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["A fox.", "Blue.", "0%", "3.100"]
    assert columns[2] == ["zel", "(nothing)", "90%", "3.500"]


@pytest.mark.slow
def test_demo_in_miniature(tmp_path, capsys):
    toy = build_toy(tmp_path / "toy")
    arguments = ["--model", str(toy), "--samples", "12", "--anchors", "12", "--max-steps", "2"]
    assert demo.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "same logits, bit by bit" in printed and "PeftModel.from_pretrained" in printed
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["base model", "LoRA", "LoRAMoE"]
    assert all(len(found["answers"]) == 6 and found["loss"] > 0 for found in results.values())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["null_groups"] == [0]
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")

    saved = torch.load(tmp_path / "verify.pt")
    torch.save({**saved, "logits": saved["logits"] + 1}, tmp_path / "verify.pt")
    changed = run_module("examples.demo", "--verify", "--output-dir", tmp_path)
    assert changed.returncode == 1 and "logits differ by up to 1" in changed.stderr
