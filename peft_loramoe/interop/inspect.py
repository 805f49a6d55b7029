"""Summarize a saved adapter from its files: its experts, their norms and their similarity."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..analysis.names import natural_order
from ..config import LoRAMoEConfig
from ..groups import ExpertGroups
from ..ops.similarity import cosines, inner_products
from .files import EXPERT_KEY, experts_by_module, read_adapter


@dataclass(frozen=True)
class ExpertSummary:
    """An expert of the layers that have the default number of experts.

    Attributes:
        group: index of its group.
        task_type: name of its group, if groups have names.
        null: whether it is a null expert.
    """

    group: int
    task_type: str | None
    null: bool


@dataclass(frozen=True)
class LayerSummary:
    """The experts of a linear.

    Attributes:
        layer: name inside the base model.
        expert_groups: sizes of the groups.
        r: rank of each expert.
        scaling: scaling of the experts' output.
        norms: Frobenius norm of ``scaling * B_i A_i`` of each expert; None for null experts.
        similarity: cosine of ``B_i A_i`` and ``B_j A_j`` as vectors; None if either is null or zero.
    """

    layer: str
    expert_groups: list[int]
    r: int
    scaling: float
    norms: list[float | None]
    similarity: list[list[float | None]]


@dataclass(frozen=True)
class AdapterSummary:
    """Result of `inspect_adapter`.

    Attributes:
        source: folder or Hub id.
        config: the options by name.
        parameters: number of parameters in all tensors.
        bytes: size of all tensors.
        dtypes: dtypes of the tensors.
        experts: the experts.
        layers: the adapted linears.
        norms: as in `LayerSummary`, over the concatenated matrices of all layers; None if the layers differ in their
            groups.
        similarity: as in `LayerSummary`, likewise.
        other_tensors: tensors outside of the experts (`modules_to_save`, trained tokens, biases).
    """

    source: str
    config: dict[str, Any] = field(repr=False)
    parameters: int
    bytes: int
    dtypes: list[str]
    experts: list[ExpertSummary] = field(repr=False)
    layers: list[LayerSummary] = field(repr=False)
    norms: list[float | None] | None
    similarity: list[list[float | None]] | None = field(repr=False)
    other_tensors: list[str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def inspect_adapter(source: str | Path) -> AdapterSummary:
    """Summarize a LoRAMoE adapter from its files, without the base model and without building full-size matrices.

    Args:
        source: adapter folder or Hub id.

    Raises:
        FileNotFoundError: `source` or a file in it does not exist.
        ValueError: the adapter is not one of this package, a file is damaged, or a tensor does not fit the
            configuration.

    Example:
        >>> tiny_model(num_experts=4).save_pretrained("adapter")
        >>> summary = inspect_adapter("adapter")
        >>> len(summary.layers), len(summary.experts), summary.layers[0].r
        (6, 4, 2)
    """
    options, tensors = read_adapter(source)
    config = loramoe_config(source, options)
    layers, products = [], []
    for module, parts in sorted(experts_by_module(tensors).items(), key=lambda item: natural_order(item[0])):
        layer, inner = _layer(config, module, parts)
        layers.append(layer)
        products.append(inner)
    first = config.groups_of(layers[0].layer)
    same = all(config.groups_of(layer.layer) == first for layer in layers)
    norms, similarity = _norms_and_cosines(sum(products[1:], products[0]), first) if same else (None, None)
    names, groups = config.task_type_names, config.groups_of()
    return AdapterSummary(
        source=str(source),
        config={key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()},
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        experts=[
            ExpertSummary(group, names[group] if names else None, group in groups.null) for group in groups.of_experts
        ],
        layers=layers,
        norms=norms,
        similarity=similarity,
        other_tensors=sorted(key for key in tensors if not EXPERT_KEY.fullmatch(key)),
    )


def loramoe_config(source: str | Path, options: dict[str, Any]) -> LoRAMoEConfig:
    """The LoRAMoEConfig of an adapter from the options in its file.

    Raises:
        ValueError: the adapter belongs to another method or program.
    """
    if (peft_type := options.get("peft_type")) != "LORAMOE":
        fix = " (use `convert` for adapters of the LoRAMoE authors, and `upcycle` to turn plain LoRAs into experts)"
        raise ValueError(f"'{source}' has peft_type={peft_type!r}, not 'LORAMOE'{fix if peft_type == 'LORA' else ''}.")
    return cast("LoRAMoEConfig", LoRAMoEConfig.from_peft_type(**options))


def _layer(config: LoRAMoEConfig, module: str, parts: dict[str, Tensor]) -> tuple[LayerSummary, Tensor]:
    """The summary of a linear, and the inner products of its scaled matrices, shape (E, E)."""
    groups, r, scaling = config.groups_of(module), config.rank_of(module), config.mixture_options(module).scaling
    lora_channels = len(groups.lora_experts) * r
    A, B, router = (parts[name].double() for name in ("A", "B", "router"))
    for name, found, wanted in (
        ("rows of A", A.shape[0], lora_channels),
        ("columns of B", B.shape[-1], lora_channels),
        ("rows of the router", router.shape[0], groups.num_experts),
    ):
        if found != wanted:
            raise ValueError(
                f"'{module}' has {found} {name}, but adapter_config.json implies {wanted} (groups "
                f"{list(groups.sizes)}, null_groups={config.null_groups}, r={r}): the files do not belong together."
            )
    if not all(tensor.isfinite().all() for tensor in (A, B, router)):
        warnings.warn(f"'{module}' has values that are not finite: training diverged, or the file is damaged.")
    inner = scaling**2 * inner_products(A, B, r)
    return LayerSummary(module, list(groups.sizes), r, scaling, *_norms_and_cosines(inner, groups)), inner


def _norms_and_cosines(inner: Tensor, groups: ExpertGroups) -> tuple[list[float | None], list[list[float | None]]]:
    """Norms and cosines of all experts, null ones included, from the LoRA experts' inner products (E, E)."""
    norms, similarity = inner.diagonal().clamp(min=0).sqrt(), cosines(inner)
    place = {expert: i for i, expert in enumerate(groups.lora_experts)}
    place = [place.get(expert) for expert in range(groups.num_experts)]

    def number(value: Tensor) -> float | None:
        return value.item() if math.isfinite(value) else None

    return (
        [None if i is None else number(norms[i]) for i in place],
        [[None if i is None or j is None else number(similarity[i, j]) for j in place] for i in place],
    )
