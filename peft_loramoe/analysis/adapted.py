"""What the analyses need of an adapted model: its experts by layer, and batches on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_loramoe import LoRAExperts, LoRAMoEConfig, LoRAMoELinear


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


def group_of_each(expert_groups: list[int]) -> list[int]:
    """The group of each expert, from the sizes of the groups."""
    return [group for group, size in enumerate(expert_groups) for _ in range(size)]


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one call, their tensors on the model's device."""
    # What is offloaded to disk is on the meta device until its layer runs.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


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
