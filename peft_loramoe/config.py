"""`LoRAMoEConfig`: every option of the method, validated when it is set."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from peft.config import PeftConfig
from peft.utils import PeftType

from .card import loading_snippet, write_card
from .groups import ExpertGroups
from .ops import MixtureOptions
from .peft_api import get_pattern_key
from .version import __version__


logger = logging.getLogger(__name__)

BIAS = ("none", "all", "loramoe_only")
INIT_WEIGHTS = (True, False, "gaussian")
ROUTER_INIT = ("kaiming_uniform", "normal", "zeros")
ROUTER_DTYPES = ("float32", "float64", "bfloat16")
BALANCE_FORMULAS = ("cv_squared", "variance_to_mean")
BALANCE_TARGETS = ("corrected", "printed")
BALANCE_IMPORTANCE = ("mean", "sum")


def _option(help: str, default: Any = None, factory: Any = None) -> Any:
    source = {"default_factory": factory} if factory else {"default": default}
    return field(**source, metadata={"help": help})


@dataclass
class LoRAMoEConfig(PeftConfig):
    """Options of a LoRAMoE adapter. Options that PEFT's LoRA has keep its names and meanings.

    Raises:
        ValueError: an option has a value outside its range; the message names the option, the value and the fix.
        TypeError: an option has a value of the wrong type.

    Options:
    """

    r: int = _option("Rank of each expert.", 8)
    lora_alpha: float = _option(
        "The mixture is scaled by lora_alpha / r. Null experts take router weight without adding anything, so with them "
        "the LoRA experts start with a smaller sum of gates; LoRAMoEConfig.retain makes up for it.",
        8,
    )
    lora_dropout: float = _option("Probability of dropping an entry of the experts' input; all experts share a mask.", 0.0)
    use_rslora: bool = _option("Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA).", False)
    target_modules: list[str] | str | None = _option(
        "Linear layers to adapt: names (matched at the end of the module's name), a regular expression for the whole "
        "name, or 'all-linear'. None: the feed-forward linears of known architectures, as in the paper."
    )
    exclude_modules: list[str] | str | None = _option("Names or regular expression of modules not to adapt.")
    layers_to_transform: list[int] | int | None = _option("Indices of the transformer layers to adapt; None for all.")
    layers_pattern: list[str] | str | None = _option("Name of the module list that layers_to_transform indexes.")
    rank_pattern: dict[str, int] = _option("Module name or regular expression -> r, where it differs.", factory=dict)
    alpha_pattern: dict[str, float] = _option("The same for lora_alpha.", factory=dict)
    bias: str = _option(f"Biases of the base model to train, one of {BIAS}.", "none")
    modules_to_save: list[str] | None = _option("Further modules to train fully and save with the adapter.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        "Token ids whose embeddings to train too (or embedding name -> ids)."
    )
    fan_in_fan_out: bool = _option("The base weight is stored (in, out), as in GPT-2's Conv1D; set automatically.", False)
    init_weights: bool | str = _option(
        "True: the adapter starts as the identity (B zero); 'gaussian': the same with a normal A; False: random B too.", True
    )

    num_experts: int = _option("Number of experts (router outputs) of each adapted linear, at least 2.", 6)
    num_experts_pattern: dict[str, int | list[int]] = _option(
        "Module name or regular expression -> num_experts, or a list of group sizes, where it differs.", factory=dict
    )
    expert_groups: list[int] | None = _option(
        "Sizes of the expert groups; group g is meant for samples of task type g. None: two equal groups."
    )
    null_groups: list[int] | None = _option(
        "Groups whose experts are null: a router output without parameters or contribution. Their samples are routed to "
        "the untouched backbone."
    )
    task_type_names: list[str] | None = _option("Names of the groups' task types, accepted in task_types.")
    router_temperature: float = _option("The router's logits are divided by it.", 1.0)
    router_dtype: str = _option(f"dtype of the router's logits, one of {ROUTER_DTYPES}.", "float32")
    router_init: str = _option(f"Initialisation of the router, one of {ROUTER_INIT}.", "kaiming_uniform")
    top_k: int | None = _option("Experts that each token uses, their gates renormalised to one; None: all (dense).")
    router_lr_multiplier: float | None = _option(
        "The router's learning rate is this many times that of the experts; LoRAMoETrainerMixin and optimizer_groups apply it. "
        "None: 10, or 1 for a file written before the option existed."
    )
    freeze_experts: bool = _option(
        "Train the routers only; A and B stay as they are, through switching, saving and loading. For experts that were "
        "trained before, for example by upcycling. FSDP1 needs use_orig_params=True for it.",
        False,
    )

    balance_loss_weight: float = _option("Weight (beta) of the balance term in the training loss; 0 turns it off.", 0.1)
    balance_delta: float = _option("How far matched and other experts' target importance differ, in [0, 1).", 0.1)
    balance_formula: str = _option(
        "'cv_squared': var(Z) / mean(Z)^2, as in the authors' code; 'variance_to_mean': var(Z) / mean(Z), as printed.",
        "cv_squared",
    )
    balance_target: str = _option(
        "'corrected': importance is divided by its target, so the matched group gets the larger weight; 'printed': it is "
        "multiplied by it, as in the paper, which gives the matched group the smaller one.",
        "corrected",
    )
    balance_importance: str = _option(
        "Importance of an expert for a sample: 'mean' of the router probabilities over its tokens, or their 'sum' as in "
        "the paper, with which long samples outweigh short ones.",
        "mean",
    )
    balance_detach: bool = _option(
        "The balance term trains the router only, not the layers below it. Without it the terms of all adapted linears push "
        "on the hidden states, which makes a language model forget.",
        True,
    )
    balance_across_processes: bool = _option(
        "In training with several processes, compute the balance term over the samples of all of them instead of each "
        "process's own, so that it does not depend on how the batch is split. One all-gather a forward pass.",
        False,
    )
    peft_loramoe_version: str | None = _option("Version that wrote the config; filled in automatically.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORAMOE")
        if self.router_lr_multiplier is None:
            # Files state their version and every option that it knew; without this one, all parameters had one rate.
            self.router_lr_multiplier = 1.0 if self.peft_loramoe_version else 10.0
        self.peft_loramoe_version = self.peft_loramoe_version or __version__
        if Version(self.peft_loramoe_version) > Version(__version__):
            warnings.warn(
                f"The configuration was written by peft_loramoe {self.peft_loramoe_version}, newer than the installed "
                f"{__version__}; options that it does not know are ignored. Upgrade with `pip install -U peft_loramoe`."
            )
        if isinstance(self.router_dtype, torch.dtype):
            self.router_dtype = str(self.router_dtype).removeprefix("torch.")
        for name in ("target_modules", "exclude_modules"):
            _check_names(name, value := getattr(self, name))
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        for name in ("use_rslora", "fan_in_fan_out", "freeze_experts", "balance_detach", "balance_across_processes"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}={value!r} must be True or False.")
        self._check_lora_options()
        self._check_expert_options()
        self._check_balance_options()

    @classmethod
    def retain(cls, **overrides: Any) -> LoRAMoEConfig:
        """Learn new tasks and keep what the model knew: the configuration to start with.

        Group 0 has null experts: samples of task type 0, which stand for what the model knows already, are routed to the
        untouched backbone. Group 1 has the LoRA experts, for samples of type 1. The balance term trains the routers only, at
        ten times the experts' learning rate, without which they hardly learn to tell the types apart.

        An expert starts with a gate of 1 / num_experts, and null experts add nothing: with half of them null, the gates
        of the others sum to one half. `lora_alpha` makes up for it: unless it is given, it is chosen so that gate times
        scale is 4/3 at the start, whatever `r`, `num_experts` and `use_rslora` are. With 12 experts that is lora_alpha = 16 r.

        Args:
            overrides: any options of `LoRAMoEConfig`, in place of the preset's. Half of `num_experts` are null unless
                `expert_groups` says otherwise.

        Returns:
            The configuration. Without overrides: r=4, lora_alpha=64, num_experts=12, null_groups=[0],
            task_type_names=["knowledge", "tasks"], balance_delta=0.7, balance_loss_weight=0.1, balance_detach=True,
            router_lr_multiplier=10.

        Raises:
            ValueError: an override takes away what the preset is for: no null group for type 0, or no term that sends the
                samples of type 0 there; or an option has a value outside its range.
            TypeError: an option has a value of the wrong type, or there is no such option.

        Example:
            >>> from peft_loramoe import LoRAMoEConfig
            >>> config = LoRAMoEConfig.retain(r=8, task_type="CAUSAL_LM")
            >>> config.lora_alpha, config.groups_of()
            (128, ExpertGroups(sizes=(6, 6), null=(0,)))
        """
        groups = overrides.get("expert_groups")
        preset = {
            "r": 4,
            "num_experts": 12,
            "null_groups": [0],
            "task_type_names": ["knowledge", "tasks"],
            "balance_delta": 0.7,
            "balance_loss_weight": 0.1,
            "balance_detach": True,
            "router_lr_multiplier": 10.0,
        }
        if groups is not None:
            _check_group_sizes("expert_groups", groups)
            if len(groups) == 1:
                raise ValueError(
                    f"LoRAMoEConfig.retain(expert_groups={groups!r}): there must be a null group for type 0 and at least one "
                    "group of LoRA experts, for example [6, 6]. Use LoRAMoEConfig(...) for a mixture without a null group."
                )
            preset["num_experts"] = sum(groups)
            if len(groups) > 2:
                del preset["task_type_names"]  # only the user knows what the further types are
        config = cls(**{**preset, **overrides})
        for option, lost, promise in (
            (
                "null_groups",
                0 not in (config.null_groups or []),
                "group 0 is not null, so nothing leaves type 0 to the backbone",
            ),
            ("balance_loss_weight", config.balance_loss_weight == 0, "without the term the router does not learn the types"),
            ("balance_delta", config.balance_delta == 0, "the term then asks for the same routing of all types"),
            ("balance_target", config.balance_target == "printed", "it gives type 0 the smaller weight on its own group"),
        ):
            if lost:
                raise ValueError(
                    f"LoRAMoEConfig.retain({option}={getattr(config, option)!r}): {promise}. Leave {option} out, or use "
                    "LoRAMoEConfig(...), which promises nothing."
                )
        if "lora_alpha" not in overrides:
            alpha = 4 * config.num_experts * (config.r**0.5 if config.use_rslora else config.r) / 3
            config.lora_alpha = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        return config

    @classmethod
    def paper(cls, **overrides: Any) -> LoRAMoEConfig:
        """LoRAMoE as its authors trained it (Dou et al., ACL 2024, section 3.3, and their code), for reproduction.

        Six LoRA experts of rank 4 in two groups, on the feed-forward linears, with delta = beta = 0.1 and one learning
        rate for all parameters. The balance term is that of the authors' code, which their numbers come from: importance is
        summed over a sample's tokens and multiplied by its target, and its dispersion is var(Z) / mean(Z)^2. The paper prints
        var(Z) / mean(Z); pass `balance_formula="variance_to_mean"` for it. Either ends with the *smaller* router weight on the
        matched experts (``docs/balance.md``); to keep what a model knows, use `LoRAMoEConfig.retain`.

        Args:
            overrides: any options of `LoRAMoEConfig`, in place of the preset's.

        Returns:
            The configuration.

        Raises:
            ValueError: an option has a value outside its range.
            TypeError: an option has a value of the wrong type, or there is no such option.

        Example:
            >>> from peft_loramoe import LoRAMoEConfig
            >>> config = LoRAMoEConfig.paper(task_type="CAUSAL_LM")
            >>> config.balance_target, config.balance_importance, config.groups_of().sizes
            ('printed', 'sum', (3, 3))
        """
        preset = {
            "r": 4,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "num_experts": 6,
            "balance_loss_weight": 0.1,
            "balance_delta": 0.1,
            "balance_formula": "cv_squared",
            "balance_target": "printed",
            "balance_importance": "sum",
            "balance_detach": False,
            "router_lr_multiplier": 1.0,
        }
        return cls(**{**preset, **overrides})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse a configuration of MoE-PEFT, which gives its own layout the same `peft_type` (called by PEFT).

        Raises:
            ValueError: the configuration has MoE-PEFT's `routing_strategy`.
        """
        if "routing_strategy" in kwargs:
            raise ValueError(
                f"The configuration was written by MoE-PEFT (it has routing_strategy={kwargs['routing_strategy']!r}), whose "
                "adapters have another layout. Convert the adapter first: "
                "peft_loramoe.interop.convert_checkpoint(SOURCE, OUTPUT)."
            )
        return super().check_kwargs(**kwargs)

    def groups_of(self, layer: str | None = None) -> ExpertGroups:
        """Expert groups of a layer.

        Args:
            layer: name of the layer inside the base model, looked up in `num_experts_pattern`; None for the groups of layers
                that no pattern matches.

        Returns:
            Their sizes sum to the layer's number of experts.

        Example:
            >>> LoRAMoEConfig(num_experts=4, num_experts_pattern={"down_proj": [1, 2]}).groups_of("mlp.down_proj")
            ExpertGroups(sizes=(1, 2), null=())
        """
        key = None if layer is None else get_pattern_key(self.num_experts_pattern, layer)
        return ExpertGroups(self._group_sizes(key if key in self.num_experts_pattern else None), self.null_groups or ())

    @property
    def num_groups(self) -> int:
        """Number of expert groups, which is also the number of task types."""
        return len(self._group_sizes())

    def rank_of(self, layer: str) -> int:
        """Rank of the experts of a layer, from `rank_pattern` or `r`."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, layer), self.r)

    def mixture_options(self, layer: str) -> MixtureOptions:
        """What the forward pass of a layer needs to know."""
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, layer), self.lora_alpha)
        return MixtureOptions(
            experts=self.groups_of(layer).lora_experts,
            scaling=self.scaling(self.rank_of(layer), alpha),
            temperature=self.router_temperature,
            dropout=self.lora_dropout,
            top_k=self.top_k,
            router_dtype=getattr(torch, self.router_dtype),
            balance_detach=self.balance_detach,
        )

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Factor on the experts' sum for a layer of rank `r`."""
        return lora_alpha / r**0.5 if self.use_rslora else lora_alpha / r

    def _group_sizes(self, pattern_key: str | None = None) -> list[int]:
        """Sizes of the expert groups, those of an entry of `num_experts_pattern` if one is named."""
        option, num_experts = "num_experts", self.num_experts
        if pattern_key is not None:
            option, num_experts = f"num_experts_pattern['{pattern_key}']", self.num_experts_pattern[pattern_key]
            if isinstance(num_experts, (list, tuple)):
                return list(num_experts)
        if self.expert_groups is None:
            if num_experts % 2:
                raise ValueError(
                    f"{option}={num_experts} cannot be split into two equal groups; set expert_groups, "
                    f"for example [{num_experts - num_experts // 2}, {num_experts // 2}] or [{num_experts}]."
                )
            return [num_experts // 2] * 2
        if sum(self.expert_groups) != num_experts:
            fix = "set expert_groups to sizes that do" if pattern_key is None else "give the sizes there as a list"
            raise ValueError(
                f"expert_groups={self.expert_groups} sums to {sum(self.expert_groups)}, not to {option}={num_experts}; {fix}."
            )
        return list(self.expert_groups)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and tell the reader of the model card (README.md) how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(os.path.join(save_directory, "README.md"), self)
        logger.info("Saved a LoRAMoE adapter. Load it with:\n%s", loading_snippet(str(save_directory), self))

    def _check_lora_options(self) -> None:
        _check_positive_int("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1).")
        for name, rank in self.rank_pattern.items():
            _check_positive_int(f"rank_pattern['{name}']", rank)
        for name, alpha in self.alpha_pattern.items():
            _check_number(f"alpha_pattern['{name}']", alpha)
        _check_names("modules_to_save", self.modules_to_save)
        _check_choice("bias", self.bias, BIAS)
        _check_choice("init_weights", self.init_weights, INIT_WEIGHTS)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str: {name}={value} would have no effect on "
                        f"target_modules='{self.target_modules}'. Put the layers into the expression or pass a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"When `layers_pattern` is specified, `layers_to_transform` must also be specified: "
                f"layers_pattern={self.layers_pattern!r} names the list that layers_to_transform indexes."
            )

    def _check_expert_options(self) -> None:
        _check_positive_int("num_experts", self.num_experts, minimum=2)
        for name, entry in self.num_experts_pattern.items():
            option = f"num_experts_pattern['{name}']"
            if isinstance(entry, (list, tuple)):
                _check_group_sizes(option, entry)
            else:
                _check_positive_int(option, entry, minimum=2)
        if self.expert_groups is not None:
            _check_group_sizes("expert_groups", self.expert_groups)
            self.expert_groups = list(self.expert_groups)
        num_groups = self.num_groups
        layouts = {"num_experts": self._group_sizes()}
        for name in self.num_experts_pattern:
            layouts[f"num_experts_pattern['{name}']"] = self._group_sizes(name)
        for option, groups in layouts.items():
            if len(groups) != num_groups:
                raise ValueError(f"{option} gives {len(groups)} groups, {groups}, but there are {num_groups}.")
            if self.top_k is not None:
                _check_positive_int("top_k", self.top_k)
                if self.top_k > sum(groups):
                    raise ValueError(f"top_k={self.top_k} is more than the {sum(groups)} experts of {option}.")
        if self.null_groups is not None:
            self.null_groups = self._checked_null_groups(num_groups)
        if self.task_type_names is not None:
            names = self.task_type_names = list(self.task_type_names)
            if len(names) != num_groups or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
                raise ValueError(f"task_type_names={names} must be {num_groups} different names, one for each expert group.")
        _check_number("router_temperature", self.router_temperature)
        if self.router_temperature <= 0:
            raise ValueError(f"router_temperature={self.router_temperature} must be positive.")
        _check_number("router_lr_multiplier", self.router_lr_multiplier)
        if not math.isfinite(self.router_lr_multiplier) or self.router_lr_multiplier <= 0:
            raise ValueError(
                f"router_lr_multiplier={self.router_lr_multiplier} must be positive and finite; with 1, routers learn at the "
                "rate of the experts."
            )
        _check_choice("router_dtype", self.router_dtype, ROUTER_DTYPES)
        _check_choice("router_init", self.router_init, ROUTER_INIT)

    def _checked_null_groups(self, num_groups: int) -> list[int]:
        groups = sorted(set(self.null_groups))
        for group in groups:
            if not isinstance(group, int) or not 0 <= group < num_groups:
                raise ValueError(f"null_groups={self.null_groups} must be indices of the {num_groups} expert groups (0 to "
                                 f"{num_groups - 1}); {group!r} is none.")  # fmt: skip
        if len(groups) == num_groups:
            raise ValueError(f"null_groups={self.null_groups} leaves no group with parameters; leave at least one out.")
        return groups

    def _check_balance_options(self) -> None:
        _check_number("balance_loss_weight", self.balance_loss_weight)
        if self.balance_loss_weight < 0:
            raise ValueError(f"balance_loss_weight={self.balance_loss_weight} must not be negative; 0 turns balancing off.")
        _check_number("balance_delta", self.balance_delta)
        if not 0 <= self.balance_delta < 1:
            raise ValueError(
                f"balance_delta={self.balance_delta} must be in [0, 1): experts of other groups have target 1 - balance_delta."
            )
        _check_choice("balance_formula", self.balance_formula, BALANCE_FORMULAS)
        _check_choice("balance_target", self.balance_target, BALANCE_TARGETS)
        _check_choice("balance_importance", self.balance_importance, BALANCE_IMPORTANCE)


