"""A saved adapter as engines with LoRA slots hold it: two matrices per linear, the router among the rows of the first.

A LoRAMoE layer is a LoRA of rank E*r whose rank channels are gated. So its router can sit in the same slot: the first
matrix is ``[A; router / temperature]``, the second ``[B, 0]``, and between the two the last rank channels, which are
the logits, become the gates of the first E*r.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..config import LoRAMoEConfig
from ..interop.files import abbreviate, expert_keys, experts_by_module, read_adapter
from ..ops import MixtureOptions, reference


# Significant bits of a float32, and of the dtypes that a slot may have.
FLOAT32_BITS = 24
UNCERTAIN = 1e-4  # difference of two router probabilities that rounding may turn around
BITS = {torch.float32: FLOAT32_BITS, torch.bfloat16: 8, torch.float16: 11}


class SlotLayout(NamedTuple):
    """Where the mixture of one linear lies in its slot, and how it is gated.

    Attributes:
        experts: router outputs that have parameters, ascending; the others are null experts.
        num_experts: router outputs, N.
        r: rank of each expert.
        scaling: factor on the experts' sum.
        top_k: router outputs that each token uses; None for all.
    """

    experts: tuple[int, ...]
    num_experts: int
    r: int
    scaling: float
    top_k: int | None

    @property
    def channels(self) -> int:
        """Rank channels of the experts, E*r; the router's rows follow."""
        return len(self.experts) * self.r

    def rank(self, dtype: torch.dtype) -> int:
        """Rank of the slot that holds the layer in `dtype`."""
        return self.channels + num_parts(dtype) * self.num_experts


