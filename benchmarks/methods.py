"""What is compared: each method adapts the linear layers of a model in place and returns the model to call."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.ops import mixture as mixture_module
from peft_loramoe.ops import mixture_torch

from .expert_loop import ExpertLoop


Config = Mapping[str, Any]
LORA_ALPHA = 32


class Unavailable(Exception):
    """A method cannot run here; the message says why."""


def adapt(model: nn.Module, config: Config, targets: Sequence[str]) -> nn.Module:
    """Adapt the layers named `targets` as config["method"] says, with adapters of dtype config["adapter_dtype"].

    Raises:
        Unavailable: the method's package is not installed, or does not run with the installed versions.
    """
    model.requires_grad_(False)
    adapted = METHODS[config["method"]](model, config, list(targets))
    dtype = config["adapter_dtype"]
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != getattr(torch, dtype):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return adapted


def no_adapter(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """The frozen base model."""
    return model


def lora(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """PEFT's LoRA with as many parameters: rank N*r."""
    options = {"r": config["experts"] * config["r"], "lora_alpha": LORA_ALPHA, "lora_dropout": config["dropout"]}
    return get_peft_model(model, LoraConfig(**options, target_modules=targets, task_type=_task_type(model)))


def loramoe(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """This package."""
    options = {
        "r": config["r"],
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": config["dropout"],
        "num_experts": config["experts"],
    }
    return get_peft_model(model, LoRAMoEConfig(**options, target_modules=targets, task_type=_task_type(model)))


def compiled_loramoe(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """This package in torch, each layer compiled by inductor."""
    adapted = loramoe(model, config, targets)
    for layer in adapted.modules():
        if hasattr(layer, "loramoe_experts"):
            layer.compile(dynamic=False)
    return adapted


def loop(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """The loop over experts."""

    def wrap(linear: nn.Linear) -> ExpertLoop:
        return ExpertLoop(
            linear,
            linear.in_features,
            linear.out_features,
            experts=config["experts"],
            r=config["r"],
            scaling=LORA_ALPHA / config["r"],
            dropout=config["dropout"],
            dtype=getattr(torch, config["adapter_dtype"]),
            device=linear.weight.device,
        )

    return _replace(model, targets, wrap)


def moe_peft(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """The LoRAMoE layers of the released package moe_peft, in transformers' model.

    Its own Llama does not load with transformers 5 ("'LlamaConfig' object has no attribute 'rope_theta'").
    """
    _need("moe_peft")
    from moe_peft.adapters import adapter_factory, moe_layer_factory
    from moe_peft.common import Linear, LLMBatchConfig, LLMModelInput

    options = {
        "r": config["r"],
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": config["dropout"],
        "num_experts": config["experts"],
    }
    adapter = adapter_factory("LORAMOE", "adapter", **options, target_modules=targets, routing_strategy="loramoe")

    class Layer(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            device = base_layer.weight.device
            self.linear = Linear(base_layer, device)
            router = self.linear.moes_["adapter"] = moe_layer_factory(base_layer.in_features, device, adapter)
            for i in range(config["experts"]):
                self.linear.init_lora_weight(adapter.expert_config(i))
            # the package keeps them in plain dicts, where parameters() and eval() do not find them
            self.found = nn.ModuleList([router.gate_, *self.linear.loras_.values()])

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x, LLMModelInput(batch_configs_=[LLMBatchConfig("adapter", 0, len(x))]))

    return _replace(model, targets, Layer)


def mixlora(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """The released package mixlora.

    Another method (whole feed-forward experts, two of N for each token), same sizes.
    """
    _need("mixlora")
    from mixlora import MixLoraConfig, inject_adapter_in_model

    names = {"base_model_name_or_path": "random", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA"}
    options = {
        "r": config["r"],
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": config["dropout"],
        "num_experts": config["experts"],
    }
    adapter = MixLoraConfig.from_config(
        {**names, **options, "target_modules": targets, "top_k": 2, "routing_strategy": "mixlora", "act_fn": "silu"}
    )
    adapter.adapter_name_, adapter.dtype_ = "adapter", getattr(torch, config["adapter_dtype"])
    adapter.check()
    weights = {}
    for i, layer in enumerate(model.model.layers):
        prefix, device = f"mixlora.layers.{i}.mlp", layer.mlp.gate_proj.weight.device
        weights[f"{prefix}.moe_gate.weight"] = 0.02 * torch.randn(
            config["experts"], model.config.hidden_size, device=device
        )
        for name in targets:
            linear = getattr(layer.mlp, name)
            for expert in range(config["experts"]):
                key = f"{prefix}.{name}.experts.{expert}.lora"
                weights[f"{key}_A.weight"] = 0.02 * torch.randn(config["r"], linear.in_features, device=device)
                weights[f"{key}_B.weight"] = torch.zeros(linear.out_features, config["r"], device=device)
    inject_adapter_in_model(model, adapter, weights)
    for layer in model.model.layers:  # it keeps experts and router where parameters() and eval() do not find them
        mixture = layer.mlp.mixlora_moes["adapter"]
        layer.mlp.found = nn.ModuleList(mixture.experts_.values())
        mixture.gate_ = layer.mlp.found_router = nn.Parameter(mixture.gate_)
    return model


def unsloth(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """Unsloth's fused LoRA of one linear, as it calls it for a model's output projection, around PEFT's LoRA layers.

    `import unsloth` needs many other packages and changes others at import, which all methods would be measured with,
    so only the modules of its kernels are run.
    """
    for package in ("unsloth", "unsloth_zoo"):
        _need(package)
    for package in ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches"):
        _import_without_init(package)
    from unsloth.kernels.fast_lora import apply_lora_o

    class Layer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.o_proj = layer  # the name that the function looks for

        def forward(self, x: Tensor) -> Tensor:
            return apply_lora_o(self, x.unsqueeze(0)).squeeze(0)

    return _replace(lora(model, config, targets), targets, Layer)


def lorafusion(model: nn.Module, config: Config, targets: list[str]) -> nn.Module:
    """LoRAFusion's fused linear and LoRA, around PEFT's LoRA layers.

    It takes adapters of the dtype of the activations only.
    """
    _need("lorafusion")
    rank, width = config["experts"] * config["r"], config["in_features"]
    if not config["dropout"]:
        raise Unavailable("lorafusion's backward pass reads the dropout mask, which it does not have without dropout")
    if rank < 16 or rank & (rank - 1):
        raise Unavailable(f"lorafusion's kernels need a rank that is a power of two and at least 16, not {rank}")
    if width % 256:
        raise Unavailable(f"lorafusion reads past its tensors if the input size, {width}, is no multiple of 256")
    _leave_out_removed_tma()
    from lorafusion.ops.lora_v1 import fused_linear_lora

    class Layer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            layer = self.layer
            return fused_linear_lora(
                x.unsqueeze(0),
                layer.base_layer.weight,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                alpha=layer.scaling["default"],
                dropout_p=layer.lora_dropout["default"].p,
                linear_bias=layer.base_layer.bias,
            ).squeeze(0)

    return _replace(lora(model, config, targets), targets, Layer)


METHODS: dict[str, Callable[[nn.Module, Config, list[str]], nn.Module]] = {
    "base": no_adapter,
    "lora": lora,
    "loop": loop,
    "loramoe": loramoe,
    "loramoe-torch": loramoe,
    "loramoe-node": loramoe,
    "loramoe-autograd": loramoe,
    "loramoe-triton": loramoe,
    "loramoe-compiled": compiled_loramoe,
    "moe_peft": moe_peft,
    "mixlora": mixlora,
    "unsloth": unsloth,
    "lorafusion": lorafusion,
}
# How a method computes its mixtures: whether with the Triton kernels, and the size up to which an input is small (the
# package's, if None). "loramoe" leaves all to the package.
IMPLEMENTATIONS: dict[str, tuple[bool, float | None]] = {
    "loramoe-torch": (False, None),
    "loramoe-node": (False, -1),
    "loramoe-autograd": (False, math.inf),
    "loramoe-compiled": (False, None),
    "loramoe-triton": (True, None),
}
MIXTURE_PEERS = ("moe_peft", "mixlora")
LORA_PEERS = ("unsloth", "lorafusion")
PEERS = (*MIXTURE_PEERS, *LORA_PEERS)


def computed_by(method: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, with the implementation of the mixture that the method names.

    Raises:
        Unavailable: the Triton kernels do not run here.
    """
    if method not in IMPLEMENTATIONS:
        return step
    triton, limit = IMPLEMENTATIONS[method]
    if triton and not torch.cuda.is_available():
        raise Unavailable("the Triton kernels need a CUDA device")
    kernels = importlib.import_module("peft_loramoe.ops.mixture_triton") if triton else None
    wanted = (kernels, *(_implementation()[1:] if limit is None else (limit, limit)))

    def with_implementation(**options: Any) -> Any:
        former = _implementation()
        _set_implementation(*wanted)
        try:
            return step(**options)
        finally:
            _set_implementation(*former)

    return with_implementation


def _implementation() -> tuple[ModuleType | None, float, float]:
    return mixture_module.KERNELS, mixture_torch.SMALL_TOKENS, mixture_torch.SMALL_ENTRIES


def _set_implementation(kernels: ModuleType | None, tokens: float, entries: float) -> None:
    mixture_module.KERNELS = kernels
    mixture_torch.SMALL_TOKENS, mixture_torch.SMALL_ENTRIES = tokens, entries


def _replace(model: nn.Module, targets: list[str], wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    for name in found:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, wrap(getattr(owner, leaf)))
    return model


def _task_type(model: nn.Module) -> str | None:
    return "CAUSAL_LM" if hasattr(model, "generate") else None


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def _import_without_init(package: str) -> None:
    """Import a package so that its modules can be imported, without running its __init__."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise Unavailable(f"{package} is not installed")
        sys.modules[package] = importlib.util.module_from_spec(spec)


def _leave_out_removed_tma() -> None:
    """Let lorafusion be imported by a Triton without the experimental TMA functions.

    It imports its TMA kernels in any case, and uses others where the hardware has no TMA. Its own check for TMA is
    answered with no.
    """
    import triton.language as tl

    if hasattr(tl, "_experimental_descriptor_load"):
        return
    modules = {"tma_utils": {"HAS_TMA_DESC": False}}
    modules |= {name: {name: None} for name in ("fused_lora_xw_sb_tma", "fused_lora_dyw_dsa_tma")}
    for name, contents in modules.items():
        module = ModuleType(f"lorafusion.ops.triton_ops.{name}")
        vars(module).update(contents)
        sys.modules.setdefault(module.__name__, module)
