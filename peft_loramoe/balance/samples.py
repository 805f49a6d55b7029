"""Which sample each token of a layer belongs to, which tokens are real, and each sample's task type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..options import shown


# Inputs whose first dimension is the batch, in the order in which they are asked for it.
BATCH_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids", "pixel_values", "input_features")
# Arguments that a recording keeps after the call. Others, like a KV cache, must not outlive it.
KEPT_INPUTS = (
    "attention_mask",
    "decoder_attention_mask",
    "labels",
    "shift_labels",
    "position_ids",
    "num_items_in_batch",
)
# Arguments whose shape tells how many tokens the layers see.
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# Linears of a decoder that read the encoder's tokens.
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
CROSS_ATTENTION_INPUT = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention).*\.(k|v|k_proj|v_proj|key|value)$"
)


@dataclass(frozen=True)
class Samples:
    """The samples that a layer's T tokens form, in M slots; a slot without real tokens is unused.

    Attributes:
        ids: the slot of each token, shape (T,), int64.
        real: False for padding, shape (T,), bool.
        task_types: shape (M,), int64, -1 for unknown.
    """

    ids: Tensor
    real: Tensor
    task_types: Tensor


def task_type_tensor(task_types: Any, num_groups: int, names: Sequence[str] | None) -> Tensor:
    """Check `task_types` as a user passed them, and turn names into group indices.

    Args:
        task_types: an integer tensor, shape (batch,) or (batch, seq), or a (nested) list of integers or names.
        num_groups: number of expert groups; valid types are 0 to num_groups - 1, and -1 for unknown.
        names: the config's `task_type_names`.

    Returns:
        int64 tensor, shape (batch,) or (batch, seq).

    Raises:
        TypeError: not integers or names.
        ValueError: unknown name, type out of range, or neither one nor two dimensions.
    """
    if not isinstance(task_types, Tensor):
        indices = _names_to_indices(task_types, names)
        try:
            task_types = torch.as_tensor(indices)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"task_types={shown(indices)} is no list of integers, all rows of one length ({error}); pass -1 for "
                "unknown."
            ) from error
    if task_types.dtype not in INTEGERS:
        raise TypeError(f"task_types has dtype {task_types.dtype}; pass integers, -1 for unknown.")
    if task_types.layout != torch.strided:
        raise TypeError(f"task_types has layout {task_types.layout}; pass a dense tensor.")
    dtype, task_types = task_types.dtype, task_types.long()  # few operations take unsigned integers
    if task_types.dim() not in (1, 2):
        raise ValueError(f"task_types has shape {tuple(task_types.shape)}; pass (batch,) or, per token, (batch, seq).")
    # Reading values waits for the device, and cannot be compiled.
    if not torch.compiler.is_compiling():
        lowest = -1 if dtype.is_signed else 0
        outside = task_types[(task_types < lowest) | (task_types >= num_groups)]
        if outside.numel():
            unknown = ", or -1 for unknown" + ("" if dtype.is_signed else f", which {dtype} cannot hold: take int64")
            raise ValueError(
                f"task_types contains {outside[0].item()}, but the adapter has {num_groups} expert groups: pass 0 to "
                f"{num_groups - 1}{unknown}."
            )
    return task_types


def _names_to_indices(task_types: Any, names: Sequence[str] | None) -> Any:
    if isinstance(task_types, (list, tuple)):
        return [_names_to_indices(entry, names) for entry in task_types]
    if task_types is None:
        raise TypeError("task_types contains None; pass -1 where a sample's type is unknown.")
    if not isinstance(task_types, str):
        return task_types
    if names is None:
        raise ValueError(
            f"task_types contains the name '{task_types}', but the config has no task_type_names; set them."
        )
    if task_types not in names:
        raise ValueError(f"task_types contains the unknown name '{task_types}'; task_type_names are {list(names)}.")
    return list(names).index(task_types)


def repeat_for_rows(task_types: Any, rows: int) -> Any:
    """Repeat the task types of a batch for a call that has its rows several times over (chosen, then rejected
    answers).

    Args:
        task_types: those of the batch, or an integer, the type of all its samples.
        rows: number of rows of the call.
    """
    if isinstance(task_types, int):
        return [task_types] * rows
    times, rest = divmod(rows, len(task_types)) if len(task_types) else (1, 0)
    if times <= 1 or rest:
        return task_types  # where they do not fit, the check of shapes says so
    return (
        task_types.repeat(times, *(1 for _ in task_types.shape[1:]))
        if isinstance(task_types, Tensor)
        else task_types * times
    )


def label_tokens(inputs: Mapping[str, Any], shifted: bool) -> Tensor | None:
    """Number of label tokens that the loss of these inputs counts, a scalar, int64; None without labels.

    Args:
        inputs: arguments of the model; `shift_labels` are counted as they are, `labels` as `shifted` says.
        shifted: the loss compares position t with label t + 1, so that the first label of a row does not count.
    """
    if isinstance(labels := inputs.get("shift_labels"), Tensor):
        return (labels != -100).sum()
    if isinstance(labels := inputs.get("labels"), Tensor):
        return ((labels[..., 1:] if shifted else labels) != -100).sum()
    return None


class Batch:
    """What one call of the model says about its tokens.

    Keeps the masks, labels and positions of the call, and of its other arguments only the shapes.

    Args:
        inputs: the call's arguments by name.
        task_types: what the user passed as `task_types`, or None.
        is_encoder_decoder: whether decoder layers see other tokens than encoder layers.

    Attributes:
        rows: number of rows of the batch; 1 if no argument is a tensor.
        inputs: the arguments that are kept, by name.
    """

    def __init__(self, inputs: Mapping[str, Any], task_types: Any, is_encoder_decoder: bool) -> None:
        self.task_types = task_types
        self.is_encoder_decoder = is_encoder_decoder
        named = (inputs.get(name) for name in BATCH_INPUTS)
        tensors = (value for value in (*named, *inputs.values()) if isinstance(value, Tensor) and value.dim() > 0)
        self.rows = next((tensor.shape[0] for tensor in tensors), 1)
        self.inputs = {name: inputs[name] for name in KEPT_INPUTS if inputs.get(name) is not None}
        self.has_labels = inputs.get("labels") is not None
        self._has_cache = inputs.get("past_key_values") is not None
        self._token_shapes = {
            name: value.shape[:2]
            for name in TOKEN_INPUTS
            if isinstance(value := inputs.get(name), Tensor) and value.dim() >= 2
        }

    def reads_decoder_tokens(self, layer: str) -> bool:
        """Whether the layer of that name sees the decoder's tokens."""
        in_decoder = "decoder" in layer or "encoder" not in layer  # the head reads the decoder's tokens too
        return self.is_encoder_decoder and in_decoder and not CROSS_ATTENTION_INPUT.search(layer)

    def samples(self, tokens: tuple[int, ...], layer: str, task_types: Tensor | None, device: torch.device) -> Samples:
        """Map the tokens of one layer to samples.

        A row of the batch is a sample. In a packed row (2-D `position_ids` that start again, or per-token task types)
        every segment is one: a sample ends where the position does not grow or the task type changes.

        Args:
            tokens: leading dimensions of the layer's input: (batch, seq), the same flattened, or (batch,) after
                pooling.
            layer: name of the layer, for encoder-decoders and for errors.
            task_types: what `task_type_tensor` returned, or None.
            device: of the result.

        Raises:
            ValueError: the tokens cannot be attributed to the rows of the batch, or `task_types` does not fit them.
        """
        real = self._real_tokens(tokens, layer).to(device)
        rows, width = real.shape
        types = torch.full((rows,), -1, device=device) if task_types is None else task_types.to(device)
        # Dimension by dimension: torch.compile does not compare symbolic sizes inside of tuples.
        if types.shape[0] != rows or (types.dim() == 2 and types.shape[1] != width):
            raise ValueError(
                f"task_types has shape {tuple(types.shape)}; for this batch pass one type per sample, shape "
                f"({rows},), or per "
                f"token, shape ({rows}, {width})."
            )
        positions = self.inputs.get("position_ids")
        has_positions = isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == width
        starts = torch.zeros(rows, width, dtype=torch.bool, device=device)
        starts[:, :1] = True
        if has_positions:
            starts[:, 1:] |= (positions[:, 1:] <= positions[:, :-1]).to(device)
        if types.dim() == 2:
            starts[:, 1:] |= types[:, 1:] != types[:, :-1]
        # A packed batch holds an unknown number of samples: as many slots as tokens keep shapes independent of the
        # data.
        slots = rows * width if has_positions or types.dim() == 2 else rows
        ids = starts.flatten().cumsum(0) - 1
        token_types = (types if types.dim() == 2 else types[:, None].expand(rows, width)).flatten()
        return Samples(ids, real.flatten(), types.new_full((slots,), -1).scatter(0, ids, token_types))

    def row_width(self, tokens: int, layer: str) -> int | None:
        """Tokens per row of the batch if `tokens` is all of them, else None."""
        mask = self._mask_of(layer)
        return mask.shape[1] if mask is not None and mask.numel() == tokens else None

    def _real_tokens(self, tokens: tuple[int, ...], layer: str) -> Tensor:
        """The mask of the layer's tokens, shape (rows, tokens per row), bool."""
        mask = self._mask_of(layer)
        if mask is not None and (_without_ones(tokens) == _without_ones(mask.shape) or tokens == (mask.numel(),)):
            return mask
        rows = self.rows
        if tokens[:1] == (rows,):
            width = prod(tokens[1:])
            if self._has_cache and mask is not None and mask.shape[1] > width:
                return mask[:, -width:]  # the mask covers the cached tokens too
            return torch.ones(rows, width, dtype=torch.bool)  # pooled, or not text: no mask speaks of these tokens
        raise ValueError(
            f"Nothing tells to which of the {rows} rows of the batch the {tokens} tokens of layer '{layer}' belong, "
            "so its "
            "router probabilities cannot be summed by sample. Leave the layer out with exclude_modules; to train "
            "without a "
            "balance term, set balance_loss_weight=0."
        )

    def _mask_of(self, layer: str) -> Tensor | None:
        """The mask of the tokens that the layer's stack reads, shape (rows, seq), bool; None if nothing tells."""
        if not self.reads_decoder_tokens(layer):
            return self._mask("attention_mask", "input_ids", "inputs_embeds")
        labels = self.inputs.get("labels")
        if self.inputs.get("decoder_attention_mask") is None and isinstance(labels, Tensor) and labels.dim() == 2:
            return labels != -100  # the decoder reads the labels, shifted by one
        decoder = self._mask("decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds")
        # Given neither, classifiers shift their input to the right for the decoder.
        return self._mask("attention_mask", "input_ids", "inputs_embeds") if decoder is None else decoder

    def _mask(self, name: str, *tokens: str) -> Tensor | None:
        mask = self.inputs.get(name)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                shape = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
                raise ValueError(
                    f"Padding cannot be read from {name} of {shape}; pass shape (batch, seq), or train without a "
                    "balance term "
                    "(balance_loss_weight=0)."
                )
            return mask != 0
        for source in tokens:
            if source in self._token_shapes:
                return torch.ones(self._token_shapes[source], dtype=torch.bool)
        return None


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as (batch, seq): DeepSeek's attention inserts a dimension of one."""
    return (*shape[:1], *(size for size in shape[1:] if size != 1))
