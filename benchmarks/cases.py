"""What is measured.

A case is a layer or model in several variants, each of which is a row of a table. A kind of case is one
`setup(config, base) -> (module, inputs)` and a step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .methods import MIXTURE_PEERS, Config, Unavailable, adapt


FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
SMOLLM2 = dict(  # SmolLM2-135M
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
Variant = tuple[str, str | None]  # method, dtype of its adapters
Setup = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    Args:
        base: (config, device) -> the frozen model, which all variants of a case share.
        setup: (config, base) -> the adapted module and its inputs.
        forward: (module, inputs) -> output with a graph, for the bytes saved for backward; None where there is no
            backward.
        step: (module, inputs, config) -> the call that is timed.
    """

    base: Callable[[Config, torch.device], nn.Module]
    setup: Callable[[Config, nn.Module], Setup]
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None
    step: Callable[[nn.Module, dict[str, Tensor], Config], Callable[..., Any]]


# --- one linear layer: forward and backward, with a gradient for the input


def linear_base(config: Config, device: torch.device) -> nn.Module:
    """A model of one linear layer, in 4 bits if config["quantization"] says so."""
    sizes, dtype = (config["in_features"], config["out_features"]), getattr(torch, config["dtype"])
    if config["quantization"] is None:
        return nn.Sequential(OrderedDict(linear=nn.Linear(*sizes, bias=False, dtype=dtype, device=device)))
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type=config["quantization"])
    weight = torch.randn(sizes[1], sizes[0], dtype=dtype) / sizes[0] ** 0.5
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=config["quantization"])
    linear.support_avx512bf16_for_cpu = False  # it would repack the weight for inference
    model = nn.Sequential(OrderedDict(linear=linear)).to(device)
    model.is_loaded_in_4bit = True
    return model


def setup_linear(config: Config, base: nn.Module) -> Setup:
    """The adapted layer and its input."""
    model = adapt(share(base), config, ["linear"]).train()
    layer = model.get_submodule("base_model.model.linear" if isinstance(model, PeftModel) else "linear")
    device = next(base.parameters()).device
    x = torch.randn(config["tokens"], config["in_features"], dtype=getattr(torch, config["dtype"]), device=device)
    return layer, {"x": x.requires_grad_()}


def linear_forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The layer's output."""
    return module(inputs["x"])


def linear_step(module: nn.Module, inputs: dict[str, Tensor], config: Config) -> Callable[..., None]:
    """Forward, and gradients of the input and of every adapter tensor."""
    x, parameters = inputs["x"], [p for p in module.parameters() if p.requires_grad]
    gradient = torch.randn(len(x), config["out_features"], dtype=x.dtype, device=x.device)

    def step(fresh: bool = False) -> None:
        # for the peak memory: a fresh tensor is kept by nobody but the layer, as within a network
        activation = x * 1 if fresh else x
        output = module(activation)
        del activation
        torch.autograd.grad(output, [x, *parameters], gradient)

    return step


# --- a Llama with random weights


