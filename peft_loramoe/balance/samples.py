"""Which sample each token of a layer belongs to, which tokens are real, and each sample's task type.

What a layer reads is known from the model's structure (`streams`), and which of its tokens are real from the arguments
that speak of them. Sizes are only checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..streams import DECODER, ENCODED, MEDIA, OTHER, PAIRED, SIGNAL, TEXT, Streams
from .task_types import INTEGERS, PADDING


# Inputs whose first dimension is the batch, in the order in which they are asked for it.
BATCH_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "attention_mask",
)
# Where samples begin in a packed batch, as indices of its tokens: FlashAttention's argument under its several names.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
# Arguments that a recording keeps after the call. Others, like a KV cache, must not outlive it.
KEPT_INPUTS = (
    "attention_mask",
    "decoder_attention_mask",
    "encoder_attention_mask",
    "labels",
    "shift_labels",
    "position_ids",
    "seq_idx",
    *BOUNDARIES,
    "logits_to_keep",
    "num_items_in_batch",
)
# A mask that is added to attention scores hides a token where it is lower: float32's exponential is zero there.
HIDDEN = -104.0


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


@dataclass(frozen=True)
class _Grid:
    """Tokens as rows of the batch.

    Attributes:
        real: False for padding, shape (rows, tokens per row), bool.
        is_text: whether these are the tokens that positions, boundaries and types per token speak of.
        last: how many tokens at the end of each row the layer reads; None for all.
    """

    real: Tensor
    is_text: bool = False
    last: int | None = None


class Batch:
    """What one call of the model says about its tokens.

    Keeps the masks, labels and positions of the call, and of its other arguments only the shapes.

    Args:
        inputs: the call's arguments by name.
        task_types: what the user passed as `task_types`, or None.
        streams: what the model's layers read; None for a model of which nothing is known.
        frames: for models of sound, turns numbers of samples or features into numbers of the encoder's frames.

    Attributes:
        rows: number of rows of the batch; 1 if no argument is a tensor.
        inputs: the arguments that are kept, by name.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        task_types: Any,
        streams: Streams | None = None,
        frames: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task_types = task_types
        self.streams = streams or Streams()
        self.rows = number_of_rows(inputs)
        self.inputs = {name: inputs[name] for name in KEPT_INPUTS if inputs.get(name) is not None}
        self.has_labels = inputs.get("labels") is not None
        self._frames = frames
        self._cached = _cached_tokens(inputs.get("past_key_values"))
        self._shapes = {
            TEXT: _token_shape(inputs, "input_ids", "inputs_embeds"),
            DECODER: _token_shape(inputs, "decoder_input_ids", "decoder_inputs_embeds"),
            ENCODED: _encoded_shape(inputs),
        }

    def reads(self, layer: str) -> tuple[Any, ...]:
        """What the layer reads, and whether it is repeated: equal for layers that read the same tokens if their
        inputs have the same shape.
        """
        kind, encoder = self.streams.kind(layer), self.streams.encoder
        as_encoder = self.streams.is_encoder_decoder and (encoder == SIGNAL or self._shapes[ENCODED] is None)
        return encoder if kind == ENCODED and as_encoder else kind, layer in self.streams.repeated

    def samples(self, tokens: tuple[int, ...], layer: str, task_types: Tensor | None, device: torch.device) -> Samples:
        """Map the tokens of one layer to samples.

        A row of the batch is a sample. In a packed row every segment is one: a sample begins where `position_ids`
        start again, where `cu_seq_lens_q`, `seq_idx`, the numbers of an integer mask or the blocks of a 4-D mask say
        so, and where the task type of the tokens changes.

        Args:
            tokens: leading dimensions of the layer's input: (batch, seq), the same flattened, or (batch,) after
                pooling.
            layer: name of the layer.
            task_types: what `task_type_tensor` returned, or None.
            device: of the result.

        Raises:
            ValueError: the tokens cannot be attributed to the rows of the batch, or `task_types` does not fit them.
        """
        grid = self._grid(tokens, layer)
        real = grid.real.to(device)
        rows, width = real.shape
        types = torch.full((rows,), -1, device=device) if task_types is None else task_types.to(device)
        # Dimension by dimension: torch.compile does not compare symbolic sizes inside of tuples.
        if types.shape[0] != rows or (types.dim() == 2 and (not grid.is_text or types.shape[1] != width)):
            per_token = f", or per token, shape ({rows}, {width})" if grid.is_text else f" (layer '{layer}')"
            raise ValueError(
                f"task_types has shape {tuple(types.shape)}; for this batch pass one type per sample, shape "
                f"({rows},){per_token}."
            )
        starts = self._starts(rows, width, device) if grid.is_text else None
        if types.dim() == 2:
            real, types = real & (types != PADDING), types.clamp(min=-1)
            changes = _changes(types)
            starts = changes if starts is None else starts | changes
        # A packed batch holds an unknown number of samples: as many slots as tokens keep shapes independent of the
        # data.
        slots = rows if starts is None else rows * width
        first = torch.zeros(rows, width, dtype=torch.bool, device=device)
        first[:, :1] = True
        ids = (first if starts is None else first | starts).flatten().cumsum(0) - 1
        token_types = (types if types.dim() == 2 else types[:, None].expand(rows, width)).flatten()
        sample_types = types.new_full((slots,), -1).scatter(0, ids, token_types)
        if grid.last is not None:
            ids, real = ids.view(rows, width)[:, -grid.last :].flatten(), real[:, -grid.last :]
        return Samples(ids, real.flatten(), sample_types)

    def entries_per_row(self, tokens: tuple[int, ...], layer: str) -> int | None:
        """How many neighbours in the first dimension of a layer's input belong to each row; None if nothing tells."""
        kind, repeated = self.reads(layer)
        if kind in (MEDIA, OTHER):
            return None
        if (shape := self._shape(kind)) is not None:
            if _same(tokens, (prod(shape),)):
                return prod(shape[1:])
            if len(tokens) == 1 and repeated:
                return None
            if _same(tokens[:1], (prod(shape[:-1]),)):
                return prod(shape[1:-1])
        return 1 if _same(tokens[:1], (self.rows,)) else None

    def _grid(self, tokens: tuple[int, ...], layer: str) -> _Grid:
        kind, repeated = self.reads(layer)
        if kind in (MEDIA, OTHER):
            raise self._refusal(tokens, layer)
        if (shape := self._shape(kind)) is None:
            return self._grid_of_rows(kind, tokens, layer)
        *lines, width = shape
        layouts = (shape, (prod(lines), width), (prod(shape),), (*shape, 1), (*lines, 1, width))
        if any(_same(tokens, layout) for layout in layouts):
            return _Grid(self._real(kind, shape), is_text=kind == TEXT)
        if not repeated:  # inside the blocks, other tokens are a part of the batch, as experts get, or no text at all
            if _same(tokens, (prod(lines),)) or _same(tokens, (prod(lines), 1)):
                return _Grid(torch.ones(self.rows, prod(lines[1:]), dtype=torch.bool))  # pooled
            last = self.inputs.get("logits_to_keep")
            if isinstance(last, int) and len(lines) == 1 and _same(tokens, (lines[0], last)):
                return _Grid(self._real(kind, shape), is_text=kind == TEXT, last=last)
        raise self._refusal(tokens, layer)

    def _grid_of_rows(self, kind: str, tokens: tuple[int, ...], layer: str) -> _Grid:
        """Tokens of images, of sound, or of a model that is given no text: the first dimension is the batch."""
        if not _same(tokens[:1], (self.rows,)):
            raise self._refusal(tokens, layer)
        width = prod(tokens[1:])
        everything = _Grid(torch.ones(self.rows, width, dtype=torch.bool))
        name = "decoder_attention_mask" if kind == DECODER else "attention_mask"
        mask = self.inputs.get(name)
        if kind == PAIRED or width == 1 or mask is None:
            return everything
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise _unreadable(name, mask, tokens)
        real = mask != 0
        if _same(tokens, tuple(real.shape)):
            return _Grid(real)
        if not torch.compiler.is_compiling():
            if kind == SIGNAL and self._frames is not None:
                frames = self._frames(torch.cat([real.new_tensor([real.shape[1]], dtype=torch.long), real.sum(-1)]))
                if frames[0] == width:
                    return _Grid(torch.arange(width, device=real.device) < frames[1:, None])
            if bool(real.all()):
                return everything
        raise ValueError(
            f"{name} of shape {tuple(real.shape)} does not tell which of the {tokens} tokens of layer '{layer}' are "
            f"padding. {WHAT_TO_DO}"
        )

    def _refusal(self, tokens: tuple[int, ...], layer: str) -> ValueError:
        return ValueError(
            f"Nothing tells to which of the {self.rows} rows of the batch the {tokens} tokens of layer '{layer}' "
            f"belong, so its router probabilities cannot be summed by sample. {WHAT_TO_DO}"
        )

    def _shape(self, kind: str) -> tuple[int, ...] | None:
        """Shape of the tokens that layers of a kind read, (rows, seq); (rows, choices, seq) for multiple choice."""
        shape = self._shapes.get(kind)
        if shape is None and kind == DECODER:
            labels = self._labels_read
            if labels is not None:
                return tuple(labels.shape)
            # Given neither, classifiers shift their input to the right for the decoder.
            return None if self.streams.labels_are_read and self.has_labels else self._shape(TEXT)
        if shape is None and kind == TEXT:
            mask = self.inputs.get("attention_mask")
            return tuple(mask.shape) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return shape

    @property
    def _labels_read(self) -> Tensor | None:
        """The labels, if the decoder reads them where it is given no tokens."""
        labels = self.inputs.get("labels")
        is_text = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        return labels if is_text and self.streams.labels_are_read else None

    def _mask(self, name: str) -> Any:
        mask = self.inputs.get(name)
        # A mapping has one for each kind of attention.
        return mask.get("full_attention", mask) if isinstance(mask, Mapping) else mask

    def _real(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """The mask of the tokens of a text, shape (rows, tokens per row), bool."""
        rows, width = shape[0], prod(shape[1:])
        name = "attention_mask"
        if kind == DECODER:
            name, labels = "decoder_attention_mask", self._labels_read
            if self.inputs.get(name) is None and labels is not None and _same(tuple(labels.shape), shape):
                return labels != -100  # the decoder reads the labels, shifted by one
            if self._shapes[DECODER] is None and labels is None:
                name = "attention_mask"
        elif kind == ENCODED and not self.streams.is_encoder_decoder:
            name = "encoder_attention_mask"
        mask = self._mask(name)
        real = torch.ones(rows, width, dtype=torch.bool) if mask is None else None
        if isinstance(mask, Tensor):
            if mask.dim() == len(shape) == 3:
                mask = mask.flatten(1)
            if mask.dim() == 2:
                real = self._columns(mask, width, kind)
            elif mask.dim() in (3, 4) and _same(tuple(mask.shape[-2:]), (width, width)):
                real = _may_attend(mask)[1]
        if real is None or real.shape[0] not in (1, rows):
            raise _unreadable(name, mask, shape)
        real = real.expand(rows, width)
        for boundaries in self._boundaries(rows * width) if kind == TEXT else ():
            tokens = torch.arange(rows * width, device=boundaries.device).view(rows, width)
            real = real & (tokens < boundaries[-1]).to(real.device)  # what follows is never attended to
        return real

    def _columns(self, mask: Tensor, width: int, kind: str) -> Tensor | None:
        """The part of a mask (rows, cached and new tokens) that speaks of the new ones; None if nothing tells."""
        if mask.shape[1] == width:
            return mask != 0
        if self._cached is None or kind not in (TEXT, DECODER):
            return None
        if isinstance(self._cached, int):
            return mask[:, self._cached : self._cached + width] != 0 if mask.shape[1] >= self._cached + width else None
        columns = (self._cached + torch.arange(width, device=mask.device)).clamp(max=mask.shape[1] - 1)
        return mask.index_select(1, columns) != 0

    def _boundaries(self, tokens: int) -> list[Tensor]:
        """Indices in the flattened batch of the samples' first tokens and of the end, shape (samples + 1,)."""
        given = {name: self.inputs[name] for name in BOUNDARIES if name in self.inputs}
        for name, boundaries in given.items():
            if not isinstance(boundaries, Tensor) or boundaries.dim() != 1 or boundaries.is_floating_point():
                raise ValueError(
                    f"{name} has shape {_shape_of(boundaries)}; pass the index of each sample's first token, and the "
                    "number of all tokens at the end."
                )
            if not torch.compiler.is_compiling() and int(boundaries[-1]) > tokens:
                raise ValueError(f"{name} ends at {int(boundaries[-1])}, but the batch has {tokens} tokens.")
        return list(given.values())

    def _starts(self, rows: int, width: int, device: torch.device) -> Tensor | None:
        """Where a packed batch says that samples begin, shape (rows, width), bool; None if it says nothing."""
        found = []
        positions = self.inputs.get("position_ids")
        if positions is not None:
            found.append(_restarts(positions, rows, width).to(device))
        for boundaries in self._boundaries(rows * width):
            tokens = torch.arange(rows * width, device=boundaries.device, dtype=boundaries.dtype)
            segments = torch.bucketize(tokens, boundaries, right=True)
            found.append(_changes(segments[None]).view(rows, width).to(device))
        if (indices := self.inputs.get("seq_idx")) is not None:
            if not isinstance(indices, Tensor) or not _same(tuple(indices.shape), (rows, width)):
                raise ValueError(f"seq_idx has shape {_shape_of(indices)}; the tokens have shape ({rows}, {width}).")
            found.append(_changes(indices).to(device))
        mask = self._mask("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() in (3, 4) and _same(tuple(mask.shape[-2:]), (width, width)):
            found.append(_may_attend(mask)[0].expand(rows, width).to(device))
        elif isinstance(mask, Tensor) and _same(tuple(mask.shape), (rows, width)) and _numbers_samples(mask):
            found.append(_changes(mask).to(device))
        return torch.stack([starts.expand(rows, width) for starts in found]).any(0) if found else None


WHAT_TO_DO = "Leave the layer out with exclude_modules; to train without a balance term, set balance_loss_weight=0."


def _unreadable(name: str, mask: Any, tokens: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"Padding cannot be read from {name} of shape {_shape_of(mask)}, where the tokens have shape {tokens}; pass "
        "shape (batch, seq) or (batch, 1, seq, seq), or train without a balance term (balance_loss_weight=0)."
    )


def number_of_rows(inputs: Mapping[str, Any]) -> int:
    """Number of rows of a batch: the first dimension of its tokens, images or sound, else of its first tensor."""
    named = (inputs.get(name) for name in BATCH_INPUTS)
    tensors = (value for value in (*named, *inputs.values()) if isinstance(value, Tensor) and value.dim() > 0)
    return next((tensor.shape[0] for tensor in tensors), 1)


def _token_shape(inputs: Mapping[str, Any], ids: str, embeddings: str) -> tuple[int, ...] | None:
    if isinstance(value := inputs.get(ids), Tensor) and value.dim() in (2, 3):
        return tuple(value.shape)
    if isinstance(value := inputs.get(embeddings), Tensor) and value.dim() in (3, 4):
        return tuple(value.shape[:-1])
    return None


def _encoded_shape(inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    encoded = inputs.get("encoder_hidden_states")
    if encoded is None and (outputs := inputs.get("encoder_outputs")) is not None:
        encoded = outputs[0]
    return tuple(encoded.shape[:2]) if isinstance(encoded, Tensor) and encoded.dim() == 3 else None


def _cached_tokens(cache: Any) -> Any:
    """Number of tokens in a KV cache, an int or a tensor; None if it does not say."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    try:
        length = cache.get_seq_length()
    except ValueError:  # no layer with attention
        return None
    return length.clone() if isinstance(length, Tensor) else length


def _same(shape: Sequence[int], other: Sequence[int]) -> bool:
    # Dimension by dimension: torch.compile does not compare symbolic sizes inside of tuples.
    return len(shape) == len(other) and all(size == expected for size, expected in zip(shape, other))


def _shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _changes(values: Tensor) -> Tensor:
    """Where a row's value is another than that of the token before, shape (rows, width), bool."""
    changes = torch.zeros_like(values, dtype=torch.bool)
    changes[:, 1:] = values[:, 1:] != values[:, :-1]
    return changes


def _numbers_samples(mask: Tensor) -> bool:
    """Whether a mask numbers the samples of a row, 1, 2, ..., as some collators do; compiled code cannot see it."""
    return mask.dtype in INTEGERS and not torch.compiler.is_compiling() and bool((mask > 1).any())


def _restarts(positions: Any, rows: int, width: int) -> Tensor:
    """Where positions begin again: (batch, seq), or Qwen2-VL's (3, batch, seq), with or without the text's before."""
    if isinstance(positions, Tensor) and positions.shape[-1:] == (width,):
        if positions.dim() == 3 and positions.shape[0] == 4:
            positions = positions[0]
        if positions.dim() == 3 and positions.shape[0] == 3 and positions.shape[1] in (1, rows):
            # Within an image, a coordinate may stay or fall; all are zero in a sample's first token only.
            return (positions == 0).all(0)
        if positions.dim() == 1:
            positions = positions[None]
        if positions.dim() == 2 and positions.shape[0] in (1, rows):
            starts = torch.zeros_like(positions, dtype=torch.bool)
            starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
            return starts
    raise ValueError(
        f"position_ids has shape {_shape_of(positions)}, where the tokens have shape ({rows}, {width}): it cannot be "
        "told where samples begin. Pass (batch, seq), or (3, batch, seq) or (4, batch, seq) for models with positions "
        "in images."
    )


def _may_attend(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask of pairs of tokens, (batch, [heads,] query, key), says about the tokens.

    Returns:
        Where samples begin, since a token may not attend to the one before; which tokens are real, since they may
        attend to themselves and are not alone. Both of shape (batch, seq), bool.
    """
    allowed = mask > HIDDEN if mask.is_floating_point() else mask != 0
    allowed = allowed.any(1) if allowed.dim() == 4 else allowed
    itself = allowed.diagonal(dim1=-2, dim2=-1)
    others = allowed & ~torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    alone = ~(others.any(-1) | others.any(-2))
    starts = torch.zeros_like(itself)
    starts[:, 1:] = ~allowed.diagonal(offset=-1, dim1=-2, dim2=-1)
    return starts, itself & ~alone if allowed.shape[-1] > 1 else itself
