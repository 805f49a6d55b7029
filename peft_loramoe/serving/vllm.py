"""vLLM plugin: LoRAMoE adapters are served like LoRAs, with `--enable-lora` (entry point `vllm.general_plugins`).

It changes nothing for other adapters. ``VLLM_PLUGINS`` is vLLM's own way to leave plugins out.
"""

from __future__ import annotations

import logging

from packaging.version import Version


# Versions of vLLM that `make test-vllm` has passed with, and the devices that it ran on.
TRIED = {"0.32.0": "CPU"}

logger = logging.getLogger("vllm.peft_loramoe")  # below vLLM's logger, so that its handlers show what is said


def register() -> None:
    """Teach this process's vLLM to load LoRAMoE adapters; called by vLLM in each of its processes.

    Raises:
        ImportError: vLLM lacks a name that is needed. vLLM logs the error and goes on without the plugin; it then
            refuses LoRAMoE adapters.
    """
    import vllm

    warn_of_version(vllm.__version__)
    try:
        from .vllm_seams import install
    except ImportError as error:
        raise ImportError(
            f"peft_loramoe cannot serve LoRAMoE adapters with vLLM {vllm.__version__} ({error}). Install a version "
            f"that was tried: {', '.join(TRIED)}."
        ) from error
    install()


def warn_of_version(version: str) -> None:
    """Log a warning if a version of vLLM was not tried."""
    if Version(version).base_version not in TRIED:
        logger.warning(
            "peft_loramoe was not tried with vLLM %s, only with %s. When a LoRAMoE adapter is loaded, its layers are "
            "compared with the formula, and a difference is an error. What torch.compile made of them is not.",
            version,
            ", ".join(TRIED),
        )
