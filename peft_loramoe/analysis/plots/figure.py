"""Helpers that all figures share: files, colours, markers, and the order of linears."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...version import needs
from ..names import blocks_and_kinds


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


# Okabe and Ito's palette, made for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
COLOUR_MAP = "viridis"  # perceptually uniform, for colour-blind readers too
UNDATED = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextmanager
def figure_file(path: str | os.PathLike[str], width: float, height: float) -> Generator[Figure]:
    """A new figure that is saved when the block ends without an error.

    Files are reproducible byte by byte (no dates, no random ids). Text is drawn verbatim, dollar signs included.

    Args:
        path: file to write, .png, .svg or .pdf.
        width: in inches.
        height: in inches.

    Raises:
        ValueError: the suffix is unsupported.
        ImportError: matplotlib is not installed.
    """
    suffix = check_suffix(path)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(needs("A figure", "matplotlib", "plots")) from error
    with rc_context({"svg.hashsalt": "peft_loramoe", "text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=150, metadata=UNDATED[suffix])


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The lower-case suffix of a figure's file.

    Raises:
        ValueError: the suffix is unsupported.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in UNDATED:
        raise ValueError(f"path '{os.fspath(path)}' must end in {', '.join(UNDATED)}.")
    return suffix


def add_colour_bar(figure: Figure, image: AxesImage, axes: np.ndarray, label: str) -> None:
    """Add a narrow colour bar to the right of the panels."""
    width, height = figure.get_size_inches()
    figure.colorbar(image, ax=axes, label=label, fraction=0.3 / width, aspect=height / 0.2, pad=0.1 / width)


def add_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Add a legend above the panels, in as few rows as fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            break
        legend.remove()


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the curve with this index; the first 49 differ."""
    turn, place = divmod(index, len(COLOURS))
    return {"color": COLOURS[place], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def linears_by_kind(layers: Iterable[str]) -> dict[str, dict[int, str]]:
    """Kind of linear -> block -> name of the linear (see `names.blocks_and_kinds`).

    Block 0 for linears outside of blocks.
    """
    kinds: dict[str, dict[int, str]] = {}
    for layer, (block, kind) in blocks_and_kinds(layers).items():
        kinds.setdefault(kind, {})[block or 0] = layer
    return {kind: dict(sorted(blocks.items())) for kind, blocks in kinds.items()}
