"""Upcycle plain LoRA adapters to the experts of a mixture."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..config import LoRAMoEConfig
from ..experts import initialise_router
from ..groups import ExpertGroups
from ..modes import INITS_THAT_KEEP_BASE
from ..peft_api import get_pattern_key
from .files import PREFIX, abbreviate, expert_keys, new_folder, read_adapter, write_adapter


METHODS = ("replicate", "split")
LAYER_OPTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Options that a LoRAMoE has too, with the same meaning.
SHARED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
    *LAYER_OPTIONS,
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
)
# Options of a LoRA that are carried over or do not affect its output; all others must have their default.
UNDERSTOOD = {
    *SHARED,
    "peft_type",
    *(
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "eva_config",
        "init_lora_weights",
        "runtime_config",
    ),
}
DECIDED = (
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "num_experts",
        "num_experts_pattern",
        *LAYER_OPTIONS,
    ),
    *("init_weights", "bias", "modules_to_save", "trainable_token_indices", "inference_mode", "peft_type"),
)


class Lora(NamedTuple):
    """A plain LoRA: its name for messages, its configuration, and A (r, in) and scaled B (out, r) of each linear."""

    name: str
    config: dict[str, Any]
    weights: dict[str, tuple[Tensor, Tensor]]


def upcycle(
    sources: Sequence[str | Path] | str | Path,
    output: str | Path,
    *,
    model: PeftModel | None = None,
    num_experts: int | None = None,
    method: str = "replicate",
    **options: Any,
) -> LoRAMoEConfig:
    """Turn plain LoRA adapters into the experts of a LoRAMoE adapter.

    *Several sources* become one expert each, in order. The routers start at zero (`router_init="zeros"`), so every
    gate is 1/N and the mixture starts as the mean of the LoRAs, not their sum. `router_init="kaiming_uniform"` or
    `"normal"` starts with random gates around 1/N.

    *One source with `num_experts`*: the mixture starts exactly as this LoRA. `method="replicate"` copies it to every
    expert; the routers start at random ("kaiming_uniform"), since identical experts and a zero router would get no
    gradient to diverge. `method="split"` divides its rank channels among the experts and multiplies them by the number
    of experts, to compensate for gates of 1/N; the routers start at zero.

    All experts of a layer have the same rank and scaling. Therefore, the scaling of each LoRA is multiplied into its
    B, `lora_alpha` equals `r`, and lower ranks are padded by zero columns of B and randomly initialized rows of A,
    which do not change the output but can be trained. Tensors are float32.

    Args:
        sources: one or several folders or Hub ids, or, with `model`, names of its adapters.
        output: folder to create.
        model: a model with the adapters loaded.
        num_experts: number of LoRA experts. Required for one source; for several, it must be their number.
        method: how to distribute one source, "replicate" or "split". Several sources are not split.
        **options: other options of LoRAMoEConfig, such as `expert_groups` (default: one group), `null_groups` (whose
            experts are additional), `freeze_experts`, `router_init` and `balance_loss_weight`. By default,
            `lora_dropout`, `task_type` and `base_model_name_or_path` come from the sources, which must agree.

    Returns:
        The configuration of the new adapter.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: a source or a file in it does not exist.
        TypeError: an option is unknown or determined by the sources.
        ValueError: a source is not a plain LoRA or cannot be represented by experts, the sources disagree in target
            modules or options, or the options are inconsistent. Nothing is written in this case.

    Example:
        >>> from peft import get_peft_model
        >>> lora = get_peft_model(tiny_model().unload(), LoraConfig(r=8, target_modules=["up_proj"]))
        >>> lora.save_pretrained("lora")
        >>> config = upcycle("lora", "mixture", num_experts=4, method="split")
        >>> config.num_experts, config.r
        (4, 2)
    """
    names = [sources] if isinstance(sources, (str, Path)) else list(sources)
    _check_options(names, num_experts, method, options)
    with new_folder(output) as folder:
        loras = [
            _lora_of_model(model, str(name)) if model is not None else _lora(str(name), *read_adapter(name))
            for name in names
        ]
        _check_same_modules(loras)
        config = _config(loras, num_experts, method, options)
        groups = config.groups_of()
        total, count = groups.num_experts, len(groups.lora_experts)
        tensors = {}
        for module in loras[0].weights:
            experts = [lora.weights[module] for lora in loras]
            if len(loras) == 1:
                experts = _distribute(module, *experts[0], count, total, method)
            router = torch.empty(total, experts[0][0].shape[1])
            initialise_router(router, config.router_init)
            tensors |= expert_keys(module, *_stack(experts), router)
        _set_ranks(
            config,
            {module: tensors[f"{PREFIX}{module}.loramoe_experts.A"].shape[0] // count for module in loras[0].weights},
        )
        write_adapter(folder, config, tensors)
    return config


def _check_options(names: list[str | Path], num_experts: int | None, method: str, options: Mapping[str, Any]) -> None:
    if not names:
        raise ValueError("sources is empty; pass at least one LoRA adapter.")
    if twice := [name for name, count in Counter(map(str, names)).items() if count > 1]:
        raise ValueError(
            f"'{twice[0]}' is given more than once, and equal experts with equal gates would stay equal. To make "
            "several experts of one LoRA, give it once, with num_experts."
        )
    known = {field.name for field in dataclasses.fields(LoRAMoEConfig)}
    for name in options:
        if name in DECIDED:
            raise TypeError(f"{name} cannot be set; the sources determine it.")
        if name not in known:
            raise TypeError(f"{name} is not an option of LoRAMoEConfig.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if len(names) > 1:
        if num_experts not in (None, len(names)):
            raise ValueError(
                f"num_experts={num_experts}, but there are {len(names)} sources, which become one expert each."
            )
        if method == "split":
            raise ValueError(
                f"method='split' has no effect with {len(names)} sources, which become one expert each: leave it out, "
                "or give one source and num_experts."
            )
        return
    if num_experts is None:
        raise ValueError("One source needs num_experts, the number of experts to replicate or split it into.")
    if not isinstance(num_experts, int) or num_experts < 2:
        raise ValueError(f"num_experts={num_experts!r} must be an integer, at least 2.")
    router = options.get("router_init")
    if method == "split" and (router not in (None, "zeros") or options.get("top_k") is not None):
        raise ValueError(
            "method='split' starts as the LoRA only if all gates are equal: do not set router_init or top_k."
        )
    if method == "replicate" and router == "zeros":
        raise ValueError(
            "method='replicate' with router_init='zeros' gives routers without gradient and experts that stay "
            "identical: choose another router_init, or method='split'."
        )
    if method == "replicate" and options.get("null_groups"):
        raise ValueError(
            "method='replicate' with null_groups does not start as the LoRA, since the null experts take an unknown "
            "share of the gates: use method='split', or do not set null_groups."
        )


def _lora_of_model(model: PeftModel, name: str) -> Lora:
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, not {type(model).__name__}.")
    if name not in model.peft_config:
        raise ValueError(f"The model has no adapter '{name}'; it has {abbreviate(model.peft_config)}.")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return _lora(name, model.peft_config[name].to_dict(), tensors)


def _lora(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Lora:
    """Check that an adapter consists of A and B matrices of linears only, and multiply the scaling into B."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA" or "lora_nums" in config:
        what = "the layout of the LoRAMoE authors" if peft_type == "LORA" else f"peft_type={peft_type!r}"
        raise ValueError(f"'{name}' is not a plain LoRA: it has {what}.")
    _check_understood(name, config)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        if end in ("A.weight", "B.weight") and tensor.dim() == 2 and tensor.numel():
            parts.setdefault(module, {})[end[0]] = tensor.detach().to("cpu", torch.float32)
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"'{name}' has tensors that experts cannot represent: {abbreviate(unknown)}. Experts consist of A and B "
            "matrices of linears."
        )
    if not parts:
        raise ValueError(f"'{name}' has no tensors.")
    weights = {}
    for module, part in parts.items():
        if part.keys() != {"A", "B"} or part["A"].shape[0] != part["B"].shape[1]:
            shapes = {key: tuple(tensor.shape) for key, tensor in part.items()}
            raise ValueError(f"'{name}' needs A and B of the same rank for '{module}', but has {shapes}.")
        weights[module] = part["A"], part["B"] * _scaling(name, config, module, part["A"].shape[0])
    return Lora(name, config, dict(sorted(weights.items())))


