"""Commands `analyze`, `trace` and `plot`: statistics and figures of an adapter's routers."""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import analysis
from ..analysis.plots.figure import check_suffix
from ..reading import read_json
from . import tables
from .commands import load_with_texts, print_json
from .models import SavedAdapter
from .options import Command, Parser, command_adder, json_option, model_options, name_or_index, text_options


# --- arguments
# --------------------------------------------------------------------------------------------------------


def add_analysis(add: Callable[..., Parser]) -> None:
    """Add the commands to the parser."""
    command, model, as_json = command_adder(add), model_options(), json_option()
    analyze = command(
        "analyze",
        run_analyze,
        "measure how the routers of an adapter use its experts on a file of texts",
        "Prints the mean router weight of each expert group by task type, the entropy of the routers, dead and "
        "dominating "
        "experts, and the similarity of experts. `plot groups`, `plot load` and `plot entropy` plot the file from -o.",
        model,
        text_options("--data", required=True),
        as_json,
    )
    trace = command(
        "trace",
        run_trace,
        "show the router weight of each expert group for each token of a text",
        "Prints the mean over all linears. `plot trace` plots every linear from the file from -o.",
        model,
        as_json,
    )
    trace.add_argument("--text", required=True, help="the text; special tokens are added unless it begins with BOS")
    for parser in (analyze, trace):
        parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
        parser.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="JSON file to write; replaced if it exists"
        )
    plot = add("plot", help="plot the results of `analyze` or `trace`, or compare models by learning and forgetting")
    _add_plots(command_adder(plot.add_subparsers(title="figures", metavar="KIND", required=True).add_parser))


def _add_plots(figure: Command) -> None:
    of_statistics = {
        "groups": (analysis.plot_group_weights, "plot the weight of each expert group by layer and task type"),
        "load": (
            analysis.plot_load,
            "plot the weight of each expert by layer and task type, and mark dead and dominating experts",
        ),
        "entropy": (analysis.plot_entropy, "plot the entropy of the routers by layer and task type"),
    }
    for name, (draw, summary) in of_statistics.items():
        parser = figure(name, _statistics_plotter(draw), summary, "FILE was written by `analyze`.")
        parser.add_argument("--adapter", metavar="NAME", help="name of the adapter, if the statistics have several")
        _add_files(parser)
    trace = figure(
        "trace", plot_trace, "plot the weight of an expert group for each token", "FILE was written by `trace`."
    )
    trace.add_argument("--group", type=name_or_index, default=0, help="index or name of the expert group (default: 0)")
    _add_files(trace)
    frontier = figure(
        "frontier",
        plot_frontier,
        "plot the downstream accuracy of models against the knowledge that they retain",
        'FILE is a JSON list with a record per model: {"label": "LoRA", "downstream": 81, "retention": 86.5}, in '
        "percent. "
        'It may also have "downstream_low", "downstream_high", "retention_low" and "retention_high" (error bars) and '
        '"series" '
        "(the models of a series are joined by a line).",
    )
    _add_files(frontier)


def _add_files(parser: Parser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON file to read")
    parser.add_argument(
        "-o",
        "--output",
        type=_figure_path,
        action="append",
        required=True,
        metavar="FIGURE",
        help="file to write, .png, .svg or .pdf, replaced if it exists; may be repeated",
    )


def _figure_path(text: str) -> Path:
    try:
        check_suffix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


# --- commands
# ---------------------------------------------------------------------------------------------------------


def run_analyze(options: Namespace) -> None:
    """Measure how the routers of an adapter use its experts."""
    _require_folder(options.output)
    model, batches = load_with_texts(options)
    statistics = analysis.router_statistics(model, batches)
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


def run_trace(options: Namespace) -> None:
    """Show the router weights for each token of a text."""
    _require_folder(options.output)
    adapter = SavedAdapter.read(options.adapter, options.base_model)
    tokenizer = adapter.tokenizer()
    trace = analysis.router_trace(adapter.load(options.device), tokenizer, options.text)
    if options.output:
        trace.save(options.output)
    if options.json:
        print_json(dataclasses.asdict(trace))
    else:
        tables.show_trace(trace)
        _print_written(options.output)


def plot_trace(options: Namespace) -> None:
    """Plot a trace."""
    trace = analysis.RouterTrace.load(options.file)
    _draw(options, lambda path: analysis.plot_trace(trace, path, options.group))


def plot_frontier(options: Namespace) -> None:
    """Plot models by learning and forgetting."""
    records = read_json(options.file)
    try:
        if not isinstance(records, list):
            raise ValueError("it must hold a list of records")
        _draw(options, lambda path: analysis.plot_frontier(records, path))
    except ValueError as error:
        raise ValueError(f"'{options.file}' cannot be drawn: {error}") from error


def _statistics_plotter(draw: Callable[..., Any]) -> Callable[[Namespace], None]:
    def plot(options: Namespace) -> None:
        statistics = analysis.RouterStatistics.load(options.file)
        _draw(options, lambda path: draw(statistics, path, options.adapter))

    return plot


def _draw(options: Namespace, draw: Callable[[Path], Any]) -> None:
    for path in options.output:
        _require_folder(path)
    for path in options.output:
        draw(path)
        _print_written(path)


def _require_folder(file: Path | None) -> None:
    """Check, before the work begins, that the file can be written."""
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"The folder of '{file}' does not exist; create it first.")


def _print_written(file: Path | None) -> None:
    if file is not None:
        print(f"Wrote {file}.")
