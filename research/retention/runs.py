"""Runs and their rows: what has no row yet is run, one after another or side by side.

Not in `__main__`, which the processes of `--processes` do not import.
"""

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

from .base_model import ROOT, prepare
from .methods import Run
from .report import Row
from .training import run as run_at_scales


PACKAGES = ("peft_loramoe", "peft", "transformers", "torch")


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, or none."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def finished(run: Run, scales: Sequence[float], how: argparse.Namespace) -> list[Row]:
    """Run once; a row for each scale."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing changes on a CPU
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
