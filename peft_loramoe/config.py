"""`LoRAMoEConfig`: every option of the method, validated when the configuration is made."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from peft.config import PeftConfig
from peft.utils import PeftType

from .card import loading_snippet, write_card
from .fields import MAX_RANK, PRESETS, ConfigFields, group_sizes
from .groups import ExpertGroups
from .ops import MixtureOptions
from .options import boolean, mapping, optional, shown, text
from .peft_api import get_pattern_key
from .version import __version__


logger = logging.getLogger(__name__)

# Values of options that an earlier version wrote, and what they are called now.
RENAMED = {"balance_target": {"printed": "paper"}}

# The options that every configuration of PEFT has; PEFT checks task_type, and peft_type is fixed.
BASE_KINDS = {
    "base_model_name_or_path": optional(
        lambda name, value: text(name, str(value) if isinstance(value, os.PathLike) else value)
    ),
    "revision": optional(text),
    "inference_mode": boolean,
    "peft_version": optional(text),
    "auto_mapping": optional(mapping(text, optional(text), "names of classes")),
}


@dataclass
class LoRAMoEConfig(ConfigFields, PeftConfig):
    """Options of a LoRAMoE adapter. Options that PEFT's LoRA has keep its names and meanings.

    Two are not called as there: `init_weights` is LoRA's `init_lora_weights`, and `bias="loramoe_only"` is its
    "lora_only".

    Raises:
        ValueError: an option has a value outside its range; the message names the option, the value and the fix.
        TypeError: an option has a value of the wrong type.

    Example:
        >>> from peft_loramoe import LoRAMoEConfig
        >>> config = LoRAMoEConfig(r=4, num_experts=8, task_type="CAUSAL_LM")
        >>> config.groups_of().sizes
        (4, 4)

    Options:
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORAMOE")
        if self.router_lr_multiplier is None:
            # Files state their version and every option that it knew; without this one, all parameters had one rate.
            self.router_lr_multiplier = 10.0 if self.peft_loramoe_version is None else 1.0
        if self.peft_loramoe_version is None:
            self.peft_loramoe_version = __version__
        self.modules_to_tie: set[str] | None = None  # filled in by PEFT, as for its LoRA
        for option, values in RENAMED.items():
            if isinstance(value := getattr(self, option), str) and value in values:
                setattr(self, option, values[value])
                warnings.warn(
                    f"{option}={value!r} is called {values[value]!r} now; save the adapter again to have it renamed."
                )
        self.check()
        if Version(self.peft_loramoe_version) > Version(__version__):
            warnings.warn(
                f"The configuration was written by peft_loramoe {self.peft_loramoe_version}, newer than the installed "
                f"{__version__}; options that it does not know are ignored. Upgrade peft_loramoe."
            )

    def check(self) -> None:
        """Check every option by its kind, and then those that depend on each other; called when an adapter is
        attached, too.

        Raises:
            ValueError: an option has a value outside its range; the message names the option, the value and the fix.
            TypeError: an option has a value of the wrong type.
        """
        kinds = {f.name: f.metadata["kind"] for f in dataclasses.fields(self) if "kind" in f.metadata}
        for name, kind in {**BASE_KINDS, **kinds}.items():
            if hasattr(self, name):  # not every version of PEFT has all of its own
                setattr(self, name, kind(name, getattr(self, name)))
        self._check_targets()
        self._check_groups()

    @classmethod
    def retain(cls, **overrides: Any) -> LoRAMoEConfig:
        """Learn new tasks and keep what the model knew: the configuration to start with.

        Group 0 has null experts: samples of task type 0, which stand for what the model knows already, are routed to
        the untouched backbone. Group 1 has the LoRA experts, for samples of type 1. The balance term trains the
        routers only, at ten times the experts' learning rate, without which they hardly learn to tell the types apart.

        An expert starts with a gate of 1 / num_experts (with `top_k`, in the mean over tokens), and null experts add
        nothing: with half of them null, the gates of the others sum to one half. `lora_alpha` makes up for it: unless
        it is given, it is chosen so that gate times scale is 4/3 at the start, whatever `r`, `num_experts` and
        `use_rslora` are; `rank_pattern` and `num_experts_pattern` do not count. With 12 experts that is
        lora_alpha = 16 r.

        Args:
            overrides: any options of `LoRAMoEConfig`, in place of the preset's. Half of `num_experts` are null unless
                `expert_groups` says otherwise.

        Returns:
            The configuration. Without overrides: r=4, lora_alpha=64, num_experts=12, null_groups=[0],
            task_type_names=["knowledge", "tasks"], balance_delta=0.7, balance_loss_weight=0.1, balance_detach=True,
            router_lr_multiplier=10.

        Raises:
            ValueError: an override takes away what the preset is for: no null group for type 0, or no term that sends
                the samples of type 0 there; or an option has a value outside its range.
            TypeError: an option has a value of the wrong type, or there is no such option.

        Example:
            >>> from peft_loramoe import LoRAMoEConfig
            >>> config = LoRAMoEConfig.retain(r=8, task_type="CAUSAL_LM")
            >>> config.lora_alpha, config.groups_of()
            (128, ExpertGroups(sizes=(6, 6), null=(0,), names=('knowledge', 'tasks')))
        """
        groups = overrides.get("expert_groups")
        preset = dict(PRESETS["retain"])
        if groups is not None:
            group_sizes("expert_groups", groups)
            if len(groups) == 1:
                raise ValueError(
                    f"LoRAMoEConfig.retain(expert_groups={groups!r}): there must be a null group for type 0 and at "
                    "least one group of LoRA experts, for example [6, 6]. Use LoRAMoEConfig(...) for a mixture "
                    "without a null group."
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
            (
                "balance_loss_weight",
                config.balance_loss_weight == 0,
                "without the term the router does not learn the types",
            ),
            ("balance_delta", config.balance_delta == 0, "the term then asks for the same routing of all types"),
            (
                "balance_target",
                config.balance_target == "paper",
                "it gives type 0 the smaller weight on its own group",
            ),
        ):
            if lost:
                raise ValueError(
                    f"LoRAMoEConfig.retain({option}={getattr(config, option)!r}): {promise}. Leave {option} out, or "
                    "use LoRAMoEConfig(...), which promises nothing."
                )
        if "lora_alpha" not in overrides:
            alpha = 4 * config.num_experts * (config.r**0.5 if config.use_rslora else config.r) / 3
            config.lora_alpha = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        return config

    @classmethod
    def paper(cls, **overrides: Any) -> LoRAMoEConfig:
        """LoRAMoE as its authors trained it (Dou et al., ACL 2024, section 3.3, and their code), for reproduction.

        Six LoRA experts of rank 4 in two groups, on the feed-forward linears, with delta = beta = 0.1 and one learning
        rate for all parameters. The balance term is that of the authors' code, which their numbers come from:
        importance is summed over a sample's tokens and multiplied by its target, and its dispersion is var(Z) /
        mean(Z)^2. The paper prints var(Z) / mean(Z); pass `balance_formula="variance_to_mean"` for it. Either ends
        with the *smaller* router weight on the matched experts (``docs/balance.md``); to keep what a model knows, use
        `LoRAMoEConfig.retain`.

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
            ('paper', 'sum', (3, 3))
        """
        return cls(**{**PRESETS["paper"], **overrides})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse a configuration of MoE-PEFT, which gives its own layout the same `peft_type` (called by PEFT).

        Raises:
            ValueError: the configuration has MoE-PEFT's `routing_strategy`.
        """
        if "routing_strategy" in kwargs:
            raise ValueError(
                f"The configuration was written by MoE-PEFT (it has routing_strategy={kwargs['routing_strategy']!r}), "
                "whose adapters have another layout. Convert the adapter first: "
                "peft_loramoe.interop.convert_checkpoint(SOURCE, OUTPUT)."
            )
        return super().check_kwargs(**kwargs)

    def groups_of(self, layer: str | None = None) -> ExpertGroups:
        """Expert groups of a layer.

        Args:
            layer: name of the layer inside the base model, looked up in `num_experts_pattern`; None for the groups of
                layers that no pattern matches.

        Returns:
            Their sizes sum to the layer's number of experts.

        Example:
            >>> LoRAMoEConfig(num_experts=4, num_experts_pattern={"down_proj": [1, 2]}).groups_of("mlp.down_proj")
            ExpertGroups(sizes=(1, 2), null=(), names=None)
        """
        key = None if layer is None else get_pattern_key(list(self.num_experts_pattern), layer)
        sizes = self._group_sizes(key if key in self.num_experts_pattern else None)
        names = None if self.task_type_names is None else tuple(self.task_type_names)
        return ExpertGroups(tuple(sizes), tuple(self.null_groups or ()), names)

    @property
    def num_groups(self) -> int:
        """Number of expert groups, which is also the number of task types."""
        return len(self._group_sizes())

    def rank_of(self, layer: str) -> int:
        """Rank of the experts of a layer, from `rank_pattern` or `r`.

        Raises:
            ValueError: together, the layer's experts have a rank that no layer can have.
        """
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)
        _check_rank("rank ", rank, len(self.groups_of(layer).lora_experts), f"layer '{layer}'")
        return rank

    def mixture_options(self, layer: str) -> MixtureOptions:
        """What the forward pass of a layer needs to know."""
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.lora_alpha)
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
            option, num_experts = f"num_experts_pattern[{shown(pattern_key)}]", self.num_experts_pattern[pattern_key]
            if isinstance(num_experts, (list, tuple)):
                return list(num_experts)
        if self.expert_groups is None:
            if num_experts % 2:
                raise ValueError(
                    f"{option}={num_experts} cannot be split into two equal groups; set expert_groups, for example "
                    f"[{num_experts - num_experts // 2}, {num_experts // 2}] or [{num_experts}]."
                )
            return [num_experts // 2] * 2
        if sum(self.expert_groups) != num_experts:
            fix = "set expert_groups to sizes that do" if pattern_key is None else "give the sizes there as a list"
            raise ValueError(
                f"expert_groups={self.expert_groups} sums to {sum(self.expert_groups)}, not to "
                f"{option}={num_experts}; {fix}."
            )
        return list(self.expert_groups)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and tell the reader of the model card (README.md) how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(os.path.join(save_directory, "README.md"), self.to_dict())
        logger.info("Saved a LoRAMoE adapter. Load it with:\n%s", loading_snippet(str(save_directory), self.to_dict()))

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str: {name}={shown(value)} would have no "
                        f"effect on target_modules={shown(self.target_modules)}. Put the layers into the expression "
                        "or pass a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified: "
                f"layers_pattern={shown(self.layers_pattern)} names the list that layers_to_transform indexes."
            )

    def _check_groups(self) -> None:
        num_groups = self.num_groups
        layouts = {"num_experts": self._group_sizes()}
        for name in self.num_experts_pattern:
            layouts[f"num_experts_pattern[{shown(name)}]"] = self._group_sizes(name)
        for option, groups in layouts.items():
            if len(groups) != num_groups:
                raise ValueError(f"{option} gives {len(groups)} groups, {groups}, but there are {num_groups}.")
            if self.top_k is not None and self.top_k > sum(groups):
                raise ValueError(f"top_k={self.top_k} is more than the {sum(groups)} experts of {option}.")
        if self.null_groups is not None:
            self.null_groups = self._checked_null_groups(self.null_groups, num_groups)
        if not (self.rank_pattern and self.num_experts_pattern):  # with both, it is the layer that tells which meet
            ranks = {"r": self.r, **{f"rank_pattern[{shown(k)}]": r for k, r in self.rank_pattern.items()}}
            for (rank_option, rank), (option, groups) in itertools.product(ranks.items(), layouts.items()):
                experts = sum(size for group, size in enumerate(groups) if group not in (self.null_groups or ()))
                _check_rank(f"{rank_option}=", rank, experts, option)
        names = self.task_type_names
        if names is not None and (len(names) != num_groups or len(set(names)) != len(names)):
            raise ValueError(
                f"task_type_names={shown(names)} must be {num_groups} different names, one for each expert group."
            )

    def _checked_null_groups(self, null_groups: list[int], num_groups: int) -> list[int]:
        groups = sorted(set(null_groups))
        for group in groups:
            if group >= num_groups:
                raise ValueError(
                    f"null_groups={shown(self.null_groups)} must be indices of the {num_groups} expert groups (0 to "
                    f"{num_groups - 1}); {group} is none."
                )
        if len(groups) == num_groups:
            raise ValueError(
                f"null_groups={shown(self.null_groups)} leaves no group with parameters; leave at least one out."
            )
        return groups


def _check_rank(option: str, rank: int, experts: int, where: str) -> None:
    if rank * experts > MAX_RANK:
        raise ValueError(
            f"{option}{rank} times the {experts} LoRA experts of {where} is a rank of {rank * experts}; at most "
            f"{MAX_RANK} is possible: no linear layer has more inputs or outputs. Take fewer experts or a smaller "
            "rank."
        )


# The help texts are written once, in `fields`; the class docstring lists them from there.
LoRAMoEConfig.__doc__ = (LoRAMoEConfig.__doc__ or "") + "".join(
    f"    {f.name}: {f.metadata['help']}\n" for f in dataclasses.fields(ConfigFields)
)
