"""Commands `analyze`, `trace` and `plot`: statistics and figures of an adapter's routers."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import analysis
from ..analysis.plots.figure import check_suffix
from ..reading import read_json
from . import tables
from .commands import load_with_texts, print_json
from .models import SavedAdapter
from .options import check_output


def analyze(options: Namespace) -> None:
    """Measure how the routers of an adapter use its experts."""
    check_output(options.output)
    model, batches = load_with_texts(options)
    statistics = analysis.router_statistics(model, tqdm(batches, desc="batches", leave=False, disable=None))
    usage, similarity = analysis.expert_usage(statistics), analysis.expert_similarity(model)
    if options.output:
        statistics.save(options.output)
    if options.json:
        groups = analysis.group_weights(statistics.experts)
        found = {"group_weights": groups, "expert_usage": usage, "expert_similarity": similarity}
        print_json({**dataclasses.asdict(statistics), **found})
    else:
        tables.show_statistics(statistics, usage, similarity)
        _print_written(options.output)


def trace(options: Namespace) -> None:
    """Show the router weights for each token of a text."""
    check_output(options.output)
    adapter = SavedAdapter.read(options.adapter, options)
    tokenizer = adapter.tokenizer()
    traced = analysis.router_trace(adapter.load(), tokenizer, options.text)
    if options.output:
        traced.save(options.output)
    if options.json:
        print_json(dataclasses.asdict(traced))
    else:
        tables.show_trace(traced)
        _print_written(options.output)


def plot_groups(options: Namespace) -> None:
    """Plot the weights of expert groups."""
    _plot_statistics(options, analysis.plot_group_weights)


def plot_load(options: Namespace) -> None:
    """Plot the weights of experts."""
    _plot_statistics(options, analysis.plot_load)


def plot_entropy(options: Namespace) -> None:
    """Plot the entropy of the routers."""
    _plot_statistics(options, analysis.plot_entropy)


def plot_trace(options: Namespace) -> None:
    """Plot a trace."""
    _check_figures(options)
    traced = analysis.RouterTrace.load(options.file)
    _draw(options, lambda path: analysis.plot_trace(traced, path, options.group))


def plot_frontier(options: Namespace) -> None:
    """Plot models by learning and forgetting."""
    _check_figures(options)
    records = read_json(options.file)
    try:
        if not isinstance(records, list):
            raise ValueError("it must hold a list of records")
        _draw(options, lambda path: analysis.plot_frontier(records, path))
    except ValueError as error:
        raise ValueError(f"'{options.file}' cannot be drawn: {error}") from error


def _plot_statistics(options: Namespace, draw: Callable[..., Any]) -> None:
    _check_figures(options)
    statistics = analysis.RouterStatistics.load(options.file)
    _draw(options, lambda path: draw(statistics, path, options.adapter))


def _check_figures(options: Namespace) -> None:
    for path in options.output:
        check_suffix(path)
        check_output(path)


def _draw(options: Namespace, draw: Callable[[Path], Any]) -> None:
    for path in options.output:
        draw(path)
        _print_written(path)


def _print_written(file: Path | None) -> None:
    if file is not None:
        print(f"Wrote {file}.")
