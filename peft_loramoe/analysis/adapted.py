"""What the analyses share: the experts of an adapted model by layer, and how a model is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import LoRAMoEConfig
from ..experts import LoRAExperts
from ..layer import LoRAMoELinear


def experts_by_layer(model: nn.Module) -> dict[tuple[str, str], LoRAExperts]:
    """The experts of every adapted linear by adapter and layer name, in the model's order.

    Raises:
        ValueError: the model has no LoRAMoE layers.
    """
    linears = _linears(model)
    return {(adapter, linear.name): experts for linear in linears for adapter, experts in linear.loramoe_experts.items()}


def configs_of(model: nn.Module) -> Mapping[str, LoRAMoEConfig]:
    """The adapters' configurations by name, however they were attached.

    Raises:
        ValueError: the model has no LoRAMoE layers.
    """
    return _linears(model)[0].recorder.configs


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on."""
    # What is offloaded to disk is on the meta device until its layer runs.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one call, their tensors on the model's device."""
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def uses_prompt_learning(model: nn.Module) -> bool:
    """Whether the adapter is one of virtual tokens before the text, such as prompt tuning."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model takes `logits_to_keep`, and its positions are the text's: virtual tokens would come first."""
    return not uses_prompt_learning(model) and takes(model, "logits_to_keep")


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward of the base model has an argument of that name."""
    return argument in inspect.signature(_base_of(model).forward).parameters


def adapts_only_below_head(model: nn.Module) -> bool:
    """Whether all adapted linears are in the part of the model that is below its head; False if it is not told apart."""
    base = _base_of(model)
    below = getattr(base, "base_model", base)
    return below is not base and {*_linears(model)} <= {*below.modules()}


def adds_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text gets the tokenizer's special tokens: not if it begins with BOS, as chat templates make it."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def require_finite(values: Tensor, adapter: str, layer: str) -> None:
    """Refuse router probabilities, or sums of them, that are not finite.

    Raises:
        ValueError: one is not.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The router probabilities of adapter '{adapter}' in layer '{layer}' are not finite: training diverged, or the "
            "base model overflows in its dtype."
        )


def _linears(model: nn.Module) -> list[LoRAMoELinear]:
    linears = [module for module in model.modules() if isinstance(module, LoRAMoELinear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model first.")
    return linears


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
