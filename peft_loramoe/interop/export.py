"""Approximate a mixture by a plain LoRA with fixed gates, and measure the error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..balance.samples import task_type_tensor
from ..layer import LoRAMoELinear
from .calibration import Adapter, CalibrationBatch, find_adapter, mean_gates, prepare
from .export_report import Factors, LoRAExport, Measured, import_rich, make_report, measure, print_report, warn, write_lora_card
from .files import PREFIX, new_folder, write_adapter


GATES = ("uniform", "mean", "groups", "experts")
REPORT = "export_report.json"


def export_lora(
    model: nn.Module,
    output: str | os.PathLike[str],
    *,
    gates: str = "uniform",
    weights: Sequence[float] | None = None,
    task_type: int | str | None = None,
    rank: int | float | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
    max_kl_share: float = 0.1,
    each_layer: bool = True,
    show: bool = True,
) -> LoRAExport:
    """Fix the gates of a mixture and save it as a plain LoRA, which stock PEFT loads without this package.

    With fixed gates g the mixture ``s * sum_i g_i B_i A_i x`` is one LoRA of rank E*r: the A_i stacked, and the B_i side by
    side, each times ``s * g_i``. Null experts have no part in it; their gate is lost, as in the mixture, so that the others'
    do not sum to one. The approximation lies in the gates alone (and in the rank, if it is truncated): the router no longer
    decides for each token. The error is measured on the calibration data, with the tensors as they are saved.

    The folder is in the form that vLLM (``--enable-lora``) reads, by its source code; that was not tried. vLLM takes one scale
    for all layers and reads no `rank_pattern`: so the scale is 1 everywhere (``lora_alpha = r``), and `r` is the largest rank.
    ``--max-lora-rank``, 16 by default, must be at least that, one of 1, 8, 16, 32, 64, 128, 256, 320 and 512. vLLM refuses
    `modules_to_save` and trained tokens, which an adapter that has them keeps here, and linears that it does not adapt.

    Args:
        model: a PeftModel with the adapter.
        output: folder to create.
        gates: "uniform": 1/N each; "mean": the mean gates over the calibration data, layer by layer, after top-k selection
            where the adapter has one; "groups": `weights` of the groups, each shared evenly among its experts; "experts":
            `weights` of the experts, null experts included.
        weights: not negative; divided by their sum.
        task_type: index or name; the mean gates are taken over the tokens of that type. The error is measured on all the
            calibration data: pass only samples of that type to know it for them.
        rank: truncate to this rank by singular value decomposition; a float in (0, 1] is the share of the squared singular
            values to keep, layer by layer. A layer whose exact rank E*r is no larger keeps it; None: all do.
        calibration: keyword arguments of the model, batch by batch: `input_ids`, `attention_mask`, `labels` (the input ids if a
            causal language model is given none), `task_types`. None: nothing is measured, which is said in a warning.
        adapter_name: None for the only or the active one.
        max_kl_share: warn if the KL divergence to the mixture is more than this share of the one that leaving the adapter out
            would cause. It grows with the square of the change in the logits: at 0.1, about a third (0.32) of what the adapter
            does to them is wrong. Divergences below 1e-4 nats, the size of bfloat16's rounding, are never poor.
        each_layer: measure divergence and loss with one linear exported at a time too, one pass over the data for each. False
            leaves it at the linears' output errors and the whole export.
        show: print the report as a table (needs rich).

    Returns:
        The report; it is also written to the folder, as ``export_report.json`` and, in short, into the model card.

    Raises:
        FileExistsError: `output` exists.
        ValueError: options that contradict each other or do not fit the adapter; an adapter that trains biases; a model whose
            output has no logits, with calibration data.
        ImportError: `show` without rich.
    """
    if show:
        import_rich()
    with new_folder(output) as folder:
        adapter = find_adapter(model, adapter_name)
        _check_adapter(adapter, rank)
        batches = prepare(model, adapter, calibration)
        title = "Measuring" if show else None
        task_type = _check_gates(gates, weights, task_type, adapter, batches)
        if gates == "mean":
            by_layer = mean_gates(model, adapter, batches, task_type, title)
        else:
            by_layer = {layer.name: _given_gates(layer, adapter.name, gates, weights) for layer in adapter.layers}
        loras = _factors(adapter, by_layer, rank)
        measured = measure(model, adapter, batches, loras, each_layer, title) if batches else Measured()
        report = make_report(str(output), adapter, gates, task_type, by_layer, loras, measured, max_kl_share)
        write_adapter(folder, _lora_config(model, adapter, loras), {**_lora_keys(loras), **_other_tensors(model, adapter)})
        Path(folder, REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_lora_card(Path(folder, "README.md"), report, adapter)
    if show:
        print_report(report)
    warn(report)
    return report


def _check_adapter(adapter: Adapter, rank: int | float | None) -> None:
    if adapter.config.bias != "none":
        raise ValueError(
            f"Adapter '{adapter.name}' has bias='{adapter.config.bias}': an export would lose the biases that it trained."
        )
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"rank={rank!r} must be an integer, a float in (0, 1], or None.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank={rank}: a float is the share of the squared singular values to keep, in (0, 1].")
    if isinstance(rank, int):
        exact = max(layer.loramoe_experts[adapter.name].A.shape[0] for layer in adapter.layers)
        if not 0 < rank < exact:
            raise ValueError(f"rank={rank} must be at least 1 and less than the exact rank, {exact}; None keeps that.")


def _check_gates(
    gates: str,
    weights: Sequence[float] | None,
    task_type: int | str | None,
    adapter: Adapter,
    batches: list[CalibrationBatch],
) -> int | None:
    """The task type as an index."""
    if gates not in GATES:
        raise ValueError(f"gates={gates!r} is not one of {', '.join(map(repr, GATES))}.")
    if (weights is not None) != (gates in ("groups", "experts")):
        raise ValueError(f"gates='{gates}' with weights={weights}: 'groups' and 'experts' need weights, the others take none.")
    if weights is not None and not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
        raise ValueError(f"weights={list(weights)} must be finite, not negative, and not all zero.")
    if gates == "mean" and not batches:
        raise ValueError("gates='mean' is measured on calibration data: pass calibration, or use gates='uniform'.")
    if task_type is None:
        return None
    if gates != "mean":
        raise ValueError(f"task_type={task_type!r} has no effect with gates='{gates}'; it goes with gates='mean'.")
    return int(task_type_tensor([task_type], adapter.config.num_groups, adapter.config.task_type_names)[0])


def _given_gates(layer: LoRAMoELinear, adapter: str, gates: str, weights: Sequence[float] | None) -> Tensor:
    """The gate of each router output of one layer, shape (N,), float32."""
    experts = layer.loramoe_experts[adapter]
    sizes = list(experts.groups.sizes)
    if gates == "uniform":
        return torch.full((experts.num_experts,), 1 / experts.num_experts)
    wanted = len(sizes) if gates == "groups" else experts.num_experts
    if len(weights) != wanted:
        raise ValueError(f"weights={list(weights)} are {len(weights)}, but layer '{layer.name}' has {wanted} {gates}.")
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    if gates == "groups":
        shares = (shares / torch.tensor(sizes)).repeat_interleave(torch.tensor(sizes))
    if not shares[list(experts.options.experts)].any():
        raise ValueError(f"weights={list(weights)} leave no weight to the experts of '{layer.name}' that are not null.")
    return shares.float()


@torch.no_grad()
def _factors(adapter: Adapter, gates: Mapping[str, Tensor], rank: int | float | None) -> dict[LoRAMoELinear, Factors]:
    """A and B of each layer's LoRA of scale 1, in the dtype of the adapter.

    Args:
        adapter: the mixture.
        gates: layer name -> gate of each router output, shape (N,).
        rank: as in `export_lora`.
    """
    loras: dict[LoRAMoELinear, Factors] = {}
    for layer in adapter.layers:
        experts = layer.loramoe_experts[adapter.name]
        of_lora_experts = gates[layer.name][list(experts.options.experts)].to(experts.B.device, torch.float64)
        A, B = experts.A.double(), experts.B.double()
        B = B * (of_lora_experts * experts.scaling).repeat_interleave(experts.r)
        if rank is not None and (isinstance(rank, float) or len(A) > rank):
            if rank > (limit := min(layer.in_features, layer.out_features)):
                raise ValueError(f"rank={rank} is more than layer '{layer.name}' can have ({limit}); choose a smaller one.")
            shorter = _truncate(A, B, rank)
            A, B = shorter if len(shorter[0]) < len(A) else (A, B)
        loras[layer] = A.to(experts.B.dtype), B.to(experts.B.dtype)
    return loras


def _truncate(A: Tensor, B: Tensor, rank: int | float) -> Factors:
    """The best approximation of ``B A`` of that rank, or with that share of the squared singular values, as two factors."""
    # Through the triangular factors: no matrix of the layer's own size is decomposed.
    (left, R_left), (right, R_right) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T)
    kept = rank
    if isinstance(rank, float):
        shares = S.square().cumsum(0) / S.square().sum().clamp(min=torch.finfo(S.dtype).tiny)
        kept = min(int((shares < rank).sum()) + 1, len(S))
    root = S[:kept].sqrt()
    return root[:, None] * (Vh[:kept] @ right.T), left @ U[:, :kept] * root


def _lora_keys(loras: Mapping[LoRAMoELinear, Factors]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{layer.name}.lora_{part}.weight": tensor for layer, both in loras.items() for part, tensor in zip("AB", both)
    }


def _other_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What the adapter saves beside its experts (`modules_to_save`, trained tokens), under the same names."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter.name)
    return {key: tensor for key, tensor in saved.items() if ".loramoe_experts." not in key}


def _lora_config(model: nn.Module, adapter: Adapter, loras: Mapping[LoRAMoELinear, Factors]) -> LoraConfig:
    """The configuration under which stock PEFT puts a LoRA of scale 1 on exactly these layers."""
    ranks = {layer.name: A.shape[0] for layer, (A, _) in loras.items()}
    r = max(ranks.values())
    pattern = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items() if rank != r}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside = tuple(f"{layer.name}." for layer in adapter.layers)
    others = [name for name, _ in base.named_modules() if name not in ranks and not name.startswith(inside)]
    targets = {name.rpartition(".")[2] for name in ranks}
    if any(name.rpartition(".")[2] in targets for name in others):
        targets = set(ranks)  # the last part of the names says too little
    config = adapter.config
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets,
        # PEFT compares names from their end
        exclude_modules=[name for name in others if name.endswith(tuple(f".{target}" for target in targets))] or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=all(isinstance(layer.get_base_layer(), Conv1D) for layer in loras),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
