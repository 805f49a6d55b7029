"""The report of an export: its measurements, as a table, a model card and a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from ..analysis.names import by_kind, without_prefix
from ..card import is_hub_name
from ..console import console, print_table
from ..layer import LoRAMoELayer
from .calibration import Adapter
from .export_error import Factors, Measured


# Values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# KL divergence in nats that rounding logits of ordinary size to bfloat16 causes by itself.
ROUNDING = 1e-4


@dataclass(frozen=True)
class LayerExport:
    """One exported linear.

    Attributes:
        layer: name inside the base model.
        rank: rank of its LoRA.
        gates: fixed gate of each router output, null experts included.
        relative_error: norm of the difference between the outputs of LoRA and mixture, divided by the norm of the
            mixture's output, over all real tokens; None if not measured.
        kl_divergence: as in `LoRAExport`, with only this linear exported; None if not measured.
        loss: mean loss per label token with only this linear exported; None if not measured or without labels.
    """

    layer: str
    rank: int
    gates: list[float]
    relative_error: float | None
    kl_divergence: float | None
    loss: float | None


@dataclass(frozen=True)
class LoRAExport:
    """Report of `export_lora`: what was written and how far it is from the mixture. Values not measured are None.

    Attributes:
        output: the folder.
        adapter: name of the adapter.
        gates: "uniform", "mean", "groups" or "experts".
        task_type: index of the task type over whose tokens the mean gates were taken; None for all tokens.
        rank: largest rank of any layer.
        vllm_max_lora_rank: smallest sufficient ``--max-lora-rank`` of vLLM; None if `rank` is more than vLLM's
            largest.
        layers: the exported linears.
        tokens: number of real tokens whose next-token distributions were compared.
        relative_error: as in `LayerExport`, over all layers.
        kl_divergence: mean KL divergence of the LoRA's next-token distribution from the mixture's, in nats.
        kl_without: the same for the base model without any adapter.
        loss: mean loss per label token of the "mixture", the "export" and the model "without" the adapter; None
            without labels.
        max_kl_share: threshold on ``kl_divergence / kl_without``.
        poor: whether the threshold is exceeded.

    Example:
        >>> import torch
        >>> from peft_loramoe.interop import export_lora
        >>> batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
        >>> report = export_lora(tiny_model(), "plain-lora", calibration=[batch], show=False)
        >>> report.tokens, len(report.layers)
        (6, 6)
    """

    output: str
    adapter: str
    gates: str
    task_type: int | None
    rank: int
    vllm_max_lora_rank: int | None
    layers: list[LayerExport] = field(repr=False)
    tokens: int
    relative_error: float | None
    kl_divergence: float | None
    kl_without: float | None
    loss: dict[str, float | None] | None
    max_kl_share: float
    poor: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries and lists, ready for JSON."""
        return asdict(self)


def make_report(
    output: str,
    adapter: Adapter,
    gates: str,
    task_type: int | None,
    by_layer: Mapping[str, Tensor],
    loras: Mapping[LoRAMoELayer, Factors],
    measured: Measured,
    max_kl_share: float,
) -> LoRAExport:
    """Build the report from the gates, the LoRAs and the measurements."""
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
        # NaN counts as poor
        poor=None if kl is None or kl_without is None else not kl <= max(ROUNDING, max_kl_share * kl_without),
    )


