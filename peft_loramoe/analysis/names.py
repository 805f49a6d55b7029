"""What linears, task types and expert groups are called in records, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence


def blocks_and_kinds(layers: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Where each linear of a model is, and which of its block's linears it is.

    Args:
        layers: names of linears, for example "model.layers.3.mlp.up_proj".

    Returns:
        By name, the block and the kind. The block is the first number in the name, None for a name without. A kind is called by
        the last parts of the name, as many as tell the kinds apart.
    """
    found: dict[str, tuple[int | None, str]] = {}
    for layer in layers:
        number = re.search(r"(?<![^.])\d+(?=\.)", layer)
        pattern = f"{layer[: number.start()]}*{layer[number.end() :]}" if number else layer
        found[layer] = (int(number[0]) if number else None, pattern)
    patterns = {pattern for _, pattern in found.values()}
    parts = 1
    while len({_last_parts(pattern, parts) for pattern in patterns}) < len(patterns):
        parts += 1
    return {layer: (block, _last_parts(pattern, parts)) for layer, (block, pattern) in found.items()}


def type_name(task_type: int, names: Sequence[str] | None) -> str:
    """What the samples of a task type are called: "facts samples", "type 0 samples", "samples of unknown type"."""
    if task_type < 0:
        return "samples of unknown type"
    return f"{names[task_type]} samples" if names else f"type {task_type} samples"


def group_name(group: int, names: Sequence[str] | None, null_groups: Collection[int]) -> str:
    """What an expert group is called, after its task type if that has a name: "group facts", "group 0", "group 0 (null)"."""
    return f"group {names[group] if names else group}{' (null)' if group in null_groups else ''}"


def _last_parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])
