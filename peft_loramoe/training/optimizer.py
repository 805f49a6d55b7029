"""Parameter groups with learning rates of their own for the A matrices, the B matrices and the routers."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from ..balance.results import configs_of
from ..experts import LoRAExperts
from ..layer import LoRAMoELayer, adapted_layers


def optimizer_groups(
    model: nn.Module,
    lr: float,
    *,
    router_lr: float | None = None,
    loraplus_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

    Every trainable parameter is in exactly one group. `LoRAMoETrainerMixin` gives the routers their rate by itself;
    pass these groups to it for other rates, as `optimizer_cls_and_kwargs=(AdamW, {"params": groups, "lr": lr})` or
    `optimizers=(AdamW(groups), None)`. Its scheduler scales every group, and `learning_rate` in its logs is that of
    the first one. `weight_decay` of TrainingArguments has no effect then: give it here. FSDP1, which replaces
    parameters, is not supported.

    Args:
        model: the adapted model, before it is wrapped for distributed training.
        lr: learning rate of the A matrices and of what else is trainable (biases, `modules_to_save`).
        router_lr: learning rate of the routers; None for `lr` times the configuration's `router_lr_multiplier`. With
            adapters that differ in it, each has a group "router" of its own.
        loraplus_lr_ratio: the B matrices' learning rate divided by `lr`, above 1 in LoRA+ (Hayou et al. 2024, arXiv
            2402.12354); None for 1.
        weight_decay: of all parameters but biases and norms (those with fewer than two dimensions).

    Returns:
        Those of the groups "A", "B", "router", "other" and "no_decay" that are not empty, in this order. Each is a
        dictionary of `name` (str, kept in the optimizer's `param_groups`), `params` (list of parameters), `lr` and
        `weight_decay`.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of its range or would have no effect, or no LoRAMoE parameter is trainable.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_loramoe import LoRAMoEConfig
        >>> from peft_loramoe.training import optimizer_groups
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(mlp, LoRAMoEConfig(target_modules=["0"]))
        >>> groups = optimizer_groups(model, lr=1e-3)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('A', 0.001), ('B', 0.001), ('router', 0.01)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    _check_options(lr, router_lr, loraplus_lr_ratio, weight_decay)
    experts = [experts for layer in adapted_layers(model) for experts in layer.loramoe_experts.values()]
    roles = {id(getattr(module, role)): role for module in experts for role in ("A", "B", "router")}
    params: dict[str, list[nn.Parameter]] = {name: [] for name in ("A", "B", "router", "other", "no_decay")}
    for parameter in model.parameters():  # gives shared ones once
        if parameter.requires_grad:
            dimensions = len(
                getattr(parameter, "ds_shape", parameter.shape)
            )  # ZeRO-3 leaves a partitioned matrix flat
            params[roles.get(id(parameter), "other" if dimensions > 1 else "no_decay")].append(parameter)
    if not (params["A"] or params["B"] or params["router"]):
        raise ValueError(
            "None of the model's LoRAMoE parameters is trainable: the adapter was loaded for inference, or "
            "set_adapter chose another one. Load it with is_trainable=True."
        )
    for option, value, role in (("router_lr", router_lr, "router"), ("loraplus_lr_ratio", loraplus_lr_ratio, "B")):
        if value is not None and not params[role]:
            raise ValueError(
                f"{option}={value} would have no effect: no {role} is trainable. Unfreeze them or leave it out."
            )
    multipliers = router_multipliers(model)
    groups: dict[tuple[str, float], list[nn.Parameter]] = defaultdict(list)
    for name, members in params.items():
        for parameter in members:
            rate = lr
            if name == "B":
                rate = lr * (loraplus_lr_ratio or 1)
            elif name == "router":
                rate = router_lr or lr * multipliers[id(parameter)]
            groups[name, rate].append(parameter)
    return [
        {
            "name": name,
            "params": members,
            "lr": rate,
            "weight_decay": 0.0 if name == "no_decay" else weight_decay,
        }
        for (name, rate), members in groups.items()
    ]


def router_multipliers(model: nn.Module) -> dict[int, float]:
    """`router_lr_multiplier` of every router's configuration, by the id of the router's parameter."""
    return {
        id(experts.router): cast("float", configs_of(layer)[name].router_lr_multiplier)  # filled in by now
        for layer in model.modules()
        if isinstance(layer, LoRAMoELayer)
        for name, experts in layer.loramoe_experts.items()
    }


def set_router_rates(optimizer: Optimizer, model: nn.Module) -> None:
    """Give the routers of a new optimizer `router_lr_multiplier` times the learning rate of the group that they are
    in.

    They move to groups of their own, named "router", with all other options of the group that they leave. Groups
    without a name are named "experts" if they hold A or B matrices, "other" if not.

    Args:
        optimizer: has not made a step yet.
        model: its model.

    Raises:
        ValueError: the optimizer sets its learning rate itself (lr=None).
    """
    multipliers = router_multipliers(model)
    matrices = {id(p) for module in model.modules() if isinstance(module, LoRAExperts) for p in (module.A, module.B)}
    for group in list(optimizer.param_groups):
        by_multiplier = defaultdict(list)
        for parameter in group["params"]:
            by_multiplier[multipliers.get(id(parameter), 1.0)].append(parameter)
        group["params"] = by_multiplier.pop(1.0, [])
        group.setdefault("name", "experts" if any(id(p) in matrices for p in group["params"]) else "other")
        for multiplier, routers in by_multiplier.items():
            if group["lr"] is None:
                raise ValueError(
                    f"{type(optimizer).__name__} was made with lr=None and sets its learning rate itself, so the "
                    f"routers cannot have {multiplier:g} times that. Give it a learning rate, or set "
                    "router_lr_multiplier=1."
                )
            rate = group["lr"] * multiplier
            optimizer.add_param_group({**group, "params": routers, "lr": rate, "name": "router"})


def routers_share_a_group(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether a group of the optimizer holds routers and other parameters, which then have the same learning rate."""
    routers = router_multipliers(model).keys()
    return any(len({id(p) in routers for p in group["params"]}) > 1 for group in optimizer.param_groups)


def _check_options(lr: float, router_lr: float | None, loraplus_lr_ratio: float | None, weight_decay: float) -> None:
    options = {"lr": lr, "router_lr": router_lr, "loraplus_lr_ratio": loraplus_lr_ratio, "weight_decay": weight_decay}
    for option, value in options.items():
        if value is None and option in ("router_lr", "loraplus_lr_ratio"):
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{option}={value!r} must be a number.")
        if not math.isfinite(value) or value < 0 or (value == 0 and option != "weight_decay"):
            raise ValueError(f"{option}={value} must be {'zero or more' if option == 'weight_decay' else 'positive'}.")
