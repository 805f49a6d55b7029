"""Convert adapters from and to the layout of the LoRAMoE authors' repository (github.com/Ablustrund/LoRAMoE).

In their code (peft/tuners/lora.py), `r` is the rank of one expert. The experts' outputs are weighted by the float32
softmax of `lora_route(x)`, without dropout on x, and scaled by `lora_alpha / r`. Each expert draws its own dropout
mask; here, they share one. `blc_alpha` is delta and `blc_weight` beta. The first half of the experts belongs to task
type 1 and the second half to type 0, so their types 1 and 0 are types 0 and 1 here. Its balance term is that of
``balance_formula="cv_squared"``, ``balance_target="paper"`` and ``balance_importance="sum"``, except that it counts
padding as tokens.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from ..config import LoRAMoEConfig
from .files import PREFIX, abbreviate, experts_by_module, stack_experts


KEY = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?:(?P<part>[AB])(?P<expert>0|[1-9]\d*)|route)\.weight"
)
LOOKED_FOR = (
    "the authors' layout: peft_type 'LORA' with `lora_nums`, tensors <module>.lora_A0.weight, .lora_B0, .lora_route"
)
REQUIRED = ("r", "lora_alpha", "lora_nums", "target_modules")

# Options that exist in the authors' layout, that have no effect after training, or that only matter in training.
HELD = (
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "num_experts", "balance_delta", "balance_loss_weight"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "task_type", "peft_type", "inference_mode", "revision", "auto_mapping"),
)
OF_NO_CONSEQUENCE = (
    "init_weights",
    "router_init",
    "peft_version",
    "peft_loramoe_version",
    "task_type_names",
    "freeze_experts",
)
TRAINING = {
    "balance_formula": "cv_squared",
    "balance_target": "paper",
    "balance_importance": "sum",
    "balance_detach": False,
    "balance_across_processes": False,
    "router_lr_multiplier": 1.0,
}


def is_authors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter has the authors' layout."""
    return config.get("peft_type") == "LORA" and "lora_nums" in config and any(KEY.fullmatch(key) for key in tensors)


def from_authors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoRAMoEConfig, dict[str, Tensor]]:
    """Convert an adapter from the authors' layout; tensors are stacked, their values do not change.

    Args:
        config: content of ``adapter_config.json``.
        tensors: for each linear, ``lora_A{e}.weight`` (r, in), ``lora_B{e}.weight`` (out, r), ``lora_route.weight``
            (N, in).

    Returns:
        The configuration, with the options that reproduce their training, and the tensors by their names in PEFT.

    Raises:
        ValueError: an option or tensor is missing or has no counterpart here, or the experts cannot be stacked.
    """
    if missing := [name for name in REQUIRED if config.get(name) is None]:
        raise ValueError(f"The authors' adapter_config.json lacks {', '.join(missing)}; it is incomplete.")
    for name, plain in (("bias", "none"), ("modules_to_save", None), ("enable_lora", None)):
        if config.get(name) not in (plain, None):
            raise ValueError(
                f"{name}={config[name]!r} has no counterpart here; only experts and routers can be converted."
            )
    if unknown := [key for key in tensors if not KEY.fullmatch(key)]:
        raise ValueError(f"Only tensors of experts and routers can be converted, not: {abbreviate(unknown)}.")

    modules: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        assert match is not None  # as checked above
        parts = modules.setdefault(match["module"], {"A": {}, "B": {}, "route": None})
        if match["part"]:
            parts[match["part"]][int(match["expert"])] = tensor
        else:
            parts["route"] = tensor
    num_experts = config["lora_nums"]
    try:
        converted = LoRAMoEConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout") or 0.0,
            fan_in_fan_out=config.get("fan_in_fan_out", False),
            target_modules=_targets(config["target_modules"], list(modules)),
            num_experts=num_experts,
            expert_groups=[num_experts] if num_experts % 2 else [num_experts // 2] * 2,
            balance_delta=config.get("blc_alpha") or 0.0,
            balance_loss_weight=config.get("blc_weight") or 0.0,
            base_model_name_or_path=config.get("base_model_name_or_path"),
            task_type=config.get("task_type"),
            **TRAINING,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The authors' adapter_config.json cannot be converted: {error} (lora_nums is num_experts here, blc_alpha "
            "balance_delta, blc_weight balance_loss_weight.)"
        ) from error
    stacked = {}
    for module, parts in modules.items():
        stacked |= stack_experts(module, parts["A"], parts["B"], parts["route"], num_experts, converted.r)
    return converted, stacked


