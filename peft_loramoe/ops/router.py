"""From hidden states to gates and back: logits, probabilities, top-k selection, and their gradients.

Knows tensors only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


# Entries of x that are held in the logits' dtype at a time, except where torch.compile fuses the cast. On a CPU they
# stay in the cache: four times as fast at T = 8192, d = 4096 (bfloat16, N = 6) as one copy of everything.
ENTRIES_AT_A_TIME = {"cpu": 2**19}
ENTRIES_AT_A_TIME_ELSEWHERE = 2**25


def project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W^T``, for the router's logits ``W_g x``: accurate to the rounding of `dtype` whatever the dtype of `x`.

    Where float32 products may be TF32 (`torch.backends.cuda.matmul.allow_tf32`), those of float32 and float16 on CUDA
    are.

    Args:
        x: hidden states, shape (T, in_features), floating point.
        weight: shape (N, in_features).
        dtype: dtype of the products' sums.

    Returns:
        Shape (T, N), `dtype`.
    """
    if x.dtype == dtype:
        return x @ weight.to(dtype).t()
    if x.is_cuda and dtype == torch.float32 and x.dtype == torch.bfloat16 and mm_has_out_dtype():
        # The products of two bfloat16 are exact in float32.
        parts = [weight] if weight.dtype == x.dtype else split_in_bfloat16(weight)
        products = torch.mm(x, torch.cat(parts).t(), out_dtype=torch.float32)
        return products if len(parts) == 1 else products.view(x.shape[0], len(parts), -1).sum(1)
    weight = weight.to(dtype).t()
    entries = ENTRIES_AT_A_TIME.get(x.device.type, ENTRIES_AT_A_TIME_ELSEWHERE)
    if (
        torch.compiler.is_compiling() or x.numel() <= entries
    ):  # compiled, a number of pieces would fix the number of tokens
        return x.to(dtype) @ weight
    return torch.cat([chunk.to(dtype) @ weight for chunk in x.split(max(1, entries // x.shape[1]))])


def split_in_bfloat16(weight: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is `weight`, of at most the 24 significant bits of float32."""
    parts = [weight.bfloat16()]
    for _ in range(2):
        weight = weight - parts[-1]  # exact, in float32
        parts.append(weight.bfloat16())
    return parts


def router_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax router, ``p = softmax(W_g x / temperature)`` (Dou et al. 2024, section 3.2).

    Args:
        logits: shape (T, N).
        temperature: positive; larger values flatten the distribution.

    Returns:
        Probabilities, shape (T, N), at least float32.
    """
    logits = logits if temperature == 1 else logits / temperature
    return torch.softmax(logits, dim=-1, dtype=torch.float32 if logits.dtype.itemsize < 4 else None)


def select_gates(probabilities: Tensor, experts: Sequence[int], top_k: int | None) -> Tensor:
    """Gates of the experts: the probabilities themselves, or the `top_k` largest of them renormalised to sum to one.

    Args:
        probabilities: shape (..., N).
        experts: router outputs whose gates are wanted, ascending; the others are null experts.
        top_k: number of router outputs each token uses, null experts included; None means all of them.

    Returns:
        Gates, shape (..., len(experts)), same dtype; with `top_k` all but the chosen entries are zero.
    """
    if top_k is not None:
        values, indices = probabilities.topk(top_k, dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, values / values.sum(dim=-1, keepdim=True))
    if len(experts) == probabilities.shape[-1]:
        return probabilities
    return torch.cat([probabilities[..., columns] for columns in _contiguous_slices(experts)], dim=-1)


def select_gates_backward(
    grad_gates: Tensor, probabilities: Tensor, experts: Sequence[int], top_k: int | None
) -> Tensor:
    """Gradient of `select_gates` with respect to the probabilities, shape (..., N); the selection itself has none."""
    grad = grad_gates
    if len(experts) < probabilities.shape[-1]:
        grad = torch.zeros_like(probabilities)
        runs = _contiguous_slices(experts)
        for columns, part in zip(runs, grad_gates.split([run.stop - run.start for run in runs], dim=-1)):
            grad[..., columns] = part
    if top_k is None:
        return grad
    values, indices = probabilities.topk(top_k, dim=-1)
    total = values.sum(dim=-1, keepdim=True)
    chosen = grad.gather(-1, indices)
    chosen = (chosen - (chosen * values).sum(dim=-1, keepdim=True) / total) / total
    return torch.zeros_like(probabilities).scatter(-1, indices, chosen)


def softmax_backward(grad_probabilities: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Gradient of `router_probabilities` with respect to the logits, shape (T, N)."""
    grad = torch.ops.aten._softmax_backward_data.default(grad_probabilities, probabilities, -1, probabilities.dtype)
    return grad if temperature == 1 else grad / temperature


def _contiguous_slices(experts: Sequence[int]) -> list[slice]:
    """Columns next to each other; a list of columns as an index would be copied to the device at every use."""
    starts = [i for i in experts if i - 1 not in experts]
    stops = [i + 1 for i in experts if i + 1 not in experts]
    return [slice(*run) for run in zip(starts, stops)]


def mm_has_out_dtype() -> bool:
    """Whether a product of bfloat16 or float16 on CUDA can be returned as it is summed, in float32."""
    return torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8; not on ROCm
