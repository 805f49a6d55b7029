"""`python -m research.retention variant` and `run` train and score, `report` writes the tables: see README.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from . import routers
from .base_model import ROOT, prepare
from .methods import METHODS, VARIANTS, Run
from .report import Row, write_report
from .training import run as run_at_scales


RESULTS = Path(__file__).with_name("results")
PACKAGES = ("peft_loramoe", "peft", "transformers", "torch")


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, or none."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def finished(run: Run, scales: Sequence[float], how: argparse.Namespace) -> list[Row]:
    """Run once; a row for each scale."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(f"{run.method}, seed {run.seed}, {run.options}", flush=True)
    rows = []
    for scale, row in run_at_scales(run, scales, how.model, how.device, how.adapters):
        key = run.at_scale(scale).key
        row = {"key": key, "run": json.loads(key), **row, "date": datetime.date.today().isoformat()}
        row["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
        print(scale, {name: row["scores"][name]["loss"] for name in row["scores"]}, flush=True)
        rows.append(row)
    return rows


def run_all(runs: list[Run], how: argparse.Namespace) -> None:
    """Run what has no row yet, in order; each ends as a row for each scale."""
    how.output.parent.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read_rows(how.output)}
    left = []
    for run in runs:
        of_run = how.scales if run.settings.tuner else [1.0]
        if missing := [scale for scale in of_run if run.at_scale(scale).key not in done]:
            left.append((run, missing, how))
    for rows in results(left, how):
        with how.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def results(left: list[tuple[Run, list[float], argparse.Namespace]], how: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each run, as soon as it has ended."""
    if how.processes == 1:
        yield from itertools.starmap(finished, left)
        return
    if how.model is None:
        prepare(ROOT / "model")  # before several processes do
    with ProcessPoolExecutor(how.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        try:
            yield from (future.result() for future in as_completed([pool.submit(finished, *run) for run in left]))
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m research.retention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    how = argparse.ArgumentParser(add_help=False)
    how.add_argument("--output", type=Path, default=RESULTS / "screening.jsonl")
    how.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], help="score what was trained also scaled by these factors"
    )
    how.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core (default: 1)")
    how.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    how.add_argument("--adapters", type=Path, metavar="FOLDER", help="save the adapters there")
    how.add_argument("--model", help="name or folder of another base model")
    command = commands.add_parser("variant", parents=[how], help="all runs of a test, those that have no row yet")
    command.add_argument("name", choices=VARIANTS)
    command = commands.add_parser("run", parents=[how], help="train and score what has no row yet")
    command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    command.add_argument("--seeds", nargs="+", type=int, required=True)
    command.add_argument("--samples", type=int, default=Run.samples, help="of the tasks (default: %(default)s)")
    command.add_argument(
        "--part", type=float, default=Run.part, help="share of the items that is scored (default: all)"
    )
    command.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="options of the method to replace")
    command.add_argument("--batch", type=int, default=Run.batch, help="samples in a step (default: %(default)s)")
    command = commands.add_parser("report", help="write tables (.md) and a figure (.png) beside the rows")
    command.add_argument("rows", type=Path, nargs="?", default=RESULTS / "test.jsonl")
    command.add_argument("--abilities", type=Path, help="what `peft-loramoe evaluate` wrote about the adapters")
    command = commands.add_parser("routers", help="screen terms and routers on the base model's activations")
    command.add_argument("--seed", type=int, default=21)
    command.add_argument("--names", nargs="+", help="variants (default: all)")
    command.add_argument("--output", type=Path, default=RESULTS / "routers.jsonl")
    command.add_argument("--model", help="name or folder of another base model")
    options = parser.parse_args(arguments)
    if options.command == "report":
        evaluated = json.loads(options.abilities.read_text(encoding="utf-8")) if options.abilities else None
        return write_report(read_rows(options.rows), options.rows.with_suffix(".md"), evaluated)
    if options.command == "routers":
        torch.set_num_threads(1)
        with options.output.open("a", encoding="utf-8") as file:
            for row in routers.screen(options.seed, options.model, options.names):
                file.write(json.dumps(row) + "\n")
        return
    if options.command == "variant":
        return run_all(VARIANTS[options.name], options)
    replaced = {name: json.loads(value) for name, value in (entry.split("=", 1) for entry in options.set)}
    runs = [
        Run(method, seed, options.samples, options.batch, part=options.part, options=replaced)
        for seed in options.seeds
        for method in options.methods
    ]
    run_all(runs, options)


if __name__ == "__main__":
    main()
