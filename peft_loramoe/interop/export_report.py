"""How far an exported LoRA is from its mixture: measured, printed, and written where readers of the folder find it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..card import is_hub_name
from ..layer import LoRAMoELinear
from ..modes import evaluation_mode
from .calibration import Adapter, CalibrationBatch, OutputError, visit_inputs


# A, shape (rank, in_features), and B, shape (out_features, rank), of one layer's LoRA of scale 1.
Factors = tuple[Tensor, Tensor]
# Values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# KL divergence in nats that rounding logits of ordinary size to bfloat16 causes by itself.
ROUNDING = 1e-4
# Tokens whose distributions are compared at a time, in float64.
TOKENS_AT_A_TIME = 512


@dataclass(frozen=True)
class LayerExport:
    """One exported linear.

    Attributes:
        layer: its name inside the base model.
        rank: of its LoRA.
        gates: the fixed gate of each router output, null experts included.
        relative_error: norm of the difference between the LoRA's and the mixture's output, over the norm of the mixture's, all
            real tokens together; None if not measured.
        kl_divergence: that of `LoRAExport` if only this linear is exported; None if not measured.
        loss: mean loss over the label tokens if only this linear is exported; None if not measured, or without labels.
    """

    layer: str
    rank: int
    gates: list[float]
    relative_error: float | None
    kl_divergence: float | None
    loss: float | None


@dataclass(frozen=True)
class LoRAExport:
    """What `export_lora` wrote, and how far it is from the mixture; None where nothing was measured.

    Attributes:
        output: the folder.
        adapter: name of the adapter.
        gates: "uniform", "mean", "groups" or "experts".
        task_type: index of the task type whose tokens the mean gates are of; None for all.
        rank: the largest rank.
        vllm_max_lora_rank: the smallest ``--max-lora-rank`` of vLLM that is enough; None if its largest is not.
        layers: the exported linears.
        tokens: real tokens whose next-token distributions were compared.
        relative_error: as in `LayerExport`, over all layers together.
        kl_divergence: mean KL divergence, in nats, of the LoRA's next-token distribution from the mixture's.
        kl_without: the same of the model without the adapter: what there is to lose.
        loss: mean loss over the label tokens: "mixture", "export" and "without" the adapter; None also without labels.
        max_kl_share: the threshold on ``kl_divergence / kl_without``.
        poor: whether it is exceeded.
    """

    output: str
    adapter: str
    gates: str
    task_type: int | None
    rank: int
    vllm_max_lora_rank: int | None
    layers: list[LayerExport]
    tokens: int
    relative_error: float | None
    kl_divergence: float | None
    kl_without: float | None
    loss: dict[str, float] | None
    max_kl_share: float
    poor: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists, ready for JSON."""
        return asdict(self)


class Measured:
    """Sums over the calibration data, for the mixture and for what stands in its place.

    The keys of `kl` and `loss` are "mixture", "export" (all LoRAs), "without" (no adapter), and the layers (only its LoRA).
    """

    def __init__(self) -> None:
        self.error = OutputError()
        self.tokens = self.labels = 0
        self.kl: dict[Any, float] = defaultdict(float)
        self.loss: dict[Any, float] = defaultdict(float)

    def mean_kl(self, key: Any) -> float | None:
        """The mean over tokens; None if it was not measured."""
        return self.kl[key] / self.tokens if key in self.kl else None

    def mean_loss(self, key: Any) -> float | None:
        """The mean over label tokens; None if it was not measured."""
        return self.loss[key] / self.labels if key in self.loss else None


def measure(
    model: nn.Module,
    adapter: Adapter,
    batches: list[CalibrationBatch],
    loras: Mapping[LoRAMoELinear, Factors],
    each_layer: bool,
    title: str | None,
) -> Measured:
    """Compare mixture and LoRAs: each layer on what it reads in the true model, and the distributions that come out.

    Raises:
        ValueError: the model's output has no logits.
    """
    measured = Measured()

    def visit(layer: LoRAMoELinear, x: Tensor, task_types: Tensor) -> None:
        measured.error.add(layer.name, layer.loramoe_experts[adapter.name](x)[0], _apply(loras[layer], x))

    visit_inputs(model, adapter, batches, visit, title and f"{title} outputs")
    replacements = {"export": loras, "without": dict.fromkeys(loras)}
    if each_layer:
        replacements |= {layer: {layer: lora} for layer, lora in loras.items()}
    with evaluation_mode(model):
        for batch in tqdm(batches, desc=title and f"{title} distributions", disable=title is None):
            mixture, loss = _next_token(model, batch)
            losses = {"mixture": loss}
            for key, replacement in replacements.items():
                with _replaced(adapter, replacement):
                    logits, losses[key] = _next_token(model, batch)
                measured.kl[key] += _kl_divergence(mixture, logits)
            measured.tokens += len(mixture)
            if batch.labels and loss is not None:
                measured.labels += batch.labels
                for key, loss in losses.items():
                    measured.loss[key] += loss.item() * batch.labels
    return measured


