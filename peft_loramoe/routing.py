"""From hidden states to gates: the router's logits, probabilities and top-k selection. Knows tensors only."""

import torch
import torch.nn.functional as F
from torch import Tensor


def router_probabilities(x: Tensor, router: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Softmax router, ``p(x) = softmax(W_g x / temperature)`` (Dou et al. 2024, section 3.2).

    Args:
        x: hidden states, shape (..., in_features), any floating dtype.
        router: ``W_g``, shape (num_experts, in_features).
        temperature: positive; larger values flatten the distribution.
        dtype: dtype of the logits. The softmax runs in it, but at least in float32, so float16 activations cannot
            overflow it.

    Returns:
        Probabilities, shape (..., num_experts), float32 (float64 if `dtype` or `x` is float64).
    """
    dtype = torch.promote_types(dtype, torch.float64) if x.dtype == torch.float64 else dtype
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(dtype), router.to(dtype))
        return torch.softmax(logits / temperature, dim=-1, dtype=torch.promote_types(dtype, torch.float32))


def select_gates(probabilities: Tensor, top_k: int | None) -> Tensor:
    """Gates of the experts: the probabilities themselves, or the `top_k` largest of them renormalised to sum to one.

    Args:
        probabilities: shape (..., num_experts).
        top_k: number of experts each token uses; None means all of them.

    Returns:
        Gates, same shape and dtype; with `top_k` all but the chosen entries are zero.
    """
    if top_k is None or top_k == probabilities.shape[-1]:
        return probabilities
    values, indices = probabilities.topk(top_k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, indices, values / values.sum(dim=-1, keepdim=True))
