"""`adapter: loramoe` in axolotl and `tuner_type: loramoe` in ms-swift, with the real packages where they are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_loramoe
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop.launcher_options import LauncherOptions
from tiny import tiny_llama, tiny_tokenizer


AXOLOTL = """
base_model: base
plugins: [peft_loramoe.interop.axolotl.LoRAMoEPlugin]
adapter: loramoe
loramoe: {r: 3, anchors: anchors.jsonl}
datasets: [{path: data.jsonl, ds_type: json, type: alpaca}]
output_dir: out
dataset_prepared_path: prepared
sequence_len: 64
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 2
optimizer: adamw_torch
learning_rate: 0.01
logging_steps: 1
bf16: false
tf32: false
attn_implementation: eager
"""
SWIFT = """
model: base
model_type: llama
template: dummy
tuner_type: loramoe
external_plugins: [plugin.py]
dataset: [data.jsonl]
output_dir: out
add_version: false
max_steps: 2
logging_steps: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 0.01
max_length: 64
torch_dtype: float32
gradient_checkpointing_kwargs: '{"use_reentrant": false}'
"""
PLUGIN = """
from peft_loramoe.interop.ms_swift import register
register(r=3, anchors="anchors.jsonl")
"""


@pytest.mark.parametrize(
    ("section", "config"),
    [
        ({}, LoRAMoEConfig.retain(task_type="CAUSAL_LM")),
        ({"preset": "paper", "r": 3}, LoRAMoEConfig.paper(r=3, task_type="CAUSAL_LM")),
        ({"preset": "plain", "num_experts": 4}, LoRAMoEConfig(num_experts=4, task_type="CAUSAL_LM")),
    ],
)
def test_a_section_is_a_preset_and_options(section, config):
    assert LauncherOptions.read(section).config == config


def test_anchor_options_are_the_trainers():
    assert LauncherOptions.read({"anchors": "a.jsonl", "anchors_every": 2}).anchors == {
        "anchors": "a.jsonl",
        "anchors_every": 2,
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [({"preset": "best"}, "preset='best' is not one of retain, paper, plain"), ({"rank": 3}, "rank")],
)
def test_unknown_options_are_refused(section, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LauncherOptions.read(section)


REFUSED = {
    "an option of axolotl's LoRA": ({"lora_r": 8}, "lora_r: 8 has no effect.*under `loramoe:`"),
    "quantisation": ({"load_in_4bit": True}, "load_in_4bit: True does not work with adapter: loramoe: axolotl quant"),
    "preferences": ({"rl": "dpo"}, "rl: dpo does not work with adapter: loramoe"),
    "an unknown option": ({"loramoe": {"rank": 3}}, "rank"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_axolotl_keys_without_effect_are_refused(keys, message):
    pytest.importorskip("axolotl")
    from peft_loramoe.interop.axolotl import LoRAMoEPlugin

    LoRAMoEPlugin().register({"adapter": "lora", **keys})
    with pytest.raises((TypeError, ValueError), match=message):
        LoRAMoEPlugin().register({"adapter": "loramoe", **keys})


@pytest.fixture
def folder(tmp_path):
    """A tiny model, records and anchors."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    records = [{"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i + 2}"} for i in range(3, 30)]
    anchors = [{"text": f"w{i} w{i + 5} w{i + 9}"} for i in range(3, 30)]
    for name, rows in (("data.jsonl", records), ("anchors.jsonl", anchors)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def launch(folder, *command):
    """Run a launcher; its output, and the adapter's folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "USE_HF": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    environment["PYTHONPATH"] = str(Path(peft_loramoe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, sorted((folder / "out").rglob("adapter_model.safetensors"))[-1].parent


LAUNCHERS = {
    "axolotl": ("axolotl", {"config.yaml": AXOLOTL}, ["-m", "axolotl.cli.train", "config.yaml"]),
    "ms-swift": ("swift", {"config.yaml": SWIFT, "plugin.py": PLUGIN}, ["-m", "swift.cli.main", "sft", "config.yaml"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("package", "files", "command"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_launcher_trains_with_anchors_and_balance_term(package, files, command, folder):
    pytest.importorskip(package)
    for name, text in files.items():
        (folder / name).write_text(text)
    printed, adapter = launch(folder, *command)
    assert "anchor_loss" in printed and "balance_loss" in printed
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["null_groups"]) == ("LORAMOE", 3, [0])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))  # they start as zeros
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)
