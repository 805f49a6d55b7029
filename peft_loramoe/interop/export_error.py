"""Measure how far an exported LoRA is from its mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layer import LoRAMoELayer
from ..modes import evaluation_mode
from .calibration import Adapter, CalibrationBatch, OutputError, visit_inputs


# A, shape (rank, in_features), and B, shape (out_features, rank), of a LoRA with scaling 1.
Factors = tuple[Tensor, Tensor]
TOKENS_AT_A_TIME = 512  # compared in float64


class Measured:
    """Sums over the calibration data, for the mixture and its replacements.

    The keys of `kl` and `loss` are "mixture", "export" (all layers replaced by their LoRAs), "without" (no adapter),
    and each layer (only this layer replaced).
    """

    def __init__(self) -> None:
        self.error = OutputError()
        self.tokens = self.labels = 0
        self.kl: dict[Any, float] = defaultdict(float)
        self.loss: dict[Any, float] = defaultdict(float)

    def mean_kl(self, key: Any) -> float | None:
        """Mean KL divergence per token; None if not measured."""
        return self.kl[key] / self.tokens if key in self.kl else None

    def mean_loss(self, key: Any) -> float | None:
        """Mean loss per label token; None if not measured."""
        return self.loss[key] / self.labels if key in self.loss else None


def measure(
    model: nn.Module,
    adapter: Adapter,
    batches: list[CalibrationBatch],
    loras: Mapping[LoRAMoELayer, Factors],
    each_layer: bool,
    title: str | None,
) -> Measured:
    """Compare the mixture with its LoRAs: the outputs of each layer on the mixture's activations, and the model's
    logits.

    Args:
        model: the adapted model.
        adapter: the mixture.
        batches: the calibration data.
        loras: the LoRA of each layer.
        each_layer: also measure the model's logits with a single layer replaced, for each layer.
        title: title of the progress bars; None for no bars.

    Raises:
        ValueError: the model's output has no logits.
    """
    measured = Measured()

    def visit(layer: LoRAMoELayer, x: Tensor, task_types: Tensor) -> None:
        measured.error.add(layer.name, layer.loramoe_experts[adapter.name](x)[0], _apply(loras[layer], x))

    visit_inputs(model, adapter, batches, visit, title and f"{title} outputs")
    replacements: dict[Any, Mapping[LoRAMoELayer, Factors | None]] = {"export": loras, "without": dict.fromkeys(loras)}
    if each_layer:
        replacements |= {layer: {layer: lora} for layer, lora in loras.items()}
    with evaluation_mode(model):
        for batch in tqdm(
            batches, desc=title and f"{title} distributions", leave=False, disable=None if title else True
        ):
            mixture, loss = _next_token(model, batch)
            losses: dict[Any, Tensor | None] = {"mixture": loss}
            for key, replacement in replacements.items():
                with _replaced(adapter, replacement):
                    logits, losses[key] = _next_token(model, batch)
                measured.kl[key] += _kl_divergence(mixture, logits)
            measured.tokens += len(mixture)
            if batch.labels and loss is not None:
                measured.labels += batch.labels
                for key, loss in losses.items():
                    if loss is not None:
                        measured.loss[key] += loss.item() * batch.labels
    return measured


def _apply(lora: Factors, x: Tensor) -> Tensor:
    A, B = lora
    return x @ A.to(x.dtype).T @ B.to(x.dtype).T


@contextmanager
def _replaced(adapter: Adapter, loras: Mapping[LoRAMoELayer, Factors | None]) -> Generator[None]:
    """Temporarily replace the mixtures of these layers by LoRAs, or by nothing where the LoRA is None."""
    scales = {layer: layer.scaling[adapter.name] for layer in loras}

    def add(layer: LoRAMoELayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        lora, x = loras[layer], args[0] if args else kwargs["x"]
        assert lora is not None  # or this hook is not there
        return output + _apply(lora, x.to(torch.promote_types(x.dtype, torch.float32))).to(output.dtype)

    with ExitStack() as stack:
        for layer, lora in loras.items():
            stack.callback(layer.scaling.__setitem__, adapter.name, scales[layer])
            layer.scaling[adapter.name] = 0.0
            if lora is not None:
                stack.callback(layer.register_forward_hook(add, with_kwargs=True).remove)
        yield


def _next_token(model: nn.Module, batch: CalibrationBatch) -> tuple[Tensor, Tensor | None]:
    """Logits of the real tokens, shape (T, classes), and the loss."""
    output = model(**batch.inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"The output of {type(model).__name__} has no logits to compare: load the model with its head, or pass "
            "calibration=None."
        )
    real = batch.tokens.samples(tuple(logits.shape[:-1]), "lm_head", batch.task_types, logits.device).real
    return logits.flatten(0, -2)[real], getattr(output, "loss", None)


def _kl_divergence(true: Tensor, other: Tensor) -> float:
    """KL divergence of `other` from `true`, summed over tokens; both are logits, shape (T, classes)."""
    total = 0.0
    for p, q in zip(true.split(TOKENS_AT_A_TIME), other.split(TOKENS_AT_A_TIME)):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum().item()  # some models mask classes
    return total