def to_authors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert an adapter of this package to the authors' layout.

    Outputs stay the same. A warning tells if further training with their code would use another balance term.

    Args:
        config: content of ``adapter_config.json``.
        tensors: the tensors of the adapter.

    Returns:
        The contents of ``adapter_config.json`` and ``adapter_model.bin``.

    Raises:
        ValueError: an option or tensor has no counterpart in the authors' code.
    """
    ours = cast("LoRAMoEConfig", LoRAMoEConfig.from_peft_type(**config))
    default = LoRAMoEConfig()
    changed = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(default, f.name)}
    for name in sorted(changed - {*HELD, *OF_NO_CONSEQUENCE, *TRAINING, "expert_groups"}):
        raise ValueError(f"{name}={getattr(ours, name)!r} has no counterpart in the authors' code.")
    modules = experts_by_module(tensors)
    if len(tensors) > 3 * len(modules):
        rest = [key for key in tensors if ".loramoe_experts." not in key]
        raise ValueError(f"The authors' code has no counterpart for the tensors {abbreviate(rest)}.")
    num_experts = ours.num_experts
    if ours.balance_loss_weight > 0:
        different = [
            f"{name}={getattr(ours, name)!r}" for name, value in TRAINING.items() if getattr(ours, name) != value
        ]
        if num_experts % 2 == 0 and ours.groups_of().sizes != (num_experts // 2,) * 2:
            different.append(f"expert_groups={ours.expert_groups}")
        if different:
            warnings.warn(f"The authors' code does not support {', '.join(different)}; further training with it uses "
                          "another balance term or router learning rate. The outputs are the same.")  # fmt: skip

    named = ours.exclude_modules or ours.layers_to_transform is not None  # unknown to their code
    targets = list(modules) if named or ours.target_modules is None else ours.target_modules
    converted = {
        "base_model_name_or_path": ours.base_model_name_or_path,
        "bias": "none",
        "blc_alpha": ours.balance_delta,
        "blc_weight": ours.balance_loss_weight,
        "enable_lora": None,
        "fan_in_fan_out": ours.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": ours.lora_alpha,
        "lora_dropout": ours.lora_dropout,
        "lora_nums": num_experts,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": ours.r,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "task_type": ours.task_type,
    }
    separate = {}
    for module, parts in modules.items():
        if (sizes := (parts["A"].shape[0], parts["B"].shape[1])) != (total := num_experts * ours.r,) * 2:
            raise ValueError(
                f"'{module}' has A and B of rank {sizes}, not num_experts * r = {total}; the file is damaged."
            )
        for expert, (A, B) in enumerate(zip(parts["A"].split(ours.r), parts["B"].split(ours.r, dim=1))):
            separate[f"{PREFIX}{module}.lora_A{expert}.weight"] = A
            separate[f"{PREFIX}{module}.lora_B{expert}.weight"] = B.contiguous()
        separate[f"{PREFIX}{module}.lora_route.weight"] = parts["router"]
    return converted, separate


def _targets(targets: list[str] | str, modules: list[str]) -> list[str] | str:
    """Their targets match any suffix of a module's name; PEFT's match whole parts of it."""
    if isinstance(targets, str) or all(
        any(f".{module}".endswith(f".{name}") for name in targets) for module in modules
    ):
        return targets
    return modules
