"""What the examples in docstrings may use without importing it.

- ``tiny_model(**options)``: a random Llama of two layers with a LoRAMoE adapter; `options` are those of LoRAMoEConfig.
- ``tiny_tokenizer()``: its tokenizer, which knows the words w0 to w63.

Each docstring's examples run in a temporary folder of their own, so they may write files.
"""

import importlib.util

import pytest


# Modules that import an engine or a launcher which is not installed
NEEDS = {
    "vllm": "peft_loramoe/serving/vllm_seams.py",
    "axolotl": "peft_loramoe/interop/axolotl.py",
    "swift": "peft_loramoe/interop/ms_swift.py",
}
collect_ignore = [file for package, file in NEEDS.items() if importlib.util.find_spec(package) is None]


@pytest.fixture(autouse=True)
def doctest_names(request, doctest_namespace, tmp_path_factory, monkeypatch):
    """Add the names above and change to a temporary folder, for doctests only."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    from tiny import loramoe, tiny_tokenizer

    doctest_namespace["tiny_model"] = lambda **options: loramoe(**options).eval()
    doctest_namespace["tiny_tokenizer"] = tiny_tokenizer
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, prints that it chose one
    monkeypatch.chdir(tmp_path_factory.mktemp("doctest"))
