"""Parameter groups with learning rates of their own for the A matrices, the B matrices and the routers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..experts import LoRAExperts


def optimizer_groups(
    model: nn.Module,
    lr: float,
    *,
    router_lr: float | None = None,
    loraplus_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

    Every trainable parameter is in exactly one group. With Trainer: `optimizers=(AdamW(groups), None)` or
    `optimizer_cls_and_kwargs=(AdamW, {"params": groups, "lr": lr})`; its scheduler scales every group, and `learning_rate` in
    its logs is that of the first one. `weight_decay` of TrainingArguments has no effect then: give it here. FSDP1, which
    replaces parameters, is not supported.

    Args:
        model: the adapted model, before it is wrapped for distributed training.
        lr: learning rate of the A matrices and of what else is trainable (biases, `modules_to_save`).
        router_lr: learning rate of the routers; None for `lr`.
        loraplus_lr_ratio: the B matrices' learning rate divided by `lr`, above 1 in LoRA+ (Hayou et al. 2024, arXiv
            2402.12354); None for 1.
        weight_decay: of all parameters but biases and norms (those with fewer than two dimensions).

    Returns:
        Those of the groups "A", "B", "router", "other" and "no_decay" that are not empty, in this order. Each is a dictionary
        of `name` (str, kept in the optimizer's `param_groups`), `params` (list of parameters), `lr` and `weight_decay`.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of its range or would have no effect, or no LoRAMoE parameter is trainable.
    """
    _check_options(lr, router_lr, loraplus_lr_ratio, weight_decay)
    experts = [module for module in model.modules() if isinstance(module, LoRAExperts)]
    if not experts:
        raise ValueError(f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model first.")
    roles = {id(getattr(one, role)): role for one in experts for role in ("A", "B", "router")}
    params: dict[str, list[nn.Parameter]] = {name: [] for name in ("A", "B", "router", "other", "no_decay")}
    for parameter in model.parameters():  # gives shared ones once
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a partitioned matrix flat
            params[roles.get(id(parameter), "other" if dimensions > 1 else "no_decay")].append(parameter)
    if not (params["A"] or params["B"] or params["router"]):
        raise ValueError(
            "None of the model's LoRAMoE parameters is trainable: the adapter was loaded for inference, or set_adapter chose "
            "another one. Load it with is_trainable=True."
        )
    for option, value, role in (("router_lr", router_lr, "router"), ("loraplus_lr_ratio", loraplus_lr_ratio, "B")):
        if value is not None and not params[role]:
            raise ValueError(f"{option}={value} would have no effect: no {role} is trainable. Unfreeze them or leave it out.")
    rates = {"B": lr * (loraplus_lr_ratio or 1), "router": router_lr or lr}
    return [
        {
            "name": name,
            "params": members,
            "lr": rates.get(name, lr),
            "weight_decay": 0.0 if name == "no_decay" else weight_decay,
        }
        for name, members in params.items()
        if members
    ]


def _check_options(lr: float, router_lr: float | None, loraplus_lr_ratio: float | None, weight_decay: float) -> None:
    options = {"lr": lr, "router_lr": router_lr, "loraplus_lr_ratio": loraplus_lr_ratio, "weight_decay": weight_decay}
    for option, value in options.items():
        if value is None and option in ("router_lr", "loraplus_lr_ratio"):
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{option}={value!r} must be a number.")
        if not math.isfinite(value) or value < 0 or (value == 0 and option != "weight_decay"):
            raise ValueError(f"{option}={value} must be {'zero or more' if option == 'weight_decay' else 'positive'}.")
