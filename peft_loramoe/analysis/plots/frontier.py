"""The trade-off between learning and forgetting."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

from .figure import add_legend, figure_file, style
from .labels import Line, place_labels


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MEASURES = ("downstream", "retention")
LOOKS = ("color", "marker")
TEXTS = ("label", "series", *LOOKS)
BOUNDS = {measure: (f"{measure}_low", f"{measure}_high") for measure in MEASURES}


def plot_frontier(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> Figure:
    """Plot models by downstream accuracy (x) and retained knowledge (y), with their Pareto frontier.

    The broad grey line is the frontier: no other model is better than one of its models in both respects.

    Args:
        records: one per model: `label` (str), `downstream` and `retention` (in percent), optionally `downstream_low`
            and `downstream_high`, `retention_low` and `retention_high` (interval, drawn as error bars), `series`
            (str; models of a series share a colour and are joined by a line in their order), `color` and `marker`
            (matplotlib's names, the same for all models of a series).
        path: file to write, .png, .svg or .pdf.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no records, a record is invalid, or the suffix is unsupported.
        ImportError: matplotlib is not installed.

    Example:
        >>> models = [
        ...     {"label": "LoRA", "downstream": 81, "retention": 62},
        ...     {"label": "LoRAMoE", "downstream": 80, "retention": 85, "retention_low": 82, "retention_high": 88},
        ... ]
        >>> figure = plot_frontier(models, "frontier.svg")
    """
    checked = [_checked(record, f"records[{number}]") for number, record in enumerate(records)]
    if not checked:
        raise ValueError("There are no records; pass at least one model.")
    series: dict[str | None, list[dict[str, Any]]] = {}
    for record in checked:
        series.setdefault(record.get("series"), []).append(record)
    for name, members in series.items():
        for look in LOOKS:
            if name is not None and len(found := {record.get(look) for record in members}) > 1:
                raise ValueError(f"The models of series={name!r} have several values of {look}: {found}; give one.")
    with figure_file(path, 6.8, 5) as figure:
        panel = figure.subplots()
        _set_limits(panel, checked)
        frontier = _frontier(checked, panel.get_xlim()[0], panel.get_ylim()[0])
        panel.plot(*zip(*frontier), color="0.88", linewidth=5, zorder=0, label="frontier")
        for number, (name, members) in enumerate(series.items()):
            for models in [members] if name is not None else [[record] for record in members]:
                own = {look: models[0][look] for look in LOOKS if look in models[0]}
                _draw_series(panel, name, models, style(number) | own)
        panel.set_xlabel("downstream tasks (%): right is better")
        panel.set_ylabel("knowledge retained (%): up is better")
        add_legend(figure, *panel.get_legend_handles_labels())
        labels = [(record["label"], (record["downstream"], record["retention"])) for record in checked]
        place_labels(figure, panel, labels, [*_lines(series), *pairwise(frontier)])
    return figure


def _checked(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}={record!r} must be a dictionary with label, downstream and retention.")
    bounds = [name for pair in BOUNDS.values() for name in pair]
    if missing := [name for name in ("label", *MEASURES) if name not in record]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: {dict(record)}.")
    if unknown := sorted(record.keys() - {*TEXTS, *MEASURES, *bounds}):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}.")
    for name in TEXTS:
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{where}: {name}={record[name]!r} must be a string.")
    for name in (*MEASURES, *bounds):
        value = record.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{where}: {name}={value!r} must be a finite number, in percent.")
    for measure, (low, high) in BOUNDS.items():
        if (low in record) != (high in record):
            raise ValueError(f"{where} has only one of {low} and {high}; give both or neither.")
        if low in record and not record[low] <= record[measure] <= record[high]:
            raise ValueError(
                f"{where}: {measure}={record[measure]} is not between {low}={record[low]} and {high}={record[high]}."
            )
    return dict(record)


def _draw_series(panel: Axes, name: str | None, members: list[dict[str, Any]], look: dict[str, Any]) -> None:
    x, y = ([record[measure] for record in members] for measure in MEASURES)
    errors = {
        f"{axis}err": [
            [record[measure] - record.get(low, record[measure]) for record in members],
            [record.get(high, record[measure]) - record[measure] for record in members],
        ]
        for axis, (measure, (low, high)) in zip("xy", BOUNDS.items())
    }
    line = "" if name is None else "-"
    size = 11 if look["marker"] == "*" else 6  # a star's body is small
    panel.errorbar(x, y, **errors, **look, linestyle=line, linewidth=1, elinewidth=0.8, markersize=size, label=name)


def _set_limits(panel: Axes, records: list[dict[str, Any]]) -> None:
    """Leave room for labels, and at least a few percent so that small differences look small."""
    for set_limits, (measure, (low, high)) in zip((panel.set_xlim, panel.set_ylim), BOUNDS.items()):
        least = min(record.get(low, record[measure]) for record in records)
        most = max(record.get(high, record[measure]) for record in records)
        room = max(0.15 * (most - least), 1)
        set_limits(least - room, most + room)


def _frontier(records: list[dict[str, Any]], left: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of the staircase beyond which there is no model, from the bottom to the left."""
    corners, best = [], bottom
    for x, y in sorted(((record["downstream"], record["retention"]) for record in records), reverse=True):
        if y > best:
            corners += [(x, best), (x, y)]
            best = y
    return [*corners, (left, best)]


def _lines(series: Mapping[str | None, list[dict[str, Any]]]) -> Iterator[Line]:
    """Error bars (points where there are none) and the lines of each series."""
    for name, members in series.items():
        for record in members:
            x, y = (record[measure] for measure in MEASURES)
            (left, right), (bottom, top) = (
                (record.get(low, record[m]), record.get(high, record[m])) for m, (low, high) in BOUNDS.items()
            )
            yield from (((left, y), (right, y)), ((x, bottom), (x, top)))
        if name is not None:
            yield from pairwise((record["downstream"], record["retention"]) for record in members)
