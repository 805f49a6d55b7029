"""Convert adapters of MoE-PEFT (github.com/TUDB-Labs/MoE-PEFT) with its routing strategy "loramoe".

In its code, feed-forward linears among `target_modules` become mixtures with experts of rank `r`. The experts' outputs
are weighted by the softmax of a float32 gate, without dropout on its input, and scaled by `lora_alpha / r` (or its
square root). There is no balance term. Attention linears among `target_modules` get a plain LoRA, which is converted
to two identical experts with a router of zeros: their mean is the LoRA, and they stay identical in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import LoRAMoEConfig
from .files import abbreviate, stack_experts


KEY = re.compile(
    r"(?:loramoe|base_model\.model\.model)\.(?P<module>layers\.\d+\.\w+\.\w+)\."
    r"(?:moe_gate|(?:experts\.(?P<expert>0|[1-9]\d*)\.)?lora_(?P<part>[AB]))\.weight"
)
LOOKED_FOR = (
    "MoE-PEFT's layout: `routing_strategy` 'loramoe', tensors loramoe.layers.0.mlp.<linear>.moe_gate.weight, "
    ".experts.0.lora_A.weight"
)
REQUIRED = ("r", "lora_alpha", "num_experts")
COPIES = 2  # of a plain LoRA; a layer has at least two experts


def is_moe_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter has MoE-PEFT's layout."""
    return config.get("routing_strategy") == "loramoe" and any(
        KEY.fullmatch(key) and key.endswith(".moe_gate.weight") for key in tensors
    )


def from_moe_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoRAMoEConfig, dict[str, Tensor]]:
    """Convert an adapter from MoE-PEFT's layout; tensors are stacked, their values do not change.

    Module names become those of transformers' decoders, ``model.layers...`` (Llama, Mistral, Gemma, Qwen, Phi).

    Args:
        config: content of ``adapter_config.json``.
        tensors: for each linear, ``moe_gate.weight`` (N, in) and, for each expert, ``lora_A.weight`` (r, in) and
            ``lora_B.weight`` (out, r).

    Returns:
        The configuration, without a balance term, and the tensors by their names in PEFT.

    Raises:
        ValueError: an option or tensor is missing or has no counterpart here, or the experts cannot be stacked.
    """
    if missing := [name for name in REQUIRED if config.get(name) is None]:
        raise ValueError(f"MoE-PEFT's adapter_config.json lacks {', '.join(missing)}; it is incomplete.")
    if unknown := [key for key in tensors if not KEY.fullmatch(key)]:
        raise ValueError(f"Only tensors of experts and gates can be converted, not: {abbreviate(unknown)}.")

    modules: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        assert match is not None  # as checked above
        parts = modules.setdefault(f"model.{match['module']}", {"A": {}, "B": {}, "gate": None, "plain": {}})
        if match["expert"]:
            parts[match["part"]][int(match["expert"])] = tensor
        elif match["part"]:
            parts["plain"][match["part"]] = tensor
        else:
            parts["gate"] = tensor
    if foreign := [module for module in modules if "4h" in module]:
        raise ValueError(f"ChatGLM's modules have other names in transformers; cannot convert {abbreviate(foreign)}.")
    plain = {_name(module) for module, parts in modules.items() if parts["plain"]}
    mixtures = {
        _name(module) for module, parts in modules.items() if parts["A"] or parts["B"] or parts["gate"] is not None
    }
    if both := plain & mixtures:
        raise ValueError(f"The linears {abbreviate(both)} have experts in some layers and a plain LoRA in others.")
    if plain and config.get("use_dora"):  # MoE-PEFT ignores it in mixtures
        raise ValueError(
            f"use_dora=True has no counterpart here; MoE-PEFT applies it to the plain LoRA of {abbreviate(plain)}."
        )

    try:
        converted = LoRAMoEConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout") or 0.0,
            use_rslora=config.get("use_rslora", False),
            target_modules=sorted(plain | mixtures),
            num_experts=config["num_experts"],
            expert_groups=[config["num_experts"]],
            num_experts_pattern={name: [COPIES] for name in sorted(plain)},
            balance_loss_weight=0.0,
            router_lr_multiplier=1.0,  # MoE-PEFT has a single learning rate
            base_model_name_or_path=config.get("base_model_name_or_path"),
            task_type=config.get("task_type"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"MoE-PEFT's adapter_config.json cannot be converted: {error}") from error
    stacked = {}
    for module, parts in modules.items():
        A, B, gate, num_experts = parts["A"], parts["B"], parts["gate"], converted.num_experts
        if parts["plain"]:
            num_experts = COPIES
            A, B = ({i: parts["plain"][P] for i in range(COPIES) if P in parts["plain"]} for P in "AB")
            gate = torch.zeros(COPIES, *A[0].shape[-1:]) if A else None  # stack_experts checks A
        stacked |= stack_experts(module, A, B, gate, num_experts, converted.r)
    return converted, stacked


def _name(module: str) -> str:
    return module.rpartition(".")[2]
