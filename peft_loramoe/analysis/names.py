"""Names of linears, task types and expert groups in records, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile


def blocks_and_kinds(layers: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """The block and the kind of each linear.

    Args:
        layers: names of linears, for example "model.layers.3.mlp.up_proj".

    Returns:
        Name -> (block, kind), for example (3, "up_proj"). The block is the first number in the name, or None. The kind
        consists of as many trailing parts of the name as are needed to distinguish the kinds.
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


def by_kind(layers: Iterable[str]) -> dict[str, list[str]]:
    """The linears of each kind.

    Args:
        layers: names of linears.

    Example:
        >>> by_kind(["layers.0.up_proj", "layers.0.down_proj", "layers.1.up_proj"])
        {'up_proj': ['layers.0.up_proj', 'layers.1.up_proj'], 'down_proj': ['layers.0.down_proj']}
    """
    kinds: dict[str, list[str]] = {}
    for layer, (_, kind) in blocks_and_kinds(layers).items():
        kinds.setdefault(kind, []).append(layer)
    return kinds


def without_prefix(layers: Collection[str]) -> tuple[str, dict[str, str]]:
    """What the names of all linears begin with, and what is left of each.

    Args:
        layers: names of linears.

    Returns:
        The common beginning, of whole parts, and name -> the rest of the name.

    Example:
        >>> without_prefix(["model.layers.0.up_proj", "model.layers.1.up_proj"])
        ('model.layers', {'model.layers.0.up_proj': '0.up_proj', 'model.layers.1.up_proj': '1.up_proj'})
    """
    parts = zip(*(layer.split(".")[:-1] for layer in layers))
    common = [same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts)]
    return ".".join(common), {layer: ".".join(layer.split(".")[len(common) :]) for layer in layers}


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, with the numbers in them in numerical order.

    Example:
        >>> sorted(["layers.10.up_proj", "layers.9.up_proj"], key=natural_order)
        ['layers.9.up_proj', 'layers.10.up_proj']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def type_name(task_type: int, names: Sequence[str] | None) -> str:
    """The name of a task type's samples: "facts samples", "type 0 samples" or "samples of unknown type"."""
    if task_type < 0:
        return "samples of unknown type"
    return f"{names[task_type]} samples" if names else f"type {task_type} samples"


def group_name(group: int, names: Sequence[str] | None, null_groups: Collection[int]) -> str:
    """The name of an expert group: "group facts", "group 0" or "group 0 (null)"."""
    return f"group {names[group] if names else group}{' (null)' if group in null_groups else ''}"


def _last_parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])
