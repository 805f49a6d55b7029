"""Figure of the router weights for each token of a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..names import group_name
from ..trace import RouterTrace
from .figure import COLOUR_MAP, add_colour_bar, figure_file, linears_by_kind


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


LETTER = 0.09  # inches
SPACES = {"\n": "↵", "\t": "⇥", " ": "␣"}


def plot_trace(trace: RouterTrace, path: str | os.PathLike[str], group: int | str = 0) -> Figure:
    """Plot the weight of an expert group for each token, as the mean over all linears and for every linear.

    Tokens run from left to right. Each kind of linear has a panel with the first layer on top.

    Args:
        trace: result of `router_trace`.
        path: file to write, .png, .svg or .pdf.
        group: index or name of the group.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the group is unknown, or the suffix is unsupported.
        ImportError: matplotlib is not installed.

    Example:
        >>> from peft_loramoe.analysis import router_trace
        >>> trace = router_trace(tiny_model(), tiny_tokenizer(), "w3 w4 w5")
        >>> figure = plot_trace(trace, "trace.png", group=1)
    """
    group = _group_index(trace, group)
    weights = {layer: _group_weights(trace, layer, group) for layer in trace.layers}
    mean = [sum(of_token) / len(weights) for of_token in zip(*weights.values())]
    kinds = linears_by_kind(trace.layers)
    labels = [_visible(token) for token in trace.tokens]
    # Inches:
    longest = max(LETTER * len(label) for label in labels)
    column = min(max(7 / len(labels), 0.18), max(longest + 0.05, 0.18))
    upright = longest > column
    row = min(0.16, 8 / len(weights))
    heights = [0.3, *(max(row * len(blocks), 0.6) for blocks in kinds.values())]
    below = (longest if upright else 0.2) + 0.5
    with figure_file(path, 2.6 + column * len(labels), sum(heights) + 0.15 * len(heights) + below) as figure:
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        image = _draw_strip(axes[0], "all linears", [mean], heights[0])
        for panel, height, (kind, blocks) in zip(axes[1:], heights[1:], kinds.items()):
            image = _draw_strip(panel, kind, [weights[layer] for layer in blocks.values()], height, [*blocks])
        axes[-1].set_xticks(range(len(labels)), labels, rotation=90 if upright else 0, fontsize="small")
        add_colour_bar(
            figure, image, axes, f"router weight of\n{group_name(group, trace.task_type_names, trace.null_groups)}"
        )
    return figure


def _draw_strip(
    panel: Axes, title: str, rows: list[list[float]], height: float, numbers: Sequence[int] = ()
) -> AxesImage:
    """Draw rows of cells, and the numbers of as many rows as fit into `height` inches."""
    step = -(-len(rows) // int(height / 0.14))
    panel.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]], fontsize="x-small")
    panel.set_ylabel(title, rotation=0, ha="right", va="center")
    return panel.imshow(rows, cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def _group_index(trace: RouterTrace, group: int | str) -> int:
    names, count = trace.task_type_names, min(len(sizes) for sizes in trace.expert_groups.values())
    if isinstance(group, str) and names and group in names:
        return names.index(group)
    if isinstance(group, str) or not 0 <= group < count:
        known = f"one of {names}, or " if names else ""
        raise ValueError(f"group={group!r} is unknown; it must be {known}an index from 0 to {count - 1}.")
    return group


def _group_weights(trace: RouterTrace, layer: str, group: int) -> list[float]:
    sizes = trace.expert_groups[layer]
    first = sum(sizes[:group])
    return [sum(probabilities[first : first + sizes[group]]) for probabilities in trace.layers[layer]]


def _visible(token: str) -> str:
    """A token as a label: stripped, or with visible signs if it is only whitespace."""
    return token.strip() or "".join(SPACES.get(character, character) for character in token)