def print_report(report: LoRAExport, each_layer: bool = False) -> None:
    """Print the errors of an export as a table, by kind of linear or for each of them.

    Args:
        report: result of `export_lora`.
        each_layer: a row for each linear, with its gates. Otherwise a row for each kind of linear, with the largest
            divergence and loss that replacing a single linear of it causes.

    Example:
        >>> import torch
        >>> from peft_loramoe.interop import export_lora
        >>> batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
        >>> report = export_lora(tiny_model(), "plain-lora", calibration=[batch], show=False)
        >>> print_report(report)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        Plain LoRA of 'default', uniform gates
        ...
    """
    title = f"Plain LoRA of '{report.adapter}', {report.gates} gates"
    layers = {layer.layer: layer for layer in report.layers}
    if each_layer:
        prefix, short = without_prefix(layers)
        headers = ("linear", "rank", "gates", "relative error", "KL", "loss")
        rows = []
        for name, layer in layers.items():
            gates = " ".join(f"{gate:.2f}" for gate in layer.gates)
            numbers = map(_number, (layer.relative_error, layer.kl_divergence, layer.loss))
            rows.append((short[name], str(layer.rank), gates, *numbers))
        print_table(f"{title}: linears in {prefix}" if prefix else title, headers, rows)
        return
    rows = []
    for kind, names in by_kind(layers).items():
        ranks = sorted({layers[name].rank for name in names})
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        columns = (
            [getattr(layers[name], attribute) for name in names]
            for attribute in ("relative_error", "kl_divergence", "loss")
        )
        largest = (_number(None if None in values else max(values)) for values in columns)
        rows.append((kind, str(len(names)), rank, *largest))
    loss = None if report.loss is None else report.loss["export"]
    numbers = map(_number, (report.relative_error, report.kl_divergence, loss))
    headers = ("linear", "count", "rank", "largest relative error", "largest KL", "largest loss")
    print_table(title, headers, rows, last=("all at once", str(len(layers)), str(report.rank), *numbers))
    console().print("\n".join(_summary(report)))


def write_lora_card(path: Path, report: LoRAExport, adapter: Adapter) -> None:
    """Write the model card of the exported LoRA, with its measured error."""
    base_model = adapter.config.base_model_name_or_path
    if base_model and not is_hub_name(base_model):
        base_model = None
    data = ModelCardData(library_name="peft", base_model=base_model or None, tags=["lora", "loramoe"])
    of_type = "" if report.task_type is None else f", of task type {report.task_type}"
    text = (
        "A plain LoRA that approximates a LoRAMoE mixture, exported by peft_loramoe. Its gates are fixed "
        f"({report.gates}{of_type}); the mixture's router chooses them for each token."
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n" + "\n\n".join(_summary(report)) + "\n").save(path)


def warn(report: LoRAExport, exact: bool) -> None:
    """Warn if the approximation is poor or was not measured, and say what was not tried.

    Args:
        report: the report.
        exact: the rank was not truncated.
    """
    if report.kl_divergence is None:
        warnings.warn(
            f"The error of the LoRA in '{report.output}' is unmeasured. Pass calibration data to measure how far it "
            "is from the mixture."
        )
    elif report.poor:
        untried = [
            *(["gates='mean'"] if report.gates != "mean" else []),
            *(["one export per task_type with gates='mean'"] if report.task_type is None else []),
            *([] if exact else ["a larger rank"]),
        ]
        advice = f"Try {' or '.join(untried)}." if untried else "Fixed gates cannot follow it; use the mixture itself."
        warnings.warn(
            f"The LoRA in '{report.output}' is a poor approximation of the mixture: their KL divergence, "
            f"{report.kl_divergence:.3g} nats, exceeds max_kl_share={report.max_kl_share} of the divergence without "
            f"the adapter, {report.kl_without:.3g} nats. {advice}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _summary(report: LoRAExport) -> list[str]:
    if report.kl_divergence is None:
        return ["The error of this approximation is unmeasured: there was no calibration data."]
    lines = [
        f"KL divergence of the next-token distribution from the mixture's, mean over {report.tokens} tokens: "
        f"{_number(report.kl_divergence)} nats (without the adapter: {_number(report.kl_without)}).",
        f"Relative error of the layers' outputs: {_number(report.relative_error)}.",
    ]
    if report.loss is not None:
        loss = {name: _number(value) for name, value in report.loss.items()}
        lines.append(f"Loss: {loss['export']} (mixture: {loss['mixture']}, without the adapter: {loss['without']}).")
    if report.poor:
        lines.append(
            f"A poor approximation: the KL divergence exceeds {100 * report.max_kl_share:g} % of that without the "
            "adapter."
        )
    return lines
