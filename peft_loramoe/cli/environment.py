"""`peft-loramoe env`: what an issue has to say of the machine and the versions."""

from __future__ import annotations

import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version


PACKAGES = (
    *("peft_loramoe", "peft", "transformers", "torch", "accelerate", "bitsandbytes", "trl", "triton"),
    *("huggingface_hub", "safetensors", "vllm"),
)


def env(options: Namespace) -> None:
    """Print versions, platform and devices, a line each."""
    found = {name: _version(name) for name in PACKAGES}
    found["Python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["device"] = ", ".join(_devices())
    for name, value in found.items():
        print(f"- {name}: {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    """Names of the accelerators, with what torch was built for, or of the CPU."""
    import torch  # not before the arguments are parsed

    if torch.cuda.is_available():
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [f"{name} ({built})" for name in names]
    if torch.backends.mps.is_available():
        return [f"Apple MPS ({platform.machine()})"]
    return [f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
