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

from ..balance.task_types import task_type_tensor
from ..layer import LoRAMoEBlock, LoRAMoELayer
from .calibration import Adapter, CalibrationBatch, find_adapter, mean_gates, prepare
from .export_error import Factors, Measured, measure
from .export_report import LoRAExport, make_report, print_report, warn, write_lora_card
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
    """Approximate a mixture by a plain LoRA that PEFT loads without this package.

    With fixed gates g, the mixture ``s * sum_i g_i B_i A_i x`` is one LoRA of rank E*r: the A_i are stacked, and the
    B_i, multiplied by ``s * g_i``, stand side by side. This is exact except for the gates, which no longer depend on
    the token, and for the rank if it is truncated. The gate of a null expert is dropped, as in the mixture. The error
    is measured on the calibration data with the tensors as they are saved.

    vLLM serves the folder with the answers of PEFT (``--enable-lora``, docs/serving.md). For versions that ignore
    `rank_pattern`, the scaling is 1 everywhere (``lora_alpha=r``) and `r` is the largest rank. vLLM's
    ``--max-lora-rank``, 16 by default, must be at least `r`; see `LoRAExport.vllm_max_lora_rank`. vLLM rejects
    `modules_to_save` and trained tokens, which are exported if the adapter has them, and linears that it does not
    adapt.

    Args:
        model: a PeftModel with the adapter.
        output: folder to create.
        gates: "uniform": 1/N each; "mean": the mean gates of each layer over the calibration data, after top-k
            selection; "groups": `weights` of the groups, each split evenly among its experts; "experts": `weights` of
            the experts, null experts included.
        weights: nonnegative numbers; they are divided by their sum.
        task_type: index or name of the task type over whose tokens the mean gates are taken. The error is still
            measured on all calibration data; pass samples of one type to measure it for that type.
        rank: truncate to this rank by singular value decomposition. A float in (0, 1] is the share of the squared
            singular values that each layer keeps. Layers never exceed their exact rank E*r, which None keeps.
        calibration: batches of keyword arguments of the model: `input_ids`, `attention_mask`, `task_types` and
            `labels`, which default to the input ids in causal language models. None measures nothing and warns.
        adapter_name: which adapter; None for the only or the active one.
        max_kl_share: warn if the KL divergence from the mixture exceeds this share of the divergence of the model
            without the adapter. The divergence grows with the square of the change in the logits, so 0.1 means that
            about a third (0.32) of the adapter's change is lost. Divergences below 1e-4 nats, the size of bfloat16
            rounding, never warn.
        each_layer: also measure divergence and loss with a single linear exported, for each linear. This takes one
            more pass over the data per linear.
        show: print the report as a table.

    Returns:
        The report. It is also saved in the folder as ``export_report.json`` and summarized in the model card.

    Raises:
        FileExistsError: `output` exists.
        ValueError: the options contradict each other or do not fit the adapter, the adapter trains biases, or the
            model's output has no logits to measure.

    Example:
        >>> batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
        >>> model = tiny_model(r=2, num_experts=4)
        >>> report = export_lora(model, "plain-lora", gates="mean", calibration=[batch], show=False)
        >>> report.rank, report.vllm_max_lora_rank
        (8, 8)
    """
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
        write_adapter(
            folder, _lora_config(model, adapter, loras), {**_lora_keys(loras), **_other_tensors(model, adapter)}
        )
        Path(folder, REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_lora_card(Path(folder, "README.md"), report, adapter)
        exact = all(len(A) == layer.loramoe_experts[adapter.name].A.shape[0] for layer, (A, _) in loras.items())
    if show:
        print_report(report)
    warn(report, exact)
    return report


def _check_adapter(adapter: Adapter, rank: int | float | None) -> None:
    if adapter.config.bias != "none":
        raise ValueError(
            f"Adapter '{adapter.name}' has bias='{adapter.config.bias}'; an export would lose the biases. Only "
            "bias='none' can be exported."
        )
    if blocks := [layer.name for layer in adapter.layers if isinstance(layer, LoRAMoEBlock)]:
        raise ValueError(
            f"Adapter '{adapter.name}' has mixtures beside whole blocks ({', '.join(blocks[:3])}), and a plain LoRA "
            "adapts linear layers only. Such an adapter cannot be exported."
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
            raise ValueError(
                f"rank={rank} must be at least 1 and less than the exact rank, {exact}; leave it out to keep that."
            )


def _check_gates(
    gates: str,
    weights: Sequence[float] | None,
    task_type: int | str | None,
    adapter: Adapter,
    batches: list[CalibrationBatch],
) -> int | None:
    """Validate the options of the gates and return the task type as an index."""
    if gates not in GATES:
        raise ValueError(f"gates={gates!r} is not one of {', '.join(map(repr, GATES))}.")
    if (weights is not None) != (gates in ("groups", "experts")):
        raise ValueError(
            f"gates='{gates}' with weights={weights}: 'groups' and 'experts' need weights, the others take none."
        )
    if weights is not None and not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
        raise ValueError(f"weights={list(weights)} must be finite, not negative, and not all zero.")
    if gates == "mean" and not batches:
        raise ValueError("gates='mean' needs calibration data: pass calibration, or use gates='uniform'.")
    if task_type is None:
        return None
    if gates != "mean":
        raise ValueError(f"task_type={task_type!r} has no effect with gates='{gates}'; use gates='mean'.")
    return int(task_type_tensor([task_type], adapter.config.num_groups, adapter.config.task_type_names)[0])


def _given_gates(layer: LoRAMoELayer, adapter: str, gates: str, weights: Sequence[float] | None) -> Tensor:
    """The gate of each router output of one layer, shape (N,), float32."""
    experts = layer.loramoe_experts[adapter]
    sizes = list(experts.groups.sizes)
    if gates == "uniform":
        return torch.full((experts.num_experts,), 1 / experts.num_experts)
    assert weights is not None  # as checked before
    wanted = len(sizes) if gates == "groups" else experts.num_experts
    if len(weights) != wanted:
        raise ValueError(
            f"weights={list(weights)} has {len(weights)} entries, but layer '{layer.name}' has {wanted} {gates}."
        )
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    if gates == "groups":
        shares = (shares / torch.tensor(sizes)).repeat_interleave(torch.tensor(sizes))
    if not shares[list(experts.options.experts)].any():
        raise ValueError(f"weights={list(weights)} leave no weight to the LoRA experts of '{layer.name}'.")
    return shares.float()


@torch.no_grad()
def _factors(adapter: Adapter, gates: Mapping[str, Tensor], rank: int | float | None) -> dict[LoRAMoELayer, Factors]:
    """A and B of each layer's LoRA with scaling 1, in the dtype of the adapter.

    Args:
        adapter: the mixture.
        gates: layer name -> gate of each router output, shape (N,).
        rank: as in `export_lora`.
    """
    loras: dict[LoRAMoELayer, Factors] = {}
    for layer in adapter.layers:
        experts = layer.loramoe_experts[adapter.name]
        of_lora_experts = gates[layer.name][list(experts.options.experts)].to(experts.B.device, torch.float64)
        A, B = experts.A.double(), experts.B.double()
        B = B * (of_lora_experts * experts.scaling).repeat_interleave(experts.r)
        if rank is not None and (isinstance(rank, float) or len(A) > rank):
            if rank > (limit := min(layer.in_features, layer.out_features)):
                raise ValueError(
                    f"rank={rank} exceeds the full rank of layer '{layer.name}' ({limit}); choose a smaller one."
                )
            shorter = _truncate(A, B, rank)
            A, B = shorter if len(shorter[0]) < len(A) else (A, B)
        loras[layer] = A.to(experts.B.dtype), B.to(experts.B.dtype)
    return loras


def _truncate(A: Tensor, B: Tensor, rank: int | float) -> Factors:
    """Approximate ``B A`` with this rank, or this share of the squared singular values, as two factors."""
    # Decompose the triangular factors, which are small, instead of the product.
    (left, R_left), (right, R_right) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T)
    kept = rank
    if isinstance(rank, float):
        shares = S.square().cumsum(0) / S.square().sum().clamp(min=torch.finfo(S.dtype).tiny)
        kept = min(int((shares < rank).sum()) + 1, len(S))
    root = S[:kept].sqrt()
    return root[:, None] * (Vh[:kept] @ right.T), left @ U[:, :kept] * root


def _lora_keys(loras: Mapping[LoRAMoELayer, Factors]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{layer.name}.lora_{part}.weight": tensor
        for layer, both in loras.items()
        for part, tensor in zip("AB", both)
    }


def _other_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Tensors that the adapter saves beside its experts: `modules_to_save` and trained tokens."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter.name)
    return {key: tensor for key, tensor in saved.items() if ".loramoe_experts." not in key}


def _lora_config(model: nn.Module, adapter: Adapter, loras: Mapping[LoRAMoELayer, Factors]) -> LoraConfig:
    """The configuration with which PEFT adapts exactly these layers by a LoRA with scaling 1."""
    ranks = {layer.name: A.shape[0] for layer, (A, _) in loras.items()}
    r = max(ranks.values())
    pattern = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items() if rank != r}
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    inside = tuple(f"{layer.name}." for layer in adapter.layers)
    others = [name for name, _ in base.named_modules() if name not in ranks and not name.startswith(inside)]
    targets: Any = {name.rpartition(".")[2] for name in ranks}  # PEFT keeps lists as sets
    if any(name.rpartition(".")[2] in targets for name in others):
        targets = set(ranks)  # the last part of the name is ambiguous
    config = adapter.config
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets,
        # PEFT matches suffixes of names
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