# The help texts are written once, above; the class docstring lists them from there.
LoRAMoEConfig.__doc__ += "".join(
    f"    {f.name}: {f.metadata['help']}\n"
    for f in dataclasses.fields(LoRAMoEConfig)
    if f.name in LoRAMoEConfig.__annotations__
)


def _check_positive_int(option: str, value: Any, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option}={value!r} must be an integer, at least {minimum}.")
    if value < minimum:
        reason = " (with one, the router has no gradient: that is a LoRA)" if minimum == 2 and value == 1 else ""
        raise ValueError(f"{option}={value} must be at least {minimum}{reason}.")


def _check_names(option: str, value: Any) -> None:
    names = [value] if value is None or isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"{option}={value!r} must be a list of module names or a string.")


def _check_number(option: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option}={value!r} must be a number.")


def _check_choice(option: str, value: Any, choices: tuple) -> None:
    if not any(value is choice if isinstance(choice, bool) else value == choice for choice in choices):
        raise ValueError(f"{option}={value!r} is not one of {', '.join(map(repr, choices))}.")


def _check_group_sizes(option: str, sizes: Any) -> None:
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise TypeError(f"{option}={sizes!r} must be a list of group sizes, for example [3, 3].")
    for size in sizes:
        _check_positive_int(f"a size in {option}={list(sizes)}", size)
    if sum(sizes) < 2:
        raise ValueError(f"{option}={list(sizes)} has one expert; the router needs at least 2.")
