"""Figures of the router's behaviour."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .statistics import group_weights


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette, which colour-blind readers can tell apart; markers do too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SUFFIXES = (".png", ".svg", ".pdf")


def plot_group_weights(
    records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> Figure:
    """Draw the router weight of each expert group over the depth of the model: task types down, kinds of linear across.

    Dotted lines show the weight of a router that treats all experts alike.

    Args:
        records: what `router_statistics` returned, of one adapter.
        path: file to write; its suffix, .png, .svg or .pdf, gives the format.
        names: names of the task types, which are those of the expert groups too; None for numbers.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no records, records of several adapters, too few names, or another suffix.
        ImportError: matplotlib is not installed.
    """
    records = list(records)
    adapters = sorted({record["adapter"] for record in records})
    if len(adapters) != 1:
        raise ValueError(f"records must be of one adapter, but hold {len(adapters)}: {adapters}; pass those of one of them.")
    if os.path.splitext(path)[1].lower() not in SUFFIXES:
        raise ValueError(f"path '{os.fspath(path)}' must end in {', '.join(SUFFIXES)}.")
    groups = sorted({record["group"] for record in records})
    if names is not None and len(names) <= groups[-1]:
        raise ValueError(f"names={list(names)} must name all {groups[-1] + 1} expert groups.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_group_weights needs matplotlib: pip install matplotlib") from error

    weights = {
        (record["layer"], record["task_type"], record["group"]): record["weight"]
        for record in group_weights(records, per_layer=True)
    }
    task_types = sorted({record["task_type"] for record in records})
    experts: dict[str, list[int]] = {}  # the groups of each layer's experts, once for each task type
    for record in records:
        experts.setdefault(record["layer"], []).append(record["group"])
    kinds: dict[str, list[str]] = {}
    for layer in experts:
        kinds.setdefault(layer.rpartition(".")[2], []).append(layer)

    figure = Figure(figsize=(1.5 + 3 * len(kinds), 1.2 + 2.1 * len(task_types)), layout="constrained")
    axes = figure.subplots(len(task_types), len(kinds), squeeze=False, sharex="col", sharey=True)
    for row, task_type in zip(axes, task_types):
        for panel, (kind, layers) in zip(row, kinds.items()):
            for group in groups:
                curve = [weights.get((layer, task_type, group), float("nan")) for layer in layers]
                even = [experts[layer].count(group) / len(experts[layer]) for layer in layers]
                _draw(panel, _depths(layers), curve, even, group, f"expert group {_name(group, names)}")
            panel.set_ylim(0, 1)
            panel.set_title(f"{_name(task_type, names)} samples, {kind}", fontsize="medium")
        row[0].set_ylabel("router weight")
    for panel in axes[-1]:
        panel.set_xlabel("layer")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(groups), frameon=False)
    figure.savefig(path, dpi=150)
    return figure


def _draw(panel: Axes, depths: list[int], weights: list[float], even: list[float], group: int, label: str) -> None:
    style = {"color": COLOURS[group % len(COLOURS)]}
    panel.plot(depths, weights, marker=MARKERS[group % len(MARKERS)], markersize=4, label=label, **style)
    panel.plot(depths, even, linestyle=":", linewidth=1, **style)
    panel.locator_params(axis="x", integer=True)


def _depths(layers: list[str]) -> list[int]:
    """The block number in each layer's name, or the layer's position where a name has none."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.)", layer) for layer in layers]
    return [int(found[-1]) for found in numbers] if all(numbers) else list(range(len(layers)))


def _name(index: int, names: Sequence[str] | None) -> str:
    if index < 0:
        return "unknown"
    return names[index] if names else str(index)