def llama_base(config: Config, device: torch.device) -> nn.Module:
    """A Llama that never ends a text early."""
    sizes = {name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": config["layers"], "num_attention_heads": config["heads"]}
    llama = LlamaConfig(
        **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=None, max_position_embeddings=4096
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(llama, dtype=getattr(torch, config["dtype"]))
    model.generation_config.eos_token_id = None
    return model


def adapted_llama(config: Config, base: nn.Module) -> nn.Module:
    """A model of its own around the shared weights, with Liger's kernels where config["liger"] asks for them."""
    model = share(base)
    if config["liger"]:
        if model.device.type != "cuda":
            raise Unavailable("Liger's kernels need a CUDA device")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, cross_entropy=False)
    return adapt(model, config, FEED_FORWARD)


def setup_train(config: Config, base: nn.Module) -> Setup:
    """The adapted model and a batch. LoRAMoE gets task types; the balance term is part of its loss.

    The frozen base gets embeddings that require a gradient, so that there is a backward pass, through all of its
    layers.
    """
    ids = torch.randint(1, config["vocab_size"], (config["rows"], config["width"]), device=base.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if config["method"] == "loramoe":
        inputs["task_types"] = torch.arange(config["rows"], device=base.device) % 2
    if config["method"] == "base":
        inputs["inputs_embeds"] = base.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model = adapted_llama(config, base).train()
    if config["compile"]:
        model.compile(backend=config["compile"], dynamic=False)
    return model, inputs


def train_forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss."""
    return module(**inputs).loss


def train_step(module: nn.Module, inputs: dict[str, Tensor], config: Config) -> Callable[..., None]:
    """Forward, backward and, where there is something to train, a step of AdamW."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step(fresh: bool = False) -> None:
        module(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def setup_decode(config: Config, base: nn.Module) -> Setup:
    """The adapted model in evaluation mode and a prompt."""
    ids = torch.randint(1, config["vocab_size"], (1, config["prompt"]), device=base.device)
    return adapted_llama(config, base).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decode_step(module: nn.Module, inputs: dict[str, Tensor], config: Config) -> Callable[..., None]:
    """Greedy generation of config["new_tokens"] tokens at batch 1, the prompt's pass included."""
    options = {"max_new_tokens": config["new_tokens"], "do_sample": False, "disable_compile": not config["compile"]}
    if config["cache"] == "static":
        options["cache_implementation"] = "static"

    def step(fresh: bool = False) -> None:
        module.generate(**inputs, **options)

    return step


def share(base: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})


KINDS = {
    "layer": Kind(linear_base, setup_linear, linear_forward, linear_step),
    "train": Kind(llama_base, setup_train, train_forward, train_step),
    "decode": Kind(llama_base, setup_decode, None, decode_step),
}


# --- the tables


@dataclass(frozen=True)
class Case:
    """Variants that are timed against each other in the same rounds.

    Args:
        group: the table of the report that it belongs to.
        kind: what kind of case it is.
        config: everything that the variants have in common.
        variants: methods and the dtypes of their adapters.
        rounds: how often each is timed.
    """

    group: str
    kind: str
    config: dict[str, Any]
    variants: Sequence[Variant] = field(default_factory=list)
    rounds: int = 10


def both(*methods: str) -> list[Variant]:
    """The methods with float32 master adapters (the default of PEFT and of this package) and with bfloat16 ones."""
    return [(method, dtype) for method in methods for dtype in ("float32", "bfloat16")]


BASE: Variant = ("base", None)
FLOAT32 = [BASE, ("lora", "float32"), ("loop", "float32"), ("loramoe", "float32")]
LAYER = [BASE, *both("lora", "loop", "loramoe")]
FUSED = [*both("unsloth"), ("lorafusion", "bfloat16")]
SCALING = [BASE, ("lora", "bfloat16"), ("loramoe", "bfloat16")]
GPU_SCALING = [*SCALING, ("loramoe-torch", "bfloat16")]
WAYS = [*SCALING, ("loramoe-node", "bfloat16"), ("loramoe-autograd", "bfloat16")]
GPU_FULL = [*LAYER, ("loramoe-torch", "float32")]
MODEL = [BASE, *both("lora"), ("loop", "bfloat16"), *both("loramoe"), *((peer, "float32") for peer in MIXTURE_PEERS)]
ACCELERATED = [BASE, *both("lora", "loramoe")]
GPU_MODEL = [*ACCELERATED, ("loramoe-torch", "float32")]


def layers(
    group: str, variants: Sequence[Variant], rounds: int, base: Mapping[str, Any], changes: list[dict]
) -> list[Case]:
    """Cases of one layer: `base` with each of `changes`."""
    return [Case(group, "layer", {**base, **change}, variants, rounds) for change in changes]


MIXTURE = {"experts": 6, "r": 4, "dropout": 0.05, "dtype": "bfloat16"}
CPU_LAYER = {**MIXTURE, "in_features": 1024, "out_features": 2752, "tokens": 1024, "quantization": None}
GPU_LAYER = {**MIXTURE, "in_features": 4096, "out_features": 11008, "tokens": 8192, "quantization": None}
LLAMA = {"compile": None, "liger": False}
CPU_LLAMA = {
    **MIXTURE,
    **LLAMA,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "layers": 2,
    "heads": 8,
    "vocab_size": 2048,
}
GPU_LLAMA = {
    **MIXTURE,
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layers": 32,
    "heads": 32,
    "vocab_size": 32000,
}
GPU_SMALL = {  # of the size of SmolLM2-135M: its steps are bound by launching
    **MIXTURE,
    **LLAMA,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "layers": 30,
    "heads": 9,
    "vocab_size": 49152,
}
DROPOUT = [{"dropout": 0.0}, {"dropout": 0.05}]
EXPERTS = [{"experts": n} for n in (2, 4, 8, 16, 32, 64)]
RANKS = [{"r": r} for r in (2, 4, 8, 16, 32, 64)]
TOKENS = [{"tokens": t} for t in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)]

SMALL = [{"tokens": t} for t in (1, 4, 16, 56, 256, 1024)]


def widths(*sizes: int) -> list[dict]:
    """Square-ish layers of Llama's proportions."""
    return [{"in_features": d, "out_features": d * 43 // 16} for d in sizes]


SETS: dict[str, list[Case]] = {
    "cpu": [
        *layers("layer", FLOAT32, 60, {**CPU_LAYER, "dtype": "float32"}, DROPOUT),
        *layers("layer", LAYER, 50, CPU_LAYER, DROPOUT),
        *layers("4-bit layer", LAYER, 5, {**CPU_LAYER, "quantization": "nf4"}, DROPOUT[1:]),
        *layers("experts", SCALING, 25, {**CPU_LAYER, "dropout": 0.0}, EXPERTS),
        *layers("rank", SCALING, 5, {**CPU_LAYER, "tokens": 256}, RANKS),
        *layers("tokens", SCALING, 5, {**CPU_LAYER, "in_features": 128, "out_features": 344}, TOKENS),
        *layers("width", SCALING, 5, {**CPU_LAYER, "tokens": 128}, widths(128, 256, 512, 1024, 2048, 4096)),
        *layers("small inputs", WAYS, 15, {**CPU_LAYER, "in_features": 576, "out_features": 1536}, SMALL),
        *layers("small inputs", WAYS, 15, {**CPU_LAYER, "in_features": 1536, "out_features": 576}, SMALL),
        Case("training step", "train", {**CPU_LLAMA, "rows": 2, "width": 128}, MODEL, 15),
        Case("compiled training step", "train", {**CPU_LLAMA, "rows": 2, "width": 128, "compile": "inductor"},
             [BASE, ("lora", "float32"), ("loramoe", "float32")], 15),
        *[Case("decoding", "decode", {**CPU_LLAMA, "cache": cache, "prompt": 16, "new_tokens": 8}, MODEL, 20)
          for cache in ("dynamic", "static")],
    ],
    "gpu": [
        *layers("layer", [*GPU_FULL, *FUSED], 15, GPU_LAYER, DROPOUT),
        *layers("layer", [*GPU_FULL, *FUSED], 15, {**GPU_LAYER, "in_features": 11008, "out_features": 4096}, DROPOUT),
        *layers("layer", [*GPU_FULL, *FUSED], 15, {**GPU_LAYER, "tokens": 4096}, DROPOUT),
        *layers("layer", [*FLOAT32, ("unsloth", "float32")], 5, {**GPU_LAYER, "dtype": "float32", "tokens": 4096}, DROPOUT[1:]),
        *layers("layer of rank 32", [*GPU_FULL, *FUSED], 15, {**GPU_LAYER, "experts": 8}, DROPOUT[1:]),
        *layers("4-bit layer", GPU_FULL, 15, {**GPU_LAYER, "quantization": "nf4"}, DROPOUT[1:]),
        Case("training step", "train", {**GPU_LLAMA, "rows": 1, "width": 2048}, [*GPU_MODEL, ("loop", "bfloat16")], 7),
        Case("training step of 8192 tokens", "train", {**GPU_LLAMA, "layers": 8, "rows": 4, "width": 2048}, GPU_MODEL, 7),
        Case("training step of a small model", "train", {**GPU_SMALL, "rows": 4, "width": 128}, [*MODEL, ("loramoe-torch", "float32")], 9),
        *[Case("decoding", "decode", {**GPU_LLAMA, "cache": cache, "prompt": 32, "new_tokens": 16}, GPU_MODEL, 5)
          for cache in ("dynamic", "static")],
        Case("decoding with a small model", "decode", {**GPU_SMALL, "cache": "dynamic", "prompt": 32, "new_tokens": 16},
             GPU_MODEL, 5),
        *layers("experts", GPU_SCALING, 9, GPU_LAYER, EXPERTS),
        *layers("rank", GPU_SCALING, 9, GPU_LAYER, RANKS),
        *layers("tokens", GPU_SCALING, 9, GPU_LAYER, TOKENS),
        *layers("small inputs", WAYS, 9, GPU_LAYER, SMALL),
        *layers("width", GPU_SCALING, 9, GPU_LAYER, widths(512, 1024, 2048, 4096, 8192)),
        Case("training step with Liger", "train", {**GPU_LLAMA, "rows": 1, "width": 2048, "liger": True}, ACCELERATED, 7),
        Case("compiled decoding", "decode",
             {**GPU_LLAMA, "layers": 4, "cache": "static", "prompt": 32, "new_tokens": 64, "compile": "inductor"},
             [BASE, ("lora", "bfloat16"), ("loramoe", "float32")], 5),
        Case("compiled training step", "train", {**GPU_LLAMA, "layers": 4, "rows": 1, "width": 2048, "compile": "inductor"},
             [BASE, ("lora", "bfloat16"), ("loramoe", "float32")], 7),
    ],
}  # fmt: skip

TINY = {
    "in_features": 64,
    "out_features": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers": 1,
    "heads": 2,
    "vocab_size": 64,
    "width": 8,
    "prompt": 4,
    "new_tokens": 3,
}


def shrink(case: Case) -> Case:
    """The same case so small that only its code is run: two rounds, tiny shapes, no C++ compiler."""
    config = {name: TINY.get(name, value) for name, value in case.config.items()}
    for name, most in (("tokens", 16), ("experts", 6), ("r", 4)):
        if name in config:
            config[name] = min(config[name], most)
    if case.kind == "train" and config["compile"]:
        config["compile"] = "eager"
    return replace(case, config=config, rounds=2)


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases without repetitions, which shrinking leaves."""
    found: list[Case] = []
    for case in cases:
        if case not in found:
            found.append(case)
    return found