class SlotLayer(NamedTuple):
    """The mixture of one linear, as it was saved.

    Attributes:
        A: shape (E*r, in_features).
        B: shape (out_features, E*r).
        router: shape (N, in_features).
        options: what is fixed for the layer.
    """

    A: Tensor
    B: Tensor
    router: Tensor
    options: MixtureOptions

    @property
    def layout(self) -> SlotLayout:
        """Where it lies in a slot."""
        experts, num_experts = self.options.experts, len(self.router)
        return SlotLayout(experts, num_experts, len(self.A) // len(experts), self.options.scaling, self.options.top_k)

    def lora_a(self, dtype: torch.dtype) -> Tensor:
        """``[A; router / temperature]`` in `dtype`, the router in `num_parts` parts.

        Returns:
            Shape (rank, in_features).
        """
        return torch.cat([self.A.to(dtype), *split(self.router.float() / self.options.temperature, dtype)])

    def lora_b(self, dtype: torch.dtype) -> Tensor:
        """``[B, 0]`` in `dtype`.

        Returns:
            Shape (out_features, rank).
        """
        zeros = self.B.new_zeros(len(self.B), self.layout.rank(dtype) - self.B.shape[1])
        return torch.cat([self.B, zeros], dim=1).to(dtype)

    def reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What a slot in `dtype` is to add to the linear's output, by the formula, in float64.

        Args:
            x: shape (T, in_features).
            dtype: of the slot.

        Returns:
            Shape (T, out_features), float64.
        """
        return self._reference(x, self.A.to(dtype), self.B.to(dtype))[0]

    def is_certain(self, x: Tensor) -> Tensor:
        """Whether rounding of the logits cannot change which experts `top_k` takes, for each row of x, shape (T,)."""
        if self.options.top_k is None or self.options.top_k == len(self.router):
            return torch.ones(len(x), dtype=torch.bool)
        ranked = self._reference(x, self.A, self.B)[1].sort(dim=-1).values
        first_in = ranked.shape[-1] - self.options.top_k
        return ranked[:, first_in] - ranked[:, first_in - 1] > UNCERTAIN

    def _reference(self, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        return reference.mixture(
            x.double(),
            A.double(),
            B.double(),
            self.router.double(),
            scaling=options.scaling,
            temperature=options.temperature,
            experts=list(options.experts),
            top_k=options.top_k,
        )


def num_parts(dtype: torch.dtype) -> int:
    """Rows of a slot for each router output: as many as `dtype` needs for the bits of a float32.

    Raises:
        ValueError: slots of this dtype are not supported.
    """
    if dtype not in BITS:
        raise ValueError(f"lora_dtype={dtype} is not one of {', '.join(map(str, BITS))}; set one of these.")
    return math.ceil(FLOAT32_BITS / BITS[dtype])


def part_scales(dtype: torch.dtype) -> list[float]:
    """The factors with which the parts of `split` sum to the matrix."""
    return [2.0 ** (-BITS[dtype] * part) for part in range(num_parts(dtype))]


def split(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Parts of a matrix in `dtype` whose sum, weighted by `part_scales`, is accurate to float32.

    Each part holds what the one before left over, scaled up so that float16 does not lose it among its smallest
    numbers.

    Args:
        weight: float32.
        dtype: of the parts.

    Returns:
        `num_parts` tensors of the shape of `weight`.

    Example:
        >>> weight = torch.tensor([[0.1234567]])
        >>> parts = split(weight, torch.bfloat16)
        >>> sum(scale * part.float() for scale, part in zip(part_scales(torch.bfloat16), parts)) == weight
        tensor([[True]])
    """
    parts = []
    for _ in range(num_parts(dtype)):
        parts.append(weight.to(dtype))
        weight = (weight - parts[-1].float()) * 2.0 ** BITS[dtype]
    return parts


def read_layers(folder: str | Path) -> dict[str, SlotLayer]:
    """Read the mixtures of a saved adapter, and refuse what a slot cannot hold.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Returns:
        Module name in the base model -> its mixture.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an option cannot be served, or the tensors are damaged or do not fit the configuration; the message
            names the option or tensor.

    Example:
        >>> tiny_model(num_experts=4).save_pretrained("adapter")
        >>> layers = read_layers("adapter")
        >>> layers["model.layers.0.mlp.down_proj"].layout.rank(torch.float32)
        12
    """
    config = cast("LoRAMoEConfig", LoRAMoEConfig.from_pretrained(str(folder)))
    _refuse_options(folder, config)
    _, tensors = read_adapter(folder)
    modules = experts_by_module(tensors)
    known = {key for module in modules for key in expert_keys(module, *[torch.empty(0)] * 3)}
    if left := tensors.keys() - known:
        raise ValueError(
            f"'{folder}' holds {abbreviate(left)}, which no LoRA slot has a place for. Train with other "
            "target_modules: embeddings and output layers are saved whole with the adapter."
        )
    return {module: _layer(folder, module, parts, config) for module, parts in modules.items()}


def _refuse_options(folder: str | Path, config: LoRAMoEConfig) -> None:
    refused = [
        ("modules_to_save", config.modules_to_save, "whole modules"),
        ("trainable_token_indices", config.trainable_token_indices, "trained embeddings"),
        ("bias", None if config.bias == "none" else config.bias, "trained biases"),
    ]
    for option, value, what in refused:
        if value:
            raise ValueError(
                f"'{folder}' was trained with {option}={value!r}; a LoRA slot has no place for {what}. Train without "
                "that option to serve the adapter, or serve it with PEFT."
            )
    if config.router_dtype == "bfloat16":
        raise ValueError(
            f"'{folder}' has router_dtype='bfloat16', but slots compute the router's logits in float32, so the "
            "answers would not be PEFT's. Set router_dtype to 'float32' in adapter_config.json to have them in both."
        )
    if config.router_dtype == "float64":
        warnings.warn(f"'{folder}' has router_dtype='float64'; slots compute the router's logits in float32.")


def _layer(folder: str | Path, module: str, parts: dict[str, Tensor], config: LoRAMoEConfig) -> SlotLayer:
    options, A, B, router = config.mixture_options(module), parts["A"], parts["B"], parts["router"]
    channels = len(options.experts) * config.rank_of(module)
    expected = {
        "A": (channels, A.shape[1]),
        "B": (B.shape[0], channels),
        "router": (config.groups_of(module).num_experts, A.shape[1]),
    }
    for name, shape in expected.items():
        if tuple(parts[name].shape) != shape:
            raise ValueError(
                f"'{folder}': {name} of '{module}' has shape {tuple(parts[name].shape)}, but by adapter_config.json "
                f"(r, num_experts, expert_groups, null_groups and their patterns) it should be {shape}."
            )
        if not parts[name].isfinite().all():
            raise ValueError(f"'{folder}': {name} of '{module}' has NaN or infinity; the file is damaged.")
    return SlotLayer(A, B, router, options)
