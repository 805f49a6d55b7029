"""What the tests of examples/ share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import toy_world


ROOT = Path(__file__).parents[1]
RECORD = {"instruction": "Name the capital of France.", "input": "", "output": "Paris", "task_type": 0}


def build_toy(folder: Path) -> Path:
    """An untrained toy model and its tokenizer."""
    toy_world.build_world(folder, toy_world.build_facts(4), steps=1, seed=0)
    return folder


def write_lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_script(name: str, *arguments, launcher=()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, *launcher, ROOT / "examples" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
