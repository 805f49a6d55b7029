"""`python -m research.retention variant` and `run` train and score, `report` writes the tables: see README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import routers
from .methods import METHODS, VARIANTS, Run
from .report import write_report
from .runs import read_rows, run_all


RESULTS = Path(__file__).with_name("results")


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
    command = commands.add_parser("report", help="write tables (.md) and a figure (.png) beside the last file of rows")
    command.add_argument("rows", type=Path, nargs="*", default=[RESULTS / "test.jsonl"], help="files of rows, joined")
    command.add_argument("--abilities", type=Path, help="what `peft-loramoe evaluate` wrote about the adapters")
    command = commands.add_parser("routers", help="screen terms and routers on the base model's activations")
    command.add_argument("--seed", type=int, default=21)
    command.add_argument("--names", nargs="+", help="variants (default: all)")
    command.add_argument("--output", type=Path, default=RESULTS / "routers.jsonl")
    command.add_argument("--model", help="name or folder of another base model")
    options = parser.parse_args(arguments)
    if options.command == "report":
        evaluated = json.loads(options.abilities.read_text(encoding="utf-8")) if options.abilities else None
        if missing := [str(file) for file in options.rows if not file.exists()]:
            parser.error(f"there are no rows in {', '.join(missing)}; `run` and `variant` write them")
        rows = [row for file in options.rows for row in read_rows(file)]
        return write_report(rows, options.rows[-1].with_suffix(".md"), evaluated)
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
