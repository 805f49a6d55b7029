"""How the commands load a base model, and when they import torch."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_loramoe
from peft_loramoe.cli import main
from peft_loramoe.cli.arguments import build_parser
from peft_loramoe.cli.base_model import BaseModel
from tiny import tiny_llama, tiny_tokenizer, token_batch


SIDES = {"hidden_size": 64, "intermediate_size": 64}  # what bitsandbytes can quantise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama, its tokenizer, and both as a GGUF file in a folder of its own."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(**SIDES)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "gguf").mkdir()
    return folder


@pytest.fixture(scope="module")
def gguf_folder(folder):
    gguf = pytest.importorskip("gguf")
    write_gguf(gguf, AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "gguf" / "tiny.gguf")
    return folder / "gguf"


def write_gguf(gguf, model, path):
    """The model with llama.cpp's names and order of rows, with a BPE that reads w5 as "w" and "5"."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = ["<pad>", "<end>", "w", *"0123456789", *(f"w{i}" for i in range(10))]
    writer.add_token_list([*words, *(f"<unused{i}>" for i in range(config.vocab_size - len(words)))])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([f"w {i}" for i in range(10)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{name}_proj": f"attn_{name}" for name in "qkv"} | {
        f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        module, kind = name.removesuffix(".weight"), name.split(".")[-2]
        if kind in heads:  # llama.cpp rotates neighbouring rows
            tensor = tensor.view(heads[kind], 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        stored = whole.get(module) or f"blk.{name.split('.')[2]}.{names[kind]}"
        writer.add_tensor(f"{stored}.weight", tensor.float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits.float()


def test_gguf_weights_are_those_of_the_model(folder, gguf_folder):
    base = BaseModel(str(gguf_folder), gguf_file="tiny.gguf", device="cpu")
    model = base.load()
    torch.testing.assert_close(logits(model), logits(BaseModel(str(folder / "base"), device="cpu").load()))
    assert not model.training and base.tokenizer()("w5", add_special_tokens=False).input_ids == [2, 8]
    assert getattr(model, "hf_quantizer", None) is None  # or a trainer refuses it


def test_a_gguf_file_loads_in_4_bits(folder, gguf_folder):
    how = {"load_in_4bit": True, "device": "cpu", "dtype": "float32", "compute_dtype": "float32"}
    model = BaseModel(str(gguf_folder), gguf_file="tiny.gguf", **how).load()
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and model.is_loaded_in_4bit
    assert model.name_or_path == str(gguf_folder)
    torch.testing.assert_close(logits(model), logits(BaseModel(str(folder / "base"), **how).load()))


def test_an_adapter_trained_on_a_gguf_file_loads_again(gguf_folder, tmp_path, capsys):
    pytest.importorskip("trl")
    (tmp_path / "train.jsonl").write_text('{"prompt": "w5", "completion": " w6"}\n' * 4)
    out, gguf = tmp_path / "out", ["--gguf-file", "tiny.gguf"]
    command = ["train", "--model", str(gguf_folder), *gguf, "--train-file", str(tmp_path / "train.jsonl")]
    assert main([*command, "-o", str(out), "--max-steps", "1", "--no-bf16", "--device", "cpu"]) == 0
    load = f'from_pretrained("{gguf_folder}", gguf_file="tiny.gguf")'
    printed, errors = capsys.readouterr()
    assert load in printed and load in (out / "README.md").read_text()
    assert "Could not find a config file" not in errors
    assert main(["trace", str(out), "--text", "w5", "--device", "cpu", *gguf]) == 0
    assert main(["trace", str(out), "--text", "w5", "--device", "cpu"]) == 2
    assert f"--base-model {gguf_folder} holds GGUF files only; choose one of them with" in capsys.readouterr().err


WRONG = {
    "no such file": ({"gguf_file": "other.gguf"}, "--gguf-file other.gguf: there is no such file in the folder"),
    "none named": ({}, "holds GGUF files only; choose one of them with --gguf-file tiny.gguf"),
    "the file itself": ({"name": "{}/tiny.gguf"}, "is a file; write --model {} --gguf-file tiny.gguf"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_gguf_files_are_named(options, message, gguf_folder):
    options = {"name": "{}", **options}
    with pytest.raises(ValueError, match=message.format(gguf_folder)):
        BaseModel(**{**options, "name": options["name"].format(gguf_folder)})


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        (
            "gguf",
            {"gguf_file": "x.gguf"},
            r'--gguf-file x.gguf needs the package gguf: pip install "peft_loramoe\[gguf\]"',
        ),
        (
            "bitsandbytes",
            {"load_in_4bit": True},
            r'--load-in-4bit needs bitsandbytes: pip install "peft_loramoe\[bnb\]"',
        ),
    ],
)
def test_missing_packages_are_named(package, options, message, monkeypatch):
    monkeypatch.setattr("peft_loramoe.cli.base_model.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ImportError, match=message):
        BaseModel("model", **options)


LOADING = ["--load-in-4bit", "--dtype", "float32", "--device", "cpu", "--gguf-file", "m.gguf"]
COMMANDS = {
    "anchors": ["anchors", "--model", "m", "-o", "a"],
    "label": ["label", "data", "--model", "m", "-o", "a"],
    "train": ["train", "--model", "m"],
    "evaluate": ["evaluate", "--model", "m"],
    "analyze": ["analyze", "adapter", "--data", "d"],
    "trace": ["trace", "adapter", "--text", "t"],
    "export-lora": ["export-lora", "adapter", "-o", "a"],
    "surgery": ["surgery", "list", "adapter"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_takes_the_same_options(words, monkeypatch):
    monkeypatch.setattr("peft_loramoe.cli.base_model.find_spec", lambda name: object())
    base = BaseModel.of(build_parser().parse_args([*words, *LOADING]), "m")
    assert base == BaseModel(
        "m", load_in_4bit=True, dtype="float32", compute_dtype="float32", device="cpu", gguf_file="m.gguf"
    )


SCRIPT = """
import sys
from _peft_loramoe_command import main
try:
    print("code", main())
except SystemExit as stopped:
    print("code", stopped.code)
print("torch" in sys.modules, "LORAMOE" in getattr(sys.modules.get("peft"), "PeftType", type("", (), {"__members__": ()})).__members__)
"""


def console_script(*words):
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_loramoe.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["label"]], ids=" ".join)
def test_torch_is_not_imported_for_arguments(words):
    assert console_script(*words).stdout.splitlines()[-1] == "False False"


@pytest.mark.slow
def test_the_console_script_registers_before_a_command_runs(tmp_path):
    ran = console_script(
        "run",
        "--",
        "-c",
        "import peft, peft_loramoe; print(peft.PeftType('LORAMOE').name, peft_loramoe.LoRAMoEConfig)",
    )
    assert ran.stdout.splitlines()[0] == "LORAMOE <class 'peft_loramoe.config.LoRAMoEConfig'>", ran.stderr
    wrong = console_script("inspect", tmp_path)
    assert wrong.stdout.splitlines() == ["code 2", "True True"]
    assert len(wrong.stderr.splitlines()) == 1 and "has no adapter_config.json" in wrong.stderr


def test_python_m_parses_before_it_imports():
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_loramoe.__file__).parents[1])}
    command = [sys.executable, "-X", "importtime", "-m", "peft_loramoe", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout.startswith("usage: peft-loramoe") and "peft_loramoe.cli" in imported and "torch" not in imported


def test_the_environment_is_printed_for_issues(capsys):
    assert main(["env"]) == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["peft_loramoe"] == peft_loramoe.__version__ and lines["torch"] == version("torch")
    assert {"peft", "transformers", "accelerate", "bitsandbytes", "trl", "triton", "Python", "platform"} < set(lines)
    assert lines["device"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"peft-loramoe {peft_loramoe.__version__}\n"