def _check_understood(name: str, config: Mapping[str, Any]) -> None:
    try:
        LoRAMoEConfig(**{option: config[option] for option in SHARED if config.get(option) is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration of '{name}' is wrong: {error}") from error
    defaults = LoraConfig().to_dict()
    for option, value in config.items():
        if option not in UNDERSTOOD and value and value != defaults.get(option):
            raise ValueError(f"'{name}' has {option}={value!r}, which experts cannot represent.")
    if (init := config.get("init_lora_weights", True)) not in INITS_THAT_KEEP_BASE:
        raise ValueError(
            f"'{name}' has init_lora_weights={init!r}, with which PEFT changes the weights of the base model. Save it "
            "with path_initial_model_for_weight_conversion first, to get a plain LoRA for the original base model."
        )


def _scaling(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    def option(pattern: str, default: str) -> Any:
        entries = config.get(pattern) or {}
        return entries.get(get_pattern_key(list(entries), module), config.get(default))

    r, alpha = option("rank_pattern", "r"), option("alpha_pattern", "lora_alpha")
    if r != rank or alpha is None:
        raise ValueError(
            f"'{name}' has tensors of rank {rank} for '{module}', but its configuration says r={r}, "
            f"lora_alpha={alpha}."
        )
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _check_same_modules(loras: list[Lora]) -> None:
    first = loras[0]
    for lora in loras[1:]:
        if lora.weights.keys() != first.weights.keys():
            raise ValueError(
                "The LoRAs have different target modules and cannot be experts of the same layers: only "
                f"'{first.name}' has {abbreviate(first.weights.keys() - lora.weights.keys())}; only '{lora.name}' has "
                f"{abbreviate(lora.weights.keys() - first.weights.keys())}."
            )
        for module, (A, B) in lora.weights.items():
            here, there = (
                (A.shape[1], B.shape[0]),
                (first.weights[module][0].shape[1], first.weights[module][1].shape[0]),
            )
            if here != there:
                raise ValueError(
                    f"The LoRAs belong to different base models: '{module}' has the input and output sizes {there} in "
                    f"'{first.name}' and {here} in '{lora.name}'."
                )


def _config(loras: list[Lora], num_experts: int | None, method: str, options: dict[str, Any]) -> LoRAMoEConfig:
    is_single = len(loras) == 1
    experts = num_experts if is_single and num_experts is not None else len(loras)
    groups, null = options.get("expert_groups") or [experts], options.get("null_groups") or []
    if (found := len(ExpertGroups(tuple(groups), tuple(null)).lora_experts)) != experts:
        raise ValueError(f"expert_groups={groups} with null_groups={null} has {found} LoRA experts, not {experts}.")
    common = {}
    for option in ("lora_dropout", "task_type", "base_model_name_or_path", "fan_in_fan_out"):
        values = {lora.name: lora.config.get(option) for lora in loras}
        if option not in options and len(set(values.values())) > 1:
            raise ValueError(f"The LoRAs differ in {option}: {values}. Choose one with {option}=...")
        if (value := next(iter(values.values()))) is not None:
            common[option] = value
    router = "kaiming_uniform" if is_single and method == "replicate" else "zeros"
    decided = {"num_experts": sum(groups), "expert_groups": groups, **_targets(loras)}
    return LoRAMoEConfig(**{"router_init": router, **common, **options, **decided})


def _targets(loras: list[Lora]) -> dict[str, Any]:
    """The sources' target options where they agree, otherwise the list of all modules."""
    options = [
        {
            name: sorted(v) if isinstance(v := lora.config.get(name), (set, list, tuple)) else v
            for name in LAYER_OPTIONS
        }
        for lora in loras
    ]
    first = options[0]
    if all(others == first for others in options) and first["target_modules"] not in (None, "all-linear"):
        return first
    return {"target_modules": list(loras[0].weights)}


def _distribute(module: str, A: Tensor, B: Tensor, count: int, total: int, method: str) -> list[tuple[Tensor, Tensor]]:
    """Distribute a LoRA over `count` experts, so that they sum to it if all `total` gates are equal."""
    if method == "replicate":
        return [(A, B)] * count
    if A.shape[0] < count:
        raise ValueError(f"The LoRA of '{module}' has rank {A.shape[0]} and cannot be split into {count} experts.")
    return [(rows, columns * total) for rows, columns in zip(A.tensor_split(count), B.tensor_split(count, dim=1))]


def _stack(experts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pad experts to the same rank and stack them."""
    r = max(A.shape[0] for A, _ in experts)
    stacked_A = torch.empty(len(experts), r, experts[0][0].shape[1])
    stacked_B = torch.zeros(experts[0][1].shape[0], len(experts), r)
    for i, (A, B) in enumerate(experts):
        nn.init.kaiming_uniform_(stacked_A[i], a=math.sqrt(5))
        stacked_A[i, : A.shape[0]] = A
        stacked_B[:, i, : B.shape[1]] = B
    return stacked_A.flatten(0, 1), stacked_B.flatten(1, 2)


def _set_ranks(config: LoRAMoEConfig, ranks: dict[str, int]) -> None:
    """Set the rank of every module, and lora_alpha such that its scaling is 1."""
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {module: r for module, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
