"""The built wheel in an environment with its core requirements only: what somebody who just installed it meets.

`make check-wheel` runs this with the environment's own pytest, away from the checkout.
"""

import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_loramoe


PACKAGE = Path(peft_loramoe.__file__).parent
# What a module may need beyond the core requirements. setup.cfg has an extra for each but the engine and the launchers.
OPTIONAL = {"bitsandbytes", "datasets", "deepspeed", "gguf", "matplotlib", "tqdm", "triton", "trl"}
OPTIONAL |= {"axolotl", "swift", "vllm"}
DESCRIPTION = importlib.metadata.metadata("peft_loramoe").get_payload()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, in which the README's first example has run."""
    folder = tmp_path_factory.mktemp("newcomer")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(folder / "model")
    example = re.search(r"```python\n(.*?)```", DESCRIPTION, re.DOTALL)[1]
    run_python(example.replace("Qwen/Qwen3-0.6B", "model"), folder)
    return folder


def run_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(*arguments, folder=None):
    command = Path(sysconfig.get_path("scripts")) / "peft-loramoe"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_is_tested_and_not_the_checkout():
    assert PACKAGE.parent == Path(sysconfig.get_path("purelib"))


def test_type_checkers_find_the_types():
    assert (PACKAGE / "py.typed").exists()


def test_the_example_of_the_readme_saves_an_adapter(folder):
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_the_snippet_of_the_model_card_loads_it(folder):
    card = (folder / "adapter" / "README.md").read_text()
    snippet = re.search(r"```python\n(import peft_loramoe.*?)```", card, re.DOTALL)[1]
    assert "LORAMOE" in run_python(f"{snippet.replace('ADAPTER', 'adapter')}\nprint(model.peft_type)", folder)


def test_every_module_can_be_imported_or_names_what_it_needs():
    for module in pkgutil.walk_packages([str(PACKAGE)], "peft_loramoe."):
        if module.name.endswith(("__main__", "sitecustomize")):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in OPTIONAL, module.name


def test_the_command_says_its_version():
    assert run_command("--version").stdout == f"peft-loramoe {peft_loramoe.__version__}\n"


def test_the_command_reads_the_adapter(folder):
    done = run_command("inspect", "adapter", folder=folder)
    assert done.returncode == 0 and "experts" in done.stdout, done.stderr


def test_the_command_names_a_missing_package(folder):
    (folder / "data.jsonl").write_text('{"prompt": "w2", "completion": "w3"}\n')
    options = ("--model", "model", "--train-file", "data.jsonl", "--output-dir", "trained")
    done = run_command("train", *options, folder=folder)
    assert done.returncode != 0 and "trl" in done.stderr and "pip install" in done.stderr
