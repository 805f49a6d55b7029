"""Launching Triton kernels without looking them up at each call.

From a kernel and its arguments to the compiled kernel Triton takes two thirds of the time of a launch, and a layer
with few tokens has little else to do. Here the compiled kernel is remembered by what Triton compiles a kernel anew
for: dtypes, alignment of pointers, what is known of integers, and constants.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .triton_kernels import INTERPRETED


INT32_MAX = 2**31 - 1
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its tensors.

    Args:
        kernel: function decorated with `triton.jit`.
        grid: number of programs, in one to three dimensions.
        *args: the kernel's arguments but for the compile-time constants, which come last in its signature.
        **constants: the compile-time constants, and Triton's options `num_warps` and `num_stages`.
    """
    if INTERPRETED.value:
        kernel[grid](*args, **constants)
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return launch(kernel, grid, *args, **constants)
    key = (kernel.__name__, device.index, *_specialization(kernel, args), *constants.values())
    if (compiled := _compiled.get(key)) is None:
        _compiled[key] = kernel[grid](*args, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *[constants[name] for name in kernel.arg_names[len(args) :]])


def _specialization(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    """What of the arguments Triton compiles a kernel anew for."""
    found: list[Any] = []
    for argument, plain in zip(args, _not_specialized(kernel)):
        if isinstance(argument, Tensor):
            found += (argument.dtype, argument.data_ptr() % 16 == 0)
        elif isinstance(argument, int):
            found.append(argument > INT32_MAX if plain else (argument == 1, argument % 16 == 0, argument > INT32_MAX))
        else:
            found.append(type(argument))
    return found


@functools.cache
def _not_specialized(kernel: Any) -> list[bool]:
    return [name in kernel.do_not_specialize for name in kernel.arg_names]
