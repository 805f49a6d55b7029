"""Where and with what a benchmark is measured, for its result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from peft_loramoe.ops import mixture

from .methods import PEERS


ROOT = Path(__file__).parent.parent
PACKAGES = ("peft_loramoe", "torch", "transformers", "peft", "bitsandbytes", "triton", "liger_kernel", *PEERS)


def about(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Where and with what the rows were measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "peft_loramoe", "benchmarks/*.py") else ""),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "triton_kernels": mixture.KERNELS is not None,
        "smoke": smoke,
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor()
