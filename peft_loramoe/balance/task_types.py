"""Task types as users pass them: checked, and turned into indices of expert groups."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..options import shown


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
PADDING = -100  # as a token's task type, in packed rows without a mask; as in labels


def task_type_tensor(task_types: Any, num_groups: int, names: Sequence[str] | None) -> Tensor:
    """Check `task_types` as a user passed them, and turn names into group indices.

    Args:
        task_types: an integer tensor, shape (batch,) or (batch, seq), or a (nested) list or an array of integers or
            names.
        num_groups: number of expert groups; valid types are 0 to num_groups - 1, and -1 for unknown. Of single tokens,
            also -100 for padding.
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
        outside = (task_types < lowest) | (task_types >= num_groups)
        if task_types.dim() == 2:
            outside &= task_types != PADDING
        outside = task_types[outside]
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
        is_of_names = getattr(getattr(task_types, "dtype", None), "kind", "") in ("O", "T", "U")  # an array
        return _names_to_indices(task_types.tolist(), names) if is_of_names else task_types
    if names is None:
        raise ValueError(
            f"task_types contains the name '{task_types}', but the config has no task_type_names; set them."
        )
    if task_types not in names:
        raise ValueError(f"task_types contains the unknown name '{task_types}'; task_type_names are {list(names)}.")
    return list(names).index(task_types)


def is_of_all_rows(task_types: Any) -> bool:
    """Whether this is one task type, an integer or a name, and not one for each row."""
    if isinstance(task_types, Tensor):
        return task_types.dim() == 0
    return isinstance(task_types, (str, Integral)) or getattr(task_types, "shape", None) == ()


def repeat_for_rows(task_types: Any, rows: int) -> Any:
    """Repeat the task types of a batch for a call that has its rows several times over (chosen, then rejected
    answers).

    Args:
        task_types: those of the batch, as `task_type_tensor` takes them, or one integer or name, the type of all its
            samples.
        rows: number of rows of the call.
    """
    if not isinstance(task_types, Tensor) and hasattr(task_types, "tolist"):
        task_types = task_types.tolist()  # of an array, which * would multiply
    if is_of_all_rows(task_types):
        return task_types.repeat(rows) if isinstance(task_types, Tensor) else [task_types] * rows
    if not isinstance(task_types, (Tensor, Sequence)):
        return task_types  # the check of types says so
    given = len(task_types)
    if given == 0 or rows <= given or rows % given:
        return task_types  # where they do not fit, the check of shapes says so
    times = rows // given  # torch.compile does not know divmod of symbolic sizes
    if isinstance(task_types, Tensor):
        return task_types.repeat(times, *(1 for _ in task_types.shape[1:]))
    return [*task_types] * times
