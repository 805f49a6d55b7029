"""All or nothing: an adapter whose tensors do not fit is an error that leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

from .balance.results import find_recorder
from .experts import LoRAExperts
from .names import CONTAINER, adapter_of, is_of_experts


WRAPPERS = re.compile(r"(?<![^.])_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\.")


def check_adapter_tensors(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict that holds some, but not exactly all, tensors of an adapter (a pre-hook of
    `load_state_dict`).

    Raises:
        RuntimeError: tensors are missing, unexpected or of the wrong shape; the message names them.
    """
    found = {_bare(key): tensor for key, tensor in state_dict.items() if is_of_experts(key) and key.startswith(prefix)}
    if not found:
        return
    expected = {
        _bare(prefix + name): p for name, p in model.named_parameters(remove_duplicate=False) if is_of_experts(name)
    }
    adapters = {adapter for key in found.keys() & expected.keys() if (adapter := adapter_of(key)) is not None}
    wanted = {key for key in expected if adapter_of(key) in adapters}
    problems = [f"missing: {key}" for key in sorted(wanted - found.keys())]
    problems += [f"unexpected: {key}" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(found.keys() & expected.keys()):
        shape = tuple(getattr(expected[key], "ds_shape", expected[key].shape))
        # ZeRO-3 checkpoints hold an empty tensor for each parameter that is partitioned; its values come with the
        # optimizer's.
        if tuple(found[key].shape) not in (shape, tuple(expected[key].shape)):
            problems.append(
                f"size mismatch for {key}: {tuple(found[key].shape)} in the checkpoint, {shape} in the model"
            )
    _refuse(problems)
    for adapter in adapters:
        mark_loaded(model, adapter, True)


def check_load_result(model: nn.Module, adapter: str, result: Any) -> None:
    """Refuse what a `load_adapter` of PEFT or transformers did if LoRAMoE tensors were absent or left over.

    Args:
        model: the model that was loaded into.
        adapter: the adapter that was loaded; what others lack in its file is no fault.
        result: what `load_adapter` returned: an object with `missing_keys` and `unexpected_keys`, or None
            (transformers 4).

    Raises:
        RuntimeError: as `check_adapter_tensors`.
    """
    if result is None and not all(experts.loaded for experts in _experts_of(model, adapter)):
        _refuse([f"missing: all tensors of adapter '{adapter}'"])
    missing, unexpected = (
        [key for key in sorted(getattr(result, f"{problem}_keys", None) or ()) if is_of_experts(key)]
        for problem in ("missing", "unexpected")
    )
    _refuse(
        [f"missing: {key}" for key in missing if adapter_of(key) == adapter]
        + [f"unexpected: {key}" for key in unexpected]
    )


def mark_loaded(model: nn.Module, adapter: str, loaded: bool) -> None:
    """Note whether the experts of an adapter hold the values of a checkpoint."""
    for experts in _experts_of(model, adapter):
        experts.loaded = loaded


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Generator[None]:
    """Undo what was done to the model for a LoRAMoE adapter if the block fails: no half adapter stays behind."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [
        (module, copy(module._active_adapter)) for module in model.modules() if "_active_adapter" in module.__dict__
    ]
    marks = {name: model.__dict__.get(name) for name in ("peft_config", "_hf_peft_config_loaded")}
    kept: dict[str, Any] = getattr(model, "peft_config", None) or {}
    configs, recorder = dict(kept), find_recorder(model)
    try:
        yield
    except BaseException:
        added = find_recorder(model)
        if added is None:
            raise  # no LoRAMoE: PEFT's business
        if added is not recorder:
            added.remove()
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for module, adapters in active:
            module._active_adapter = adapters
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        if configs:
            kept.clear()
            kept.update(configs)
        for name, value in marks.items():
            if value is None:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = value
        raise


def _experts_of(model: nn.Module, adapter: str) -> list[LoRAExperts]:
    modules = model.named_modules(remove_duplicate=False)
    return [m for name, m in modules if isinstance(m, LoRAExperts) and name.endswith(f"{CONTAINER}{adapter}")]


def _bare(name: str) -> str:
    """The name without what wrappers around modules (activation checkpointing, torch.compile) put into it."""
    return WRAPPERS.sub("", name)


def _refuse(problems: list[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:6]) + (f"\n  and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise RuntimeError(
            "The checkpoint does not fit the LoRAMoE layers of this model. Check that the base model is the one it "
            "was trained on, and that r, num_experts, expert_groups, null_groups and target_modules in "
            f"adapter_config.json are as saved.\n  {shown}"
        )
