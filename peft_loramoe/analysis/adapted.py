"""Helpers that the analyses share: the experts of an adapted model, and how to call a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..experts import LoRAExperts
from ..layer import adapted_layers


def experts_by_layer(model: nn.Module) -> dict[tuple[str, str], LoRAExperts]:
    """The experts of every adapted linear, by adapter and layer name, in the order of the model.

    Raises:
        ValueError: the model has no LoRAMoE layers.
    """
    return {
        (adapter, layer.name): experts
        for layer in adapted_layers(model)
        for adapter, experts in layer.loramoe_experts.items()
    }


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model expects its inputs."""
    # Weights offloaded to disk are on the meta device until their layer runs.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to the device of the model."""
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def uses_prompt_learning(model: nn.Module) -> bool:
    """Whether the active adapter prepends virtual tokens, as prompt tuning does."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model takes `logits_to_keep` and its positions are not shifted by virtual tokens."""
    return not uses_prompt_learning(model) and takes(model, "logits_to_keep")


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the base model's forward takes this argument."""
    return argument in inspect.signature(_base_of(model).forward).parameters


def adapts_only_below_head(model: nn.Module) -> bool:
    """Whether all adapted linears are below the model's head; False if the model has no separate head."""
    base = _base_of(model)
    below = getattr(base, "base_model", base)
    return below is not base and {*adapted_layers(model)} <= {*below.modules()}


def adds_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether to add special tokens to a text: not if it begins with BOS already, as chat templates do."""
    begin = tokenizer.bos_token
    return not (isinstance(begin, str) and begin and text.startswith(begin))


def require_finite(values: Tensor, adapter: str, layer: str) -> None:
    """Check that router probabilities, or sums of them, are finite.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The router probabilities of adapter '{adapter}' in layer '{layer}' are not finite: training diverged, "
            "or the base model overflows in its dtype."
        )


def _base_of(model: nn.Module) -> nn.Module:
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
