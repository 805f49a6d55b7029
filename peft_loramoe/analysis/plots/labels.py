"""Place labels of points so that they overlap as little as possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figure import GREY


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Candidate positions of a label, best first: distance from its point, in points (1/72 inch), and direction.
PLACES = [
    (distance, x, y)
    for distance in (5, 13, 26, 40)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}
POINTER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}  # to a distant label
Point = tuple[float, float]
Line = tuple[Point, Point]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def place_labels(figure: Figure, panel: Axes, labels: Sequence[tuple[str, Point]], lines: Iterable[Line]) -> None:
    """Label each point, greedily choosing the position with the least overlap.

    Args:
        figure: the figure; its layout must not change afterwards.
        panel: the axes, with their final limits.
        labels: pairs of text and point, in data coordinates.
        lines: obstacles in data coordinates; a point is a line of length 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # applies the layout
    frame, scale = panel.get_window_extent(renderer).extents, figure.dpi / 72
    ends = [panel.transData.transform(line) for line in lines]
    taken = [box for start, end in ends for box in _boxes(start, end, 2 * scale)]
    for text, point in labels:
        probe = panel.annotate(text, point, fontsize="small")
        size = probe.get_window_extent(renderer).size
        probe.remove()
        at = panel.transData.transform(point)
        boxes, obstacles = {place: _label_box(at, size, place, scale) for place in PLACES}, np.array(taken)
        cost = {place: _covered(box, obstacles, frame) for place, box in boxes.items()}
        place = min(cost, key=lambda place: cost[place])
        distance, x, y = place
        far = distance > PLACES[0][0]
        taken.append(boxes[place])
        if far:
            taken += _boxes(at, (sum(boxes[place][::2]) / 2, sum(boxes[place][1::2]) / 2), scale)
        label = panel.annotate(
            text,
            point,
            xytext=(distance * x, distance * y),
            textcoords="offset points",
            ha=HORIZONTAL[x],
            va=VERTICAL[y],
            fontsize="small",
            arrowprops=POINTER if far else None,
        )
        label.set_in_layout(False)


def _boxes(start: Any, end: Any, half: float) -> list[Box]:
    """Small boxes that cover a line."""
    centres = np.linspace(start, end, 1 + math.ceil(math.dist(start, end) / (2 * half)))
    return [(x - half, y - half, x + half, y + half) for x, y in centres]


def _label_box(at: Any, size: Any, place: tuple[int, int, int], scale: float) -> Box:
    distance, x, y = place
    left = at[0] + distance * x * scale + {1: 0, 0: -0.5, -1: -1}[x] * size[0]
    bottom = at[1] + distance * y * scale + {1: 0, 0: -0.5, -1: -1}[y] * size[1]
    return left, bottom, left + size[0], bottom + size[1]


def _covered(box: Box, taken: np.ndarray, frame: Box) -> float:
    """Cost of a label: the area that overlaps boxes, shape (n, 4), and nine times the area outside of the frame."""
    on_itself, in_frame = _overlaps(box, np.array([box, frame]))
    return _overlaps(box, taken).sum() + 9 * (on_itself - in_frame)


def _overlaps(box: Box, others: np.ndarray) -> np.ndarray:
    """Area of the intersections of a box with n others, shape (n,)."""
    return (np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])).clip(0).prod(1)
