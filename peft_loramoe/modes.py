"""Temporary modes of a model: evaluation, and the base model alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


# Values of LoRA's init_lora_weights that leave the base model's weights as they are. The others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA, ...) change them.
INITS_THAT_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Temporarily switch to evaluation mode without gradients; afterwards every module is in its former mode.

    Example:
        >>> model = nn.Dropout().train()
        >>> with evaluation_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def switchable(model: nn.Module) -> list[Any]:
    """The modules with adapters, or with trained copies of a module, that can be disabled."""
    return [module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)]


@contextmanager
def base_model(model: nn.Module) -> Generator[None]:
    """Run the model without its adapters, in evaluation mode and without gradients; afterwards it is as it was."""
    enabled = [module for module in switchable(model) if not module.disable_adapters]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module in enabled:
            module.enable_adapters(False)
        with evaluation_mode(model):
            yield
    finally:
        for module in enabled:
            module.enable_adapters(True)
        for parameter, requires_grad in trained:  # which enable_adapters sets anew
            parameter.requires_grad_(requires_grad)
