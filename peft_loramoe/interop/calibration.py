"""Run calibration batches through an adapted model and observe the inputs of its adapted linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..balance.results import configs_of, find_recorder
from ..balance.samples import Batch, label_tokens
from ..balance.task_types import task_type_tensor
from ..config import LoRAMoEConfig
from ..layer import LoRAMoELayer
from ..modes import evaluation_mode
from ..ops.router import select_gates


@dataclass(frozen=True)
class Adapter:
    """A LoRAMoE adapter of a model: its name, its configuration and its layers, in the order of the model."""

    name: str
    config: LoRAMoEConfig
    layers: list[LoRAMoELayer]


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch on the device of the model.

    Attributes:
        inputs: keyword arguments of the model; for causal language models, labels default to the input ids.
        tokens: samples and padding of the batch.
        task_types: int64, shape (batch,) or (batch, seq), or None.
        labels: number of label tokens in the loss; 0 without a loss.
    """

    inputs: dict[str, Any]
    tokens: Batch
    task_types: Tensor | None
    labels: int


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """Find a LoRAMoE adapter by name; None finds the only or the active one.

    Raises:
        ValueError: the model has no such adapter, or the choice is ambiguous.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRAMoELayer)]
    names = sorted({name for layer in layers for name in layer.loramoe_experts})
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no LoRAMoE layers; load an adapter with PeftModel.from_pretrained first."
        )
    if adapter_name is None:
        active = [name for name in names if name in layers[0].active_adapters]
        if len(names) > 1 and len(active) != 1:
            raise ValueError(
                f"The model has the LoRAMoE adapters {', '.join(names)}; choose one with adapter_name=..."
            )
        adapter_name = names[0] if len(names) == 1 else active[0]
    if adapter_name not in names:
        raise ValueError(
            f"adapter_name='{adapter_name}' is not a LoRAMoE adapter of this model; it has {', '.join(names)}."
        )
    config = configs_of(model)[adapter_name]
    return Adapter(adapter_name, config, [layer for layer in layers if adapter_name in layer.loramoe_experts])


def prepare(
    model: nn.Module, adapter: Adapter, calibration: Iterable[Mapping[str, Any]] | None
) -> list[CalibrationBatch]:
    """Prepare batches of keyword arguments of the model, including `task_types`.

    Raises:
        ValueError: there are no batches, or the adapter is not the only active one, so that others would affect its
            inputs.
    """
    if calibration is None:
        return []
    for layer in adapter.layers:
        if layer.disable_adapters or layer.active_adapters != [adapter.name]:
            active = "none (disabled)" if layer.disable_adapters else ", ".join(layer.active_adapters)
            raise ValueError(
                f"Adapter '{adapter.name}' must be the only active one to be measured; active: {active}. Call "
                f"model.set_adapter('{adapter.name}') first."
            )
    device = next(model.parameters()).device
    batches = [_prepare_batch(model, adapter.config, batch, device) for batch in calibration]
    if not batches:
        raise ValueError("calibration contains no batch; pass at least one, or None to skip the measurement.")
    return batches


def _prepare_batch(
    model: nn.Module, config: LoRAMoEConfig, batch: Mapping[str, Any], device: torch.device
) -> CalibrationBatch:
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    types = inputs.pop("task_types", None)
    if types is not None:
        types = task_type_tensor(types, config.num_groups, config.task_type_names)
    recorder = find_recorder(model)
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss and not is_encoder_decoder
    if causal and inputs.get("labels") is None and inputs.get("input_ids") is not None:
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        inputs["labels"] = ids if mask is None or mask.dim() != 2 else ids.masked_fill(mask == 0, -100)
    labels = label_tokens(inputs, shifted=causal)
    return CalibrationBatch(
        inputs,
        Batch(inputs, types, None if recorder is None else recorder.streams),
        types,
        0 if labels is None else int(labels),
    )


def visit_inputs(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[CalibrationBatch],
    visit: Callable[[LoRAMoELayer, Tensor, Tensor], None],
    description: str | None = None,
) -> None:
    """Run the model over batches and call a function with the input of each adapted linear, without padding.

    Args:
        model: the adapted model.
        adapter: the adapter whose layers are visited.
        batches: result of `prepare`.
        visit: called with the layer, its input of T real tokens, shape (T, in_features), at least float32, and the
            task type of each token, shape (T,), int64, -1 for unknown.
        description: title of a progress bar; None for no bar.
    """
    running: list[CalibrationBatch] = []

    def call_visit(layer: LoRAMoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs[layer.input_name]
        batch = running[0]
        samples = batch.tokens.samples(tuple(x.shape[:-1]), layer.name, batch.task_types, x.device)
        x = x.flatten(0, -2)[samples.real]
        visit(layer, x.to(torch.promote_types(x.dtype, torch.float32)), samples.task_types[samples.ids[samples.real]])

    handles = [layer.register_forward_pre_hook(call_visit, with_kwargs=True) for layer in adapter.layers]
    try:
        with evaluation_mode(model):
            for batch in tqdm(batches, desc=description, leave=False, disable=None if description else True):
                running[:] = [batch]
                model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()


def mean_gates(
    model: nn.Module,
    adapter: Adapter,
    batches: list[CalibrationBatch],
    task_type: int | None = None,
    description: str | None = None,
) -> dict[str, Tensor]:
    """Mean gates of each layer over the real tokens, after top-k selection.

    Args:
        model: the adapted model.
        adapter: the adapter.
        batches: result of `prepare`.
        task_type: average over tokens of this type only, -1 for unknown; None averages over all tokens.
        description: title of a progress bar; None for no bar.

    Returns:
        Layer name -> gates of all router outputs, shape (N,), float32, on the CPU.

    Raises:
        ValueError: a layer receives no token of this type.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((layer.name for layer in adapter.layers), 0)

    def visit(layer: LoRAMoELayer, x: Tensor, task_types: Tensor) -> None:
        experts = layer.loramoe_experts[adapter.name]
        x = x if task_type is None else x[task_types == task_type]
        gates = select_gates(experts(x)[1], range(experts.num_experts), experts.options.top_k)
        sums[layer.name] = sums.get(layer.name, 0) + gates.sum(0, dtype=torch.float64).cpu()
        counts[layer.name] += len(x)

    visit_inputs(model, adapter, batches, visit, description)
    for name, count in counts.items():
        if not count:
            of_type = "" if task_type is None else f" of task type {task_type}"
            raise ValueError(f"calibration has no real token{of_type} for layer '{name}'.")
    return {name: (total / counts[name]).float() for name, total in sums.items()}


class OutputError:
    """Relative error of outputs by layer: norm of the differences divided by the norm of the outputs."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, layer: str, output: Tensor, other: Tensor) -> None:
        """Compare two outputs of a layer, both of shape (T, out_features)."""
        error, size = self._sums.get(layer, (0.0, 0.0))
        error += (output - other).double().square().sum().item()
        self._sums[layer] = error, size + output.double().square().sum().item()

    def of(self, layer: str | None = None) -> float | None:
        """The error of a layer, or over all layers; None if nothing was compared.

        For zero outputs, it is 0 or infinity.
        """
        sums = list(self._sums.values()) if layer is None else [self._sums[layer]] if layer in self._sums else []
        error, size = sum(error for error, _ in sums), sum(size for _, size in sums)
        if not sums:
            return None
        return (error / size) ** 0.5 if size else 0.0 if not error else float("inf")
