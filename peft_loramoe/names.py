"""Adapter names: which of them can be saved, and to which adapter a tensor of a state dict belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from .options import shown


CONTAINER = ".loramoe_experts."
# In a tensor's name the adapter follows one of these.
CONTAINERS = ("loramoe_experts", "modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")


def check_adapter_name(name: Any) -> None:
    """Refuse a name that could not be saved or loaded later: it becomes a folder, and a part of every tensor's name.

    Raises:
        ValueError: the message says what is wrong with the name.
    """
    problem = None
    if not isinstance(name, str) or not name:
        problem = "must be a string that is not empty"
    elif unfit := sorted({c for c in name if c in "./\\\0"}):
        problem = f"contains {', '.join(map(repr, unfit))}, which no folder or tensor name can have"
    elif name == "__base__":
        problem = "stands for the base model in adapter_names"
    elif hasattr(nn.ModuleDict(), name):
        problem = "is an attribute of torch's ModuleDict"
    else:
        try:
            if len(name.encode()) > 255:
                problem = f"has {len(name.encode())} bytes; file systems take 255"
        except UnicodeEncodeError:
            problem = "has a character that no file name can hold"
    if problem:
        raise ValueError(f"adapter_name={shown(name)} {problem}. Take a short name of letters, digits, '-' and '_'.")


def adapter_of(key: str) -> str | None:
    """The adapter that a tensor belongs to, by its name in the model's state dict; None for the base model's."""
    return _container_and_adapter(key)[1]


def is_of_experts(key: str) -> bool:
    """Whether a tensor's name is that of a LoRAMoE layer, in the model's state dict or in an adapter's file."""
    return _container_and_adapter(key)[0] == "loramoe_experts"


def without_adapters(
    state_dict: Mapping[str, Any],
    adapters: list[str],
    other_prefixes: Iterable[str],
    default: Callable[[Mapping[str, Any], list[str]], dict[str, Any]],
) -> dict[str, Any]:
    """The state dict without the tensors of some adapters, told by where a name has the adapter, not by what it
    contains.

    Args:
        state_dict: by the names that the model gives its tensors.
        adapters: those to leave out.
        other_prefixes: with which the names of other methods' containers begin.
        default: PEFT's own selection, for models without LoRAMoE layers and for tensors of other methods.
    """
    if not any(is_of_experts(key) for key in state_dict):
        return default(state_dict, adapters)
    marks = tuple(f".{prefix}" for prefix in other_prefixes if prefix)
    of_others = {k: v for k, v in state_dict.items() if adapter_of(k) is None and any(mark in k for mark in marks)}
    kept = default(of_others, adapters)
    return {
        key: value
        for key, value in state_dict.items()
        if (key in kept if key in of_others else adapter_of(key) not in adapters)
    }


def _container_and_adapter(key: str) -> tuple[str | None, str | None]:
    parts = key.split(".")
    return next(((part, after) for part, after in pairwise(parts) if part in CONTAINERS), (None, None))


def without_adapter_name(key: str, adapter: str) -> str:
    """The name of a tensor in the adapter's file: without the adapter, wherever else that word occurs."""
    return key.replace(f"{CONTAINER}{adapter}.", CONTAINER, 1)
