"""The options of `LoRAMoEConfig` and its presets: defaults, kinds of values and help.

Nothing here imports torch or PEFT, so that the command line's help comes at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .options import (
    AT_THE_END,
    MODULE_TO_SAVE,
    Kind,
    boolean,
    by_type,
    choice,
    expression,
    integer,
    list_of,
    mapping,
    number,
    optional,
    shown,
    text,
    version,
)


BIAS = ("none", "all", "loramoe_only")
# More than any linear layer has inputs or outputs. Beyond it, a configuration only takes memory until something fails.
MAX_RANK = 2**16
MAX_EXPERTS = 2**12
INIT_WEIGHTS = (True, False, "gaussian")
ROUTER_INIT = ("kaiming_uniform", "normal", "zeros")
ROUTER_DTYPES = ("float32", "float64", "bfloat16")
BALANCE_FORMULAS = ("cv_squared", "variance_to_mean")
BALANCE_TARGETS = ("corrected", "paper")
BALANCE_IMPORTANCE = ("mean", "sum")


RANK = integer(1, MAX_RANK, ": no linear layer has more inputs or outputs")
EXPERTS = integer(2, MAX_EXPERTS, ": each expert is a row of every layer's router")
GROUP_SIZE = integer(1, MAX_EXPERTS, ": each expert is a row of every layer's router")
INDEX = integer(0, 2**31 - 1)
ALPHA = number(-1e9, 1e9)
MODULES = by_type(
    "a list of module names or a string", string=expression(), list=list_of(text, "module names", container=set)
)
PATTERN = expression(AT_THE_END)


def group_sizes(name: str, value: Any) -> list[int]:
    """The kind of a list of group sizes."""
    sizes = list_of(GROUP_SIZE, "group sizes, for example [3, 3]", empty=False)(name, value)
    if sum(sizes) < 2:
        raise ValueError(
            f"{name}={sizes} has one expert; the router needs at least 2 (with one it has no gradient: a LoRA)."
        )
    if sum(sizes) > MAX_EXPERTS:
        raise ValueError(f"{name}={shown(sizes)} has {sum(sizes)} experts; at most {MAX_EXPERTS} are possible.")
    return sizes


def _num_experts(name: str, value: Any) -> int:
    if isinstance(value, int) and value == 1:
        raise ValueError(f"{name}=1 must be at least 2 (with one, the router has no gradient: that is a LoRA).")
    return EXPERTS(name, value)


def _router_dtype(name: str, value: Any) -> str:
    kind = type(value)
    if (kind.__module__, kind.__name__) == ("torch", "dtype"):
        value = str(value).removeprefix("torch.")
    return choice(*ROUTER_DTYPES)(name, value)


def _option(kind: Kind, help: str, default: Any = None, factory: Any = None) -> Any:
    source = {"default_factory": factory} if factory else {"default": default}
    return field(**source, metadata={"help": help, "kind": kind})


@dataclass
class ConfigFields:
    """The options that `LoRAMoEConfig` adds to those of every PEFT configuration."""

    r: int = _option(RANK, "Rank of each expert.", 8)
    lora_alpha: float = _option(
        ALPHA,
        "The mixture is scaled by lora_alpha / r. Null experts take router weight without adding anything, so with "
        "them the LoRA experts start with a smaller sum of gates; LoRAMoEConfig.retain makes up for it.",
        8,
    )
    lora_dropout: float = _option(
        number(0, 1, open_maximum=True),
        "Probability of dropping an entry of the experts' input; all experts share a mask.",
        0.0,
    )
    use_rslora: bool = _option(boolean, "Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA).", False)
    target_modules: list[str] | str | None = _option(
        optional(MODULES),
        "Linear layers or whole blocks to adapt: names (matched at the end of the module's name), a regular "
        "expression for the whole name, or 'all-linear'. None: the feed-forward linears of known architectures, as in "
        "the paper, and the sparse blocks of mixture-of-experts models.",
    )
    exclude_modules: list[str] | str | None = _option(
        optional(MODULES), "Names or regular expression of modules not to adapt."
    )
    layers_to_transform: list[int] | int | None = _option(
        optional(by_type("an index of a layer or a list of indices", integer=INDEX, list=list_of(INDEX, "indices"))),
        "Indices of the transformer layers to adapt; None for all.",
    )
    layers_pattern: list[str] | str | None = _option(
        optional(by_type("a name or a list of names", string=expression(), list=list_of(expression(), "names"))),
        "Name of the module list that layers_to_transform indexes.",
    )
    rank_pattern: dict[str, int] = _option(
        mapping(PATTERN, RANK, "names or expressions to ranks"),
        "Module name or regular expression -> r, where it differs.",
        factory=dict,
    )
    alpha_pattern: dict[str, float] = _option(
        mapping(PATTERN, ALPHA, "names or expressions to numbers"), "The same for lora_alpha.", factory=dict
    )
    bias: str = _option(choice(*BIAS), f"Biases of the base model to train, one of {', '.join(BIAS)}.", "none")
    modules_to_save: list[str] | None = _option(
        optional(list_of(expression(MODULE_TO_SAVE), "module names")),
        "Further modules to train fully and save with the adapter.",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        optional(
            by_type(
                "a list of token ids or a dictionary of such lists",
                list=list_of(INDEX, "token ids"),
                mapping=mapping(text, list_of(INDEX, "token ids"), "names of embeddings to lists of token ids"),
            )
        ),
        "Token ids whose embeddings to train too (or embedding name -> ids).",
    )
    ensure_weight_tying: bool = _option(
        boolean,
        "Keep what modules_to_save or trainable_token_indices train of tied embeddings tied.",
        False,
    )
    fan_in_fan_out: bool = _option(
        boolean, "The base weight is stored (in, out), as in GPT-2's Conv1D; set automatically.", False
    )
    init_weights: bool | str = _option(
        choice(*INIT_WEIGHTS),
        "True: the adapter starts as the identity (B zero); 'gaussian': the same with a normal A; False: random B "
        "too.",
        True,
    )

    num_experts: int = _option(
        _num_experts, "Number of experts (router outputs) of each adapted linear, at least 2.", 6
    )
    num_experts_pattern: dict[str, int | list[int]] = _option(
        mapping(
            PATTERN,
            by_type("a number of experts or a list of group sizes", integer=_num_experts, list=group_sizes),
            "names or expressions to numbers of experts or lists of group sizes",
        ),
        "Module name or regular expression -> num_experts, or a list of group sizes, where it differs.",
        factory=dict,
    )
    expert_groups: list[int] | None = _option(
        optional(group_sizes),
        "Sizes of the expert groups; group g is meant for samples of task type g. None: two equal groups.",
    )
    null_groups: list[int] | None = _option(
        optional(list_of(INDEX, "indices of expert groups")),
        "Groups whose experts are null: a router output without parameters or contribution. Their samples are routed "
        "to the untouched backbone.",
    )
    task_type_names: list[str] | None = _option(
        optional(list_of(text, "names")), "Names of the groups' task types, accepted in task_types."
    )
    router_temperature: float = _option(number(1e-6, 1e6), "The router's logits are divided by it.", 1.0)
    router_dtype: str = _option(
        _router_dtype, f"dtype of the router's logits, one of {', '.join(ROUTER_DTYPES)}.", "float32"
    )
    router_init: str = _option(
        choice(*ROUTER_INIT), f"Initialisation of the router, one of {', '.join(ROUTER_INIT)}.", "kaiming_uniform"
    )
    top_k: int | None = _option(
        optional(integer(1, MAX_EXPERTS)),
        "Experts that each token uses, their gates renormalised to one; None: all (dense).",
    )
    router_lr_multiplier: float | None = _option(
        number(0, 1e6, open_minimum=True, why="; with 1, routers learn at the rate of the experts"),
        "The router's learning rate is this many times that of the experts; LoRAMoETrainerMixin and optimizer_groups "
        "apply it. None: 10, or 1 for a file written before the option existed.",
    )
    freeze_experts: bool = _option(
        boolean,
        "Train the routers only; A and B stay as they are, through switching, saving and loading. For experts that "
        "were trained before, for example by upcycling. FSDP1 needs use_orig_params=True for it.",
        False,
    )

    balance_loss_weight: float = _option(
        number(0, 1e6, why="; 0 turns balancing off"),
        "Weight (beta) of the balance term in the training loss; 0 turns it off.",
        0.1,
    )
    balance_delta: float = _option(
        number(0, 1, open_maximum=True, why=": experts of other groups have target 1 - balance_delta"),
        "How far matched and other experts' target importance differ, in [0, 1).",
        0.1,
    )
    balance_formula: str = _option(
        choice(*BALANCE_FORMULAS),
        "'cv_squared': var(Z) / mean(Z)^2, as in the authors' code; 'variance_to_mean': var(Z) / mean(Z), as in the "
        "paper.",
        "cv_squared",
    )
    balance_target: str = _option(
        choice(*BALANCE_TARGETS),
        "'corrected': importance is divided by its target, so the matched group gets the larger weight; 'paper': it "
        "is multiplied by it, as printed there, which gives the matched group the smaller one.",
        "corrected",
    )
    balance_importance: str = _option(
        choice(*BALANCE_IMPORTANCE),
        "Importance of an expert for a sample: 'mean' of the router probabilities over its tokens, or their 'sum' as "
        "in the paper, with which long samples outweigh short ones.",
        "mean",
    )
    balance_detach: bool = _option(
        boolean,
        "The balance term trains the router only, not the layers below it. Without it the terms of all adapted "
        "linears push on the hidden states, which makes a language model forget.",
        True,
    )
    balance_across_processes: bool = _option(
        boolean,
        "In training with several processes, compute the balance term over the samples of all of them instead of each "
        "process's own, so that it does not depend on how the batch is split. One all-gather a forward pass.",
        False,
    )
    peft_loramoe_version: str | None = _option(version, "Version that wrote the config; filled in automatically.")


# What each preset changes of the defaults. `LoRAMoEConfig.retain` adapts lora_alpha and the number of experts to the
# other options.
PRESETS = {
    "retain": {
        "r": 4,
        "lora_alpha": 64,
        "num_experts": 12,
        "null_groups": [0],
        "task_type_names": ["knowledge", "tasks"],
        "balance_delta": 0.7,
        "balance_loss_weight": 0.1,
        "balance_detach": True,
        "router_lr_multiplier": 10.0,
    },
    "paper": {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 6,
        "balance_loss_weight": 0.1,
        "balance_delta": 0.1,
        "balance_formula": "cv_squared",
        "balance_target": "paper",
        "balance_importance": "sum",
        "balance_detach": False,
        "router_lr_multiplier": 1.0,
    },
}
