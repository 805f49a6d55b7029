"""From a data set's column `task_type` to the model's argument `task_types`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..balance.samples import BATCH_INPUTS
from ..balance.task_types import PADDING, task_type_tensor
from ..config import LoRAMoEConfig


COLUMN = "task_type"


class TaskTypeCollator:
    """A data collator around another one: takes the examples' `task_type` and adds `task_types` to the batch.

    An example's `task_type` is an integer (the expert group; -1 is unknown) or one of the config's `task_type_names`
    (None is unknown). A packed example, several samples one after the other, has a list of them: one for each entry of
    its `seq_lengths`, or one for each token.

    The batch may be padded on either side, or flattened to one row (padding-free). `task_types` is int64, shape
    (examples,), or, where a row holds several samples, (rows, tokens) with -100 for padding. Batches without the
    column are passed on as they are, and so are examples with it that the collator returns untouched, as those of
    trainers that generate do.

    Args:
        collator: gets the examples without their `task_type`.
        config: says what the types may be.

    Raises:
        TypeError: the column mixes names and integers, or holds anything else; or the collator returns no dictionary.
        ValueError: some examples lack the column, a type is unknown, or it cannot be told which tokens a type belongs
            to, or where a sample ends.

    Example:
        >>> from transformers import default_data_collator
        >>> from peft_loramoe import LoRAMoEConfig
        >>> collator = TaskTypeCollator(default_data_collator, LoRAMoEConfig.retain())
        >>> batch = collator([{"input_ids": [5, 6], "task_type": "tasks"}, {"input_ids": [7, 8], "task_type": None}])
        >>> batch["task_types"]
        tensor([ 1, -1])
    """

    def __init__(self, collator: Callable[[list[Any]], Any], config: LoRAMoEConfig) -> None:
        self.collator = collator
        self.config = config
        self._warned = False

    def __call__(self, examples: list[Mapping[str, Any]]) -> Any:
        """Collate the examples of one batch."""
        types = example_types(examples, self.config)
        if types is None:
            return self.collator(examples)
        without = [{key: value for key, value in example.items() if key != COLUMN} for example in examples]
        batch = self.collator(without)
        if isinstance(batch, MutableMapping):
            task_types = batch["task_types"] = self._arrange(types, examples, batch)
        elif isinstance(batch, list) and list(map(id, batch)) == list(map(id, without)):
            batch, task_types = list(examples), torch.stack([known.max() for known in types])
        else:
            raise TypeError(
                f"The collator returned a {type(batch).__name__}, beside which there is no place for task_types; have "
                f"it return a dictionary, or leave the column {COLUMN} out."
            )
        if self.config.balance_loss_weight > 0:
            if isinstance(batch, Mapping):
                _check_boundaries(examples, batch)
            self._warn_if_unknown(task_types)
        return batch

    def _warn_if_unknown(self, task_types: Tensor) -> None:
        if not self._warned and (task_types < 0).all():
            self._warned = True
            warnings.warn(
                f"Every {COLUMN} of a batch is unknown (-1): there the balance term only spreads the load evenly over "
                f"the experts. Check the column {COLUMN}, or set balance_loss_weight=0."
            )

    def _arrange(self, types: list[Tensor], examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
        tensors = (batch.get(name) for name in (*BATCH_INPUTS, *batch))
        rows = next(
            (tensor.shape[0] for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() > 0), len(examples)
        )
        flattened = rows == 1 and len(examples) > 1
        if not flattened and all(t.dim() == 0 for t in types):
            return torch.stack(types)
        per_token = [_of_tokens(t, example) for t, example in zip(types, examples)]
        tokens = batch["input_ids"]
        arranged = torch.full_like(tokens, PADDING)
        for row, real in enumerate([torch.cat(per_token)] if flattened else per_token):
            where = _real_tokens(batch, row)
            if len(real) > where.sum() or ("attention_mask" in batch and len(real) < where.sum()):
                raise ValueError(
                    f"Row {row} of the batch has {int(where.sum())} tokens, but {COLUMN} speaks of {len(real)}: does "
                    "the collator truncate or flatten? Truncate the data set before."
                )
            arranged[row, where.nonzero().flatten()[: len(real)]] = real
        return arranged


def default_task_type(config: LoRAMoEConfig) -> int:
    """The type of samples that are given none, beside anchors: 1, the tasks; 0 where there is one expert group only.

    Raises:
        ValueError: its group is a null group, which would leave the tasks to the base model.
    """
    task_type = min(1, config.num_groups - 1)
    if task_type in (config.null_groups or ()):
        raise ValueError(
            f"Samples without {COLUMN} are of type {task_type}, which null_groups={config.null_groups} leaves to the "
            f"base model, and anchors of type 0: set null_groups=[0], or give the samples a {COLUMN}."
        )
    return task_type


def example_types(examples: Sequence[Mapping[str, Any]], config: LoRAMoEConfig) -> list[Tensor] | None:
    """The task types in the column `task_type`; None if no example has it.

    Args:
        examples: rows of a data set.
        config: says what the types may be.

    Returns:
        For each example a scalar, or, if it is packed, shape (segments or tokens,); int64.

    Raises:
        TypeError: the column mixes names and integers, or holds anything else.
        ValueError: some examples lack the column, or a type is unknown.
    """
    given = [example for example in examples if COLUMN in example]
    if not given:
        return None
    if len(given) < len(examples):
        raise ValueError(
            f"{len(examples) - len(given)} of the {len(examples)} examples of a batch have no {COLUMN}; give every "
            "example one, -1 for unknown."
        )
    values = [value.tolist() if hasattr(value, "tolist") else value for value in (e[COLUMN] for e in examples)]
    _check_kinds(values)
    return [_indices(value, config) for value in values]


def _indices(value: Any, config: LoRAMoEConfig) -> Tensor:
    """The types of one example: a scalar, or shape (segments or tokens,)."""
    values = value if isinstance(value, (list, tuple)) else [value]
    known = [-1 if entry is None else entry for entry in values]
    types = task_type_tensor([known], config.num_groups, config.task_type_names)[0]
    return types if isinstance(value, (list, tuple)) else types[0]


def _check_kinds(values: list[Any]) -> None:
    entries = [entry for value in values for entry in (value if isinstance(value, (list, tuple)) else [value])]
    kinds = {type(entry) for entry in entries} - {type(None)}
    if len(kinds) > 1 or not kinds <= {int, str}:
        raise TypeError(
            f"{COLUMN} holds values of type {', '.join(sorted(kind.__name__ for kind in kinds))}, such as "
            f"{', '.join(repr(next(e for e in entries if type(e) is kind)) for kind in kinds)}; write integers only, "
            "or names only."
        )


def _check_boundaries(examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
    """Positions, which start again with each sample, tell samples of one type apart."""
    segments = (example.get("seq_lengths") for example in examples)
    joined = len(batch["task_types"]) < len(examples) or any(
        lengths is not None and len(lengths) > 1 for lengths in segments
    )
    positions = batch.get("position_ids")
    if joined and not (isinstance(positions, Tensor) and positions.dim() == 2):
        raise ValueError(
            "The collator joins several samples in a row but returns no 2-D position_ids, so samples of one type that "
            "follow each other would be balanced as one. Have it return position_ids that start again with each "
            "sample (DataCollatorWithFlattening: return_position_ids=True), or set balance_loss_weight=0."
        )


def _real_tokens(batch: Mapping[str, Any], row: int) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"][row], dtype=torch.bool) if mask is None else mask[row] != 0


def _of_tokens(types: Tensor, example: Mapping[str, Any]) -> Tensor:
    """The type of each token of one example, shape (tokens,)."""
    if (input_ids := example.get("input_ids")) is None:
        raise ValueError(
            f"Several values of {COLUMN} share a row, but the examples (columns {', '.join(example)}) have no "
            f"input_ids that tell where each begins. Give every example one {COLUMN}, tokenize the data set before, "
            "or collate without padding_free."
        )
    length = len(input_ids)
    if types.dim() == 0:
        return types.expand(length)
    if len(types) == length:
        return types
    segments = example.get("seq_lengths")
    if segments is None or len(segments) != len(types) or sum(segments) != length:
        found = "no seq_lengths" if segments is None else f"seq_lengths {list(segments)}"
        raise ValueError(
            f"A packed example of {length} tokens has {len(types)} values in {COLUMN} and {found}; give one {COLUMN} "
            "for each entry of seq_lengths, or one for each token."
        )
    return types.repeat_interleave(torch.as_tensor(segments))
