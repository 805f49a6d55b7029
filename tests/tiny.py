"""Tiny random models and adapters that the tests share."""

from contextlib import contextmanager
from unittest import mock

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.ops import mixture_torch


VOCAB = 64


@contextmanager
def computed_as(size: str):
    """Mixtures of all inputs, whatever their size, computed as those of "small" or "large" ones are."""
    limit = float("inf") if size == "small" else -1
    with mock.patch.multiple(mixture_torch, SMALL_TOKENS=limit, SMALL_ENTRIES=limit, SMALL_WEIGHTS=float("inf")):
        yield


def tiny_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**config, "num_key_value_heads": 2, "pad_token_id": 0, **options}))


def loramoe(model=None, seed: int = 1, **options):
    """`model` (a tiny Llama by default) with a LoRAMoE adapter whose B is not zero."""
    model = tiny_llama() if model is None else model
    torch.manual_seed(seed)
    return get_peft_model(model, LoRAMoEConfig(**{"r": 2, "init_weights": False, "task_type": "CAUSAL_LM", **options}))


def token_batch(rows: int = 3, width: int = 7, seed: int = 2) -> dict[str, torch.Tensor]:
    """Right-padded token ids: row i has i padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB, (rows, width), generator=generator)
    attention_mask = (torch.arange(width) < width - torch.arange(rows)[:, None]).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w63, separated by spaces; w0 pads, w1 ends."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")


def capture(model) -> dict[str, torch.Tensor]:
    """Router probabilities by layer name, read by forward hooks; filled by the next call of `model`."""
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("loramoe_experts.default"):
            layer = name.split("base_model.model.")[-1].removesuffix(".loramoe_experts.default")
            module.register_forward_hook(lambda module, args, output, layer=layer: seen.__setitem__(layer, output[1]))
    return seen
