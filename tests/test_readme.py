"""The first example of the README, on a small model in place of the one that it names."""

import re
from pathlib import Path

from safetensors.torch import load_file

from example_scripts import build_toy


README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_trains_and_saves(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    model = build_toy(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("Qwen/Qwen3-0.6B", str(model)), {})
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))
