"""Figures of router statistics by depth, with a panel for each task type and kind of linear."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..names import group_name, type_name
from ..statistics import RouterStatistics, expert_usage, group_weights
from .figure import COLOUR_MAP, GREY, add_colour_bar, add_legend, figure_file, linears_by_kind, style


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


EVEN = {"color": GREY, "linestyle": ":", "linewidth": 1}
OF_MEAN = {"color": GREY, "linestyle": "--", "linewidth": 1}
MARKS = {
    "dead": {"marker": "x", "color": "white"},  # on dark cells
    "dominating": {"marker": "o", "color": "black"},  # on bright ones
}


@dataclass(frozen=True)
class _Adapter:
    """The statistics of one adapter, arranged for drawing."""

    statistics: RouterStatistics
    names: list[str] | None
    task_types: list[int]
    kinds: dict[str, dict[int, str]]  # kind of linear -> block -> layer
    group_sizes: dict[str, list[int]]  # by layer
    null_groups: set[int]


def plot_group_weights(
    statistics: RouterStatistics, path: str | os.PathLike[str], adapter_name: str | None = None
) -> Figure:
    """Plot the mean router weight of each expert group by depth, as in the LoRAMoE paper.

    Dotted lines show the weights of a uniform router.

    Args:
        statistics: result of `router_statistics`.
        path: file to write, .png, .svg or .pdf.
        adapter_name: name of the adapter; None for the only one.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the adapter is unknown or ambiguous, or the suffix is unsupported.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from peft_loramoe.analysis import router_statistics
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> figure = plot_group_weights(statistics, "groups.png")
    """
    chosen = _choose(statistics, adapter_name)
    records = group_weights(chosen.statistics.experts, per_layer=True)
    weights = {(record["layer"], record["task_type"], record["group"]): record["weight"] for record in records}
    with _panels(path, chosen, len(chosen.task_types), row_height=1.9) as (figure, axes):
        for row, task_type in zip(axes, chosen.task_types):
            for panel, blocks in zip(row, chosen.kinds.values()):
                for group in range(len(chosen.group_sizes[blocks[min(blocks)]])):
                    curve = [weights.get((layer, task_type, group), math.nan) for layer in blocks.values()]
                    label = f"expert {group_name(group, chosen.names, chosen.null_groups)}"
                    panel.plot([*blocks], curve, markersize=4, label=label, **style(group))
                _draw_even_weights(panel, blocks, chosen)
            row[0].set_ylabel(f"{type_name(task_type, chosen.names)}\nrouter weight")
        axes[0][0].set_ylim(0, 1)
        _add_legend(figure, axes, {"uniform router": EVEN})
    return figure


def plot_load(statistics: RouterStatistics, path: str | os.PathLike[str], adapter_name: str | None = None) -> Figure:
    """Plot the mean router weight of every expert as a heat map by depth.

    White lines separate the expert groups, which are labeled at their first expert. Dead and dominating experts (see
    `expert_usage`) are marked. If the linears differ in their groups, experts are numbered within their group, and
    missing ones are grey.

    Args:
        statistics: result of `router_statistics`.
        path: file to write, .png, .svg or .pdf.
        adapter_name: name of the adapter; None for the only one.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the adapter is unknown or ambiguous, or the suffix is unsupported.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from peft_loramoe.analysis import router_statistics
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> figure = plot_load(statistics, "load.png")
    """
    chosen = _choose(statistics, adapter_name)
    slots = {layer: _slots(sizes) for layer, sizes in chosen.group_sizes.items()}
    weights, marks = {}, {}
    for record in chosen.statistics.experts:
        weights[record["task_type"], record["layer"], slots[record["layer"]][record["expert"]]] = record["weight"]
    for record in expert_usage(chosen.statistics):
        if record["status"] in MARKS:
            marks[record["layer"], slots[record["layer"]][record["expert"]]] = record["status"]
    rows = sorted({slot for of_layer in slots.values() for slot in of_layer})
    height = min(max(0.25 * len(rows), 1.5), 4)
    with _panels(path, chosen, len(chosen.task_types), height + 0.15) as (figure, axes):
        for row, task_type in zip(axes, chosen.task_types):
            for panel, blocks in zip(row, chosen.kinds.values()):
                depths = range(min(blocks), max(blocks) + 1)
                cells = [
                    [weights.get((task_type, blocks.get(depth), slot), math.nan) for depth in depths] for slot in rows
                ]
                edges = (depths[0] - 0.5, depths[-1] + 0.5, len(rows) - 0.5, -0.5)
                panel.imshow(cells, cmap=COLOUR_MAP, vmin=0, vmax=max(weights.values()), aspect="auto", extent=edges)
                panel.set_facecolor("lightgrey")
                panel.tick_params(axis="y", length=0)
                for first in range(1, len(rows)):
                    if rows[first][1] == 0:
                        panel.axhline(first - 0.5, color="white", linewidth=2)
                for depth, layer in blocks.items():
                    for y, slot in enumerate(rows):
                        if status := marks.get((layer, slot)):
                            panel.plot(depth, y, markersize=4, **MARKS[status])
            row[0].set_yticks(range(len(rows)), _slot_labels(rows, chosen, room=int(height / 0.13)))
            row[0].set_ylabel(type_name(task_type, chosen.names))
        add_colour_bar(figure, axes[0][0].images[0], axes, "mean router weight")
        found = {status: MARKS[status] for status in MARKS if status in marks.values()}
        if found:
            looks = {f"{status} expert": {**mark, "color": "black", "linestyle": ""} for status, mark in found.items()}
            _add_legend(figure, axes, looks)
    return figure


def plot_entropy(
    statistics: RouterStatistics, path: str | os.PathLike[str], adapter_name: str | None = None
) -> Figure:
    """Plot the entropy of the routers by depth, with a curve for each task type and a panel for each kind of linear.

    Solid lines show the mean entropy of a token's router probabilities, dashed lines the entropy of the mean
    probabilities. Their difference is the mutual information of token and expert. Dotted lines show ln N, the entropy
    of a uniform router.

    Args:
        statistics: result of `router_statistics`.
        path: file to write, .png, .svg or .pdf.
        adapter_name: name of the adapter; None for the only one.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the adapter is unknown or ambiguous, or the suffix is unsupported.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from peft_loramoe.analysis import router_statistics
        >>> statistics = router_statistics(tiny_model(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
        >>> figure = plot_entropy(statistics, "entropy.png")
    """
    chosen = _choose(statistics, adapter_name)
    records = {(record["layer"], record["task_type"]): record for record in chosen.statistics.layers}
    with _panels(path, chosen, 1, row_height=2.4) as (figure, axes):
        for panel, blocks in zip(axes[0], chosen.kinds.values()):
            for task_type in chosen.task_types:
                look = style(task_type) if task_type >= 0 else {"color": GREY, "marker": "x"}
                of_type = [records.get((layer, task_type), {}) for layer in blocks.values()]
                entropy, of_mean = ([r.get(name, math.nan) for r in of_type] for name in ("entropy", "load_entropy"))
                panel.plot([*blocks], entropy, markersize=4, label=type_name(task_type, chosen.names), **look)
                _draw_line(panel, blocks, of_mean, {**OF_MEAN, "color": look["color"]})
            even = [math.log(sum(chosen.group_sizes[layer])) for layer in blocks.values()]
            _draw_line(panel, blocks, even, EVEN)
        axes[0][0].set_ylabel("router entropy (nats)")
        most = math.log(max(sum(sizes) for sizes in chosen.group_sizes.values()))
        axes[0][0].set_ylim(max(0, min(axes[0][0].get_ylim()[0], 0.75 * most)), 1.02 * most or 1)
        _add_legend(figure, axes, {"of the mean weights": OF_MEAN, "uniform router": EVEN})
    return figure


def _choose(statistics: RouterStatistics, adapter_name: str | None) -> _Adapter:
    adapters = list(dict.fromkeys(record["adapter"] for record in statistics.experts))
    if not adapters:
        raise ValueError("The statistics have no records; there is nothing to plot.")
    if adapter_name is None and len(adapters) > 1:
        raise ValueError(
            f"The statistics contain the adapters {', '.join(adapters)}; choose one with adapter_name=..."
        )
    if adapter_name is not None and adapter_name not in adapters:
        raise ValueError(f"adapter_name='{adapter_name}' is unknown; the statistics contain {', '.join(adapters)}.")
    adapter = str(adapters[0]) if adapter_name is None else adapter_name
    experts = [record for record in statistics.experts if record["adapter"] == adapter]
    layers = [record for record in statistics.layers if record["adapter"] == adapter]
    groups = {(record["layer"], record["expert"]): record["group"] for record in experts}
    group_sizes: dict[str, list[int]] = {}
    for (layer, _), group in groups.items():
        sizes = group_sizes.setdefault(layer, [])
        sizes += [0] * (group + 1 - len(sizes))
        sizes[group] += 1
    return _Adapter(
        RouterStatistics(experts, layers, statistics.task_type_names),
        statistics.task_type_names[adapter],
        sorted({record["task_type"] for record in experts}),
        linears_by_kind(group_sizes),
        group_sizes,
        {record["group"] for record in experts if record["null"]},
    )


@contextmanager
def _panels(
    path: str | os.PathLike[str], chosen: _Adapter, rows: int, row_height: float
) -> Generator[tuple[Figure, Any]]:
    """A figure that is saved at the end, and its array of axes (rows, kinds of linear)."""
    with figure_file(path, max(5, 1.3 + 2.6 * len(chosen.kinds)), 0.9 + row_height * rows) as figure:
        axes = figure.subplots(rows, len(chosen.kinds), squeeze=False, sharex="col", sharey=True)
        for title, bottom, (kind, blocks) in zip(axes[0], axes[-1], chosen.kinds.items()):
            title.set_title(kind, fontsize="medium")
            bottom.set_xlabel("layer")
            bottom.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
            bottom.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        yield figure, axes


def _add_legend(figure: Figure, axes: Any, more: dict[str, dict[str, Any]]) -> None:
    """Add a legend of all labeled curves in the panels and of additional lines."""
    from matplotlib.lines import Line2D

    entries = {}
    for panel in axes.flat:
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels())}
    entries |= {label: Line2D([], [], **look) for label, look in more.items()}
    add_legend(figure, list(entries.values()), list(entries))


def _draw_line(panel: Axes, blocks: dict[int, str], values: Sequence[float], look: dict[str, Any]) -> None:
    """Draw a line without markers; for a single block, a short horizontal one."""
    depths = [*blocks] if len(blocks) > 1 else [min(blocks) - 0.3, min(blocks) + 0.3]
    panel.plot(depths, [*values] if len(blocks) > 1 else [values[0]] * 2, **look)


def _draw_even_weights(panel: Axes, blocks: dict[int, str], chosen: _Adapter) -> None:
    shares = [
        [size / sum(sizes) for size in sizes] for sizes in (chosen.group_sizes[layer] for layer in blocks.values())
    ]
    curves = list(zip(*shares))
    equal = len(set(curves)) == 1
    for group, curve in enumerate(curves[:1] if equal else curves):
        colour = GREY if equal else style(group)["color"]
        _draw_line(panel, blocks, curve, {**EVEN, "color": colour})


def _slots(sizes: list[int]) -> list[tuple[int, int]]:
    """Group and number within the group of each expert."""
    return [(group, i) for group, size in enumerate(sizes) for i in range(size)]


def _slot_labels(rows: list[tuple[int, int]], chosen: _Adapter, room: int) -> list[str]:
    """The numbers of as many experts as fit; the first in each group also names the group."""
    same_groups = len({tuple(sizes) for sizes in chosen.group_sizes.values()}) == 1
    step = -(-len(rows) // room)
    last_of_group, named, free = dict(rows), set(), 0
    labels = []
    for y, (group, i) in enumerate(rows):
        label = ""
        if y >= free and (
            group not in named or last_of_group[group] - i >= step - 1
        ):  # not too close to the next group
            name = "" if group in named else f"{group_name(group, chosen.names, chosen.null_groups)}   "
            label, free = f"{name}{y if same_groups else i}", y + step
            named.add(group)
        labels.append(label)
    return labels
