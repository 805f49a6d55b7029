"""Run the study or write its report.

    python -m research.toy run --variant toy
    python -m research.toy report build/study/toy/rows.jsonl --output build/study/toy

`run` goes on where it was stopped. Its toy variant takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from .protocol import VARIANTS
from .report import write_report
from .runs import Study, read_rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m research.toy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run everything that has no row yet, and write the report")
    run.add_argument("--variant", choices=VARIANTS, default="toy", help="default: toy (large is for a GPU)")
    run.add_argument("--output", type=Path, help="folder for models, rows and report (default: build/study/VARIANT)")
    run.add_argument(
        "--jobs", type=int, default=_jobs(), help="processes (default: one for each core, with a GPU one)"
    )
    report = commands.add_parser("report", help="write the tables and figures of a file of rows")
    report.add_argument("rows", type=Path, help="JSONL file that `run` wrote")
    report.add_argument("--output", type=Path, required=True, help="folder for report.md and the figures")
    return parser


def _jobs() -> int:
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.command == "run":
            if args.jobs < 1:
                raise ValueError(f"--jobs {args.jobs} must be at least 1.")
            folder = args.output or Path("build/study") / args.variant
            study = Study(VARIANTS[args.variant], folder)
            study.run(args.jobs)
            rows, output = study.rows, folder
        else:
            rows, output = read_rows(args.rows), args.output
        print(write_report(rows, output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # worker processes import this file
    sys.exit(main())
