"""All runs of a variant, in parallel processes and resumable: each ends as a row of a JSONL file."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .experiment import device, pretrain_model, run_experiment, write_texts
from .protocol import METHODS, REPLAY, Run, Variant, ablation_runs, choose_learning_rates, selection_runs, test_runs


PACKAGES = ("peft_loramoe", "peft", "transformers", "torch")
ROWS = "rows.jsonl"


class Study:
    """A variant's rows and pretrained models in a folder.

    Args:
        variant: what to run.
        folder: may hold the rows of an earlier call, which are not run again.

    Raises:
        ValueError: the folder's rows were made with other settings.
    """

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self.folder = folder = folder.resolve()  # the adapters name their base model by it
        methods = {name: dataclasses.asdict(METHODS[name]) for name in variant.methods}
        settings = json.loads(json.dumps({**dataclasses.asdict(variant), "methods": methods}))
        file, rows = folder / "variant.json", folder / ROWS
        if (file.exists() or rows.exists()) and not (file.exists() and json.loads(file.read_text()) == settings):
            raise ValueError(
                f"'{folder}' holds rows of other settings than variant '{variant.name}' has now; use another folder "
                "(--output)."
            )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n")
        self.rows = read_rows(rows) if rows.exists() else []

    def run(self, jobs: int) -> None:
        """Pretrain, choose the learning rates, test, and run the ablations, as far as there are no rows yet."""
        with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_prepare_process) as pool:
            try:
                self._pretrain(pool)
                seed = self.variant.test_seeds[0]
                write_texts(self.variant, seed, self._model(seed), self.folder)
                self._fine_tune(pool, "learning rates", selection_runs(self.variant))
                chosen = choose_learning_rates(self.variant, self.rows)
                self._fine_tune(pool, "tests", test_runs(self.variant, chosen))
                self._fine_tune(pool, "ablations", ablation_runs(self.variant, chosen))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _pretrain(self, pool: ProcessPoolExecutor) -> None:
        rows = {row["pretraining"] for row in self.rows if "pretraining" in row}
        missing = [seed for seed in self.variant.seeds if seed not in rows or not self._model(seed).exists()]
        # Scores of another model's fine-tuning say nothing about the new one.
        self.rows = [row for row in self.rows if _seed(row) not in missing]
        futures = {pool.submit(pretrain_model, self.variant, seed, self._model(seed)): seed for seed in missing}
        for seed, result in _finished(futures, "pretraining"):
            self._append({"key": f"pretraining {seed}", "pretraining": seed, **result})

    def _fine_tune(self, pool: ProcessPoolExecutor, title: str, runs: list[Run]) -> None:
        known = {row["key"] for row in self.rows}
        futures = {
            pool.submit(run_experiment, self.variant, run, self._model(run.seed), self._adapter(run)): run
            for run in runs
            if run.key not in known
        }
        for run, result in _finished(futures, title):
            config = self.variant.options(run)
            self._append({"key": run.key, "run": dataclasses.asdict(run), "config": config, **result})

    def _append(self, row: dict[str, Any]) -> None:
        row = {**row, "variant": self.variant.name, **_environment()}
        self.rows.append(row)
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _adapter(self, run: Run) -> Path | None:
        """Where the adapter is kept: one of each method, to look into."""
        kept = METHODS[run.method].kind != "full" and run.seed == self.variant.test_seeds[0] and not run.options
        kept = kept and (run.samples, run.replay) == (self.variant.samples[-1], REPLAY)
        return self.folder / f"adapter-{run.method}" if kept else None

    def _model(self, seed: int) -> Path:
        return self.folder / f"model-{seed}"


def _finished(futures: dict[Future, Any], title: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What each future is of and its result, as they finish.

    A failure is raised when what runs beside it has finished.
    """
    failed = None
    for future in tqdm(as_completed(futures), title, len(futures), disable=not futures):
        if future.cancelled():
            continue
        if (error := future.exception()) is None:
            yield futures[future], future.result()
        elif failed is None:
            failed = RuntimeError(f"{futures[future]} failed; `run` goes on from here.")
            failed.__cause__ = error
            for other in futures:
                other.cancel()
    if failed is not None:
        raise failed


def _seed(row: dict[str, Any]) -> int:
    return row["pretraining"] if "pretraining" in row else row["run"]["seed"]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, the newest of each key.

    Raises:
        ValueError: a line is no row.
    """
    rows = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["key"]] = {"variant": row["variant"], "scores": row["scores"], **row}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: no row of the study ({error!r}); remove the line to run it again."
            ) from error
    return list(rows.values())


def _prepare_process() -> None:
    """One thread for each process, and no output but the study's own progress."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
