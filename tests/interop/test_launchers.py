"""`adapter: loramoe` in axolotl and `tuner_type: loramoe` in ms-swift, with the real packages where they are installed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_loramoe
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop.launcher_options import LauncherOptions
from tiny import loramoe, tiny_llama, tiny_tokenizer


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
    [
        ({"preset": "best"}, "preset='best' is not one of retain, paper, plain"),
        ({"rank": 3}, "rank"),
        ({"anchor_kl_weight": 50}, "anchor_kl_weight=50 has no effect without anchors"),
        ({"anchors": None, "anchors_every": 2}, "anchors_every=2 has no effect without anchors"),
        ({"anchors": "anchors.jsonl", "anchors_every": 0}, "anchors_every=0 must be"),
    ],
)
def test_bad_options_and_those_without_effect_are_refused(section, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LauncherOptions.read(section)


# --- a saved adapter that is trained on


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter with the options of `preset: paper`, but r=8."""
    folder = tmp_path_factory.mktemp("saved")
    base = nn.Sequential(nn.Linear(16, 16))
    get_peft_model(base, LoRAMoEConfig.paper(r=8, target_modules=["0"])).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ({"preset": "plain", "r": 32}, "r=32 has no effect, since the adapter in '.*' has r=8"),
        ({"preset": "plain", "balance_delta": 0.5}, "balance_delta=0.5"),
        ({"preset": "paper"}, "r=4"),
        ({"preset": "retain", "r": 8}, "lora_alpha=128"),
    ],
)
def test_options_that_a_saved_adapter_would_ignore_are_refused(section, option, saved):
    with pytest.raises(ValueError, match=f"{option}.*leave (r|balance_delta|lora_alpha) out, or train a new adapter"):
        LauncherOptions.read(section).check_saved(saved)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"anchors": "anchors.jsonl", "anchors_every": 2},
        {"preset": "paper", "r": 8, "target_modules": ["0"]},
        {"target_modules": "all-linear"},
    ],
)
def test_options_that_a_saved_adapter_has_are_taken(section, saved):
    LauncherOptions.read(section).check_saved(saved)


def test_a_saved_adapter_of_another_method_is_refused(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has peft_type='LORA'; give the folder of a LoRAMoE adapter"):
        LauncherOptions.read({}).check_saved(str(tmp_path))


# --- the plugins, on stubs of the launchers


class Stub:
    """A class of a launcher that the plugins derive from or fill in."""

    def __init__(self, **options):
        self.__dict__.update(options)


def plugin(name, monkeypatch, **stubs):
    """A plugin's module, imported with stubs of the launcher's."""
    for module, attributes in stubs.items():
        monkeypatch.setitem(sys.modules, module.replace("__", "."), SimpleNamespace(**attributes))
    monkeypatch.delitem(sys.modules, f"peft_loramoe.interop.{name}", raising=False)
    imported = importlib.import_module(f"peft_loramoe.interop.{name}")
    monkeypatch.setitem(sys.modules, f"peft_loramoe.interop.{name}", imported)  # until the test ends
    return imported


@pytest.fixture
def axolotl(monkeypatch):
    base = {"AdapterCapabilities": Stub, "BasePlugin": Stub}
    return plugin("axolotl", monkeypatch, axolotl__integrations__base=base).LoRAMoEPlugin()


REFUSED = {
    "an option of axolotl's LoRA": ({"lora_r": 8}, "lora_r: 8 has no effect.*under `loramoe:`"),
    "quantisation": ({"load_in_4bit": True}, "load_in_4bit: True does not work with adapter: loramoe: axolotl quant"),
    "preferences": ({"rl": "dpo"}, "rl: dpo does not work with adapter: loramoe"),
    "an unknown option": ({"loramoe": {"rank": 3}}, "rank"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_axolotl_keys_without_effect_are_refused(keys, message, axolotl):
    axolotl.register({"adapter": "lora", **keys})
    with pytest.raises((TypeError, ValueError), match=message):
        axolotl.register({"adapter": "loramoe", **keys})


def test_axolotl_options_that_a_saved_adapter_would_ignore_are_refused(axolotl, saved):
    keys = {"adapter": "loramoe", "lora_model_dir": saved}
    axolotl.register({**keys, "loramoe": {"r": 8, "anchors": "anchors.jsonl"}})
    with pytest.raises(ValueError, match="r=32 has no effect"):
        axolotl.register({**keys, "loramoe": {"r": 32}})


class SwiftTuner:
    @staticmethod
    def from_pretrained(model, model_id, **options):
        return PeftModel.from_pretrained(model, model_id, **options)


@pytest.fixture
def swift(monkeypatch):
    """The plugin's `register`, which returns the trainer and the tuner that ms-swift then uses."""
    factory, tuners = SimpleNamespace(TRAINER_MAPPING={}), {}
    module = plugin(
        "ms_swift",
        monkeypatch,
        swift__trainers={"Seq2SeqTrainer": Trainer, "TrainerFactory": factory},
        swift__tuner_plugin={"PeftTuner": SwiftTuner, "tuners_map": tuners},
    )

    def register(**options):
        module.register(**options)
        path, _, name = factory.TRAINER_MAPPING["causal_lm"].rpartition(".")
        return getattr(importlib.import_module(path), name), tuners["loramoe"]

    return register


def swift_trainer(trainer_class, model, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    return trainer_class(model=model, args=args, train_dataset=[], processing_class=tiny_tokenizer())


@pytest.mark.parametrize("adapted", [True, False], ids=["a mixture", "a plain LoRA"])
def test_ms_swift_gives_anchors_to_mixtures_only(adapted, swift, tmp_path):
    trainer_class, _ = swift(anchors=["w3 w4", "w5 w6"], anchor_kl_weight=50)
    model = loramoe() if adapted else get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"]))
    assert (swift_trainer(trainer_class, model, tmp_path)._anchors is not None) == adapted


def test_a_second_register_in_ms_swift_replaces_the_first_and_leaves_its_trainer_alone(swift, tmp_path):
    first, _ = swift(anchors=["w3 w4", "w5 w6"])
    second, _ = swift()
    found = [swift_trainer(trainer_class, loramoe(), tmp_path)._anchors for trainer_class in (first, second)]
    assert [anchors is not None for anchors in found] == [True, False]


def test_ms_swift_options_that_a_saved_adapter_would_ignore_are_refused(swift, saved):
    _, tuner = swift(r=32)
    with pytest.raises(ValueError, match="r=32 has no effect"):
        tuner.from_pretrained(nn.Sequential(nn.Linear(16, 16)), saved, is_trainable=True)
    assert tuner.from_pretrained(nn.Sequential(nn.Linear(16, 16)), saved) is not None  # for inference


# --- the launchers themselves


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
    assert "anchor_kl" in printed and "balance_loss" in printed
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["null_groups"]) == ("LORAMOE", 3, [0])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))  # they start as zeros
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)