def make_report(
    output: str,
    adapter: Adapter,
    gates: str,
    task_type: int | None,
    by_layer: Mapping[str, Tensor],
    loras: Mapping[LoRAMoELinear, Factors],
    measured: Measured,
    max_kl_share: float,
) -> LoRAExport:
    """Gather what was done and what was measured."""
    layers = [
        LayerExport(
            layer.name,
            A.shape[0],
            by_layer[layer.name].tolist(),
            measured.error.of(layer.name),
            measured.mean_kl(layer),
            measured.mean_loss(layer),
        )
        for layer, (A, _) in loras.items()
    ]
    rank = max(layer.rank for layer in layers)
    kl, kl_without = measured.mean_kl("export"), measured.mean_kl("without")
    losses = {key: measured.mean_loss(key) for key in ("mixture", "export", "without")}
    return LoRAExport(
        output=output,
        adapter=adapter.name,
        gates=gates,
        task_type=task_type,
        rank=rank,
        vllm_max_lora_rank=next((limit for limit in VLLM_RANKS if limit >= rank), None),
        layers=layers,
        tokens=measured.tokens,
        relative_error=measured.error.of(),
        kl_divergence=kl,
        kl_without=kl_without,
        loss=losses if measured.labels else None,
        max_kl_share=max_kl_share,
        # not a divergence that is not a number either
        poor=None if kl is None else not kl <= max(ROUNDING, max_kl_share * kl_without),
    )


def print_report(report: LoRAExport) -> None:
    """Print an export's errors as a table.

    Raises:
        ImportError: rich is not installed.
    """
    console_class, table_class = import_rich()
    table = table_class(title=f"Plain LoRA of '{report.adapter}', {report.gates} gates")
    for column in ("layer", "rank", "gates", "relative error", "KL", "loss"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in report.layers:
        gates = " ".join(f"{gate:.2f}" for gate in layer.gates)
        numbers = map(_number, (layer.relative_error, layer.kl_divergence, layer.loss))
        table.add_row(layer.layer, str(layer.rank), gates, *numbers)
    table.add_section()
    loss = None if report.loss is None else report.loss["export"]
    table.add_row("all", f"<= {report.rank}", "", *map(_number, (report.relative_error, report.kl_divergence, loss)))
    console = console_class()
    console.print(table)
    console.print("\n".join(_summary(report)), highlight=False)


def import_rich() -> tuple[type, type]:
    """Rich's `Console` and `Table`.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The report is printed with rich: pip install rich, or pass show=False.") from error
    return Console, Table


def write_lora_card(path: Path, report: LoRAExport, adapter: Adapter) -> None:
    """Write the model card of the exported LoRA: what it is, and how far from the mixture."""
    base_model = adapter.config.base_model_name_or_path
    if base_model and not is_hub_name(base_model):
        base_model = None
    data = ModelCardData(library_name="peft", base_model=base_model or None, tags=["lora", "loramoe"])
    of_type = "" if report.task_type is None else f", of task type {report.task_type}"
    text = (
        "A LoRAMoE mixture exported to plain LoRA by peft_loramoe: its gates are fixed "
        f"({report.gates}{of_type}), where the mixture's router decided for every token."
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n" + "\n\n".join(_summary(report)) + "\n").save(path)


def warn(report: LoRAExport) -> None:
    """Warn of a poor approximation, and of one that was not measured."""
    if report.kl_divergence is None:
        warnings.warn(
            f"The error of the LoRA in '{report.output}' is unmeasured, for no calibration data was given. Pass calibration to "
            "know how far it is from the mixture."
        )
    elif report.poor:
        warnings.warn(
            f"The LoRA in '{report.output}' is a poor approximation of the mixture: the KL divergence between them, "
            f"{report.kl_divergence:.3g} nats, is more than max_kl_share={report.max_kl_share} of what leaving the adapter out "
            f"would cause, {report.kl_without:.3g}. Try gates='mean', one export for each task_type, or a larger rank; or keep "
            "the mixture."
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _summary(report: LoRAExport) -> list[str]:
    if report.kl_divergence is None:
        return ["The error of this approximation is unmeasured: no calibration data was given."]
    lines = [
        f"KL divergence of the next-token distributions from the mixture's, mean over {report.tokens} tokens: "
        f"{_number(report.kl_divergence)} nats (without the adapter: {_number(report.kl_without)}).",
        f"Relative error of the layers' outputs: {_number(report.relative_error)}.",
    ]
    if report.loss is not None:
        loss = {name: _number(value) for name, value in report.loss.items()}
        lines.append(f"Loss: {loss['export']} (mixture: {loss['mixture']}, without the adapter: {loss['without']}).")
    if report.poor:
        lines.append(f"A poor approximation: it loses more than {report.max_kl_share:.0%} of the adapter's effect, as KL.")
    return lines


def _apply(lora: Factors, x: Tensor) -> Tensor:
    A, B = lora
    return x @ A.to(x.dtype).T @ B.to(x.dtype).T


@contextmanager
def _replaced(adapter: Adapter, loras: Mapping[LoRAMoELinear, Factors | None]) -> Iterator[None]:
    """Silence the mixtures of these layers, and put the LoRAs in their place; None for nothing."""
    scales = {layer: layer.scaling[adapter.name] for layer in loras}

    def add(layer: LoRAMoELinear, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["x"]
        return output + _apply(loras[layer], x.to(torch.promote_types(x.dtype, torch.float32))).to(output.dtype)

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
            f"The output of {type(model).__name__} has no logits to compare. Load the model with its head, or pass "
            "calibration=None."
        )
    real = batch.tokens.samples(tuple(logits.shape[:-1]), "lm_head", batch.task_types, logits.device).real
    return logits.flatten(0, -2)[real], getattr(output, "loss", None)


def _kl_divergence(true: Tensor, other: Tensor) -> float:
    """Sum over tokens of the KL divergence of `other` from `true`; logits of shape (T, classes)."""
    total = 0.0
    for p, q in zip(true.split(TOKENS_AT_A_TIME), other.split(TOKENS_AT_A_TIME)):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum().item()  # some models mask classes
    return total
