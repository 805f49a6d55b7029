"""What the tests of examples/ and research/ share."""

import json
import os
import subprocess
import sys
from pathlib import Path

from research.toy import countries


ROOT = Path(__file__).parents[1]
RECORD = {"instruction": "Name the capital of France.", "input": "", "output": "Paris", "task_type": 0}


def build_toy(folder: Path) -> Path:
    """An untrained toy model and its tokenizer."""
    countries.build_world(folder, countries.build_facts(4), steps=1, seed=0)
    return folder


def write_lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_script(name: str, *arguments, launcher=()) -> subprocess.CompletedProcess:
    """Run a file of examples/."""
    return _run(*launcher, ROOT / "examples" / name, *arguments)


def run_module(name: str, *arguments) -> subprocess.CompletedProcess:
    return _run("-m", name, *arguments)


def _run(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
