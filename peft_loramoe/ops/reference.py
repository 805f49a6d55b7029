"""The mixture as its formula reads, expert by expert, in the dtype of its inputs.

The specification of `ops.mixture`.
"""

import torch
from torch import Tensor


def mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    *,
    scaling: float = 1.0,
    temperature: float = 1.0,
    experts: list[int] | None = None,
    top_k: int | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``scaling * sum_i gate_i(x) * B_i A_i drop(x)`` (Dou et al. 2024, equation 4).

    Args:
        x: shape (..., in_features).
        A: shape (E*r, in_features), expert i owns rows i*r to (i+1)*r.
        B: shape (out_features, E*r), the same columns.
        router: shape (N, in_features).
        scaling: factor on the sum.
        temperature: the logits are divided by it.
        experts: the E router outputs that have parameters; None for all N.
        top_k: router outputs that each token uses, renormalised; None for all.
        keep: entries of x that dropout keeps, boolean, shape of x; None for all.
        dropout: the probability with which `keep` was drawn (`mixture_torch.drop_probability`).

    Returns:
        The contribution, shape (..., out_features), and the router probabilities, shape (..., N).
    """
    experts = list(range(router.shape[0])) if experts is None else experts
    r = A.shape[0] // len(experts)
    probabilities = torch.softmax(x @ router.T / temperature, dim=-1)
    gates = probabilities
    if top_k is not None:
        chosen = torch.zeros_like(gates).scatter(-1, gates.topk(top_k, dim=-1).indices, 1.0)
        gates = gates * chosen / (gates * chosen).sum(dim=-1, keepdim=True)
    dropped = x if keep is None else x * keep / (1 - dropout)
    output = torch.zeros(*x.shape[:-1], B.shape[0], dtype=x.dtype, device=x.device)
    for i, n in enumerate(experts):
        A_i, B_i = A[i * r : (i + 1) * r], B[:, i * r : (i + 1) * r]
        output = output + scaling * gates[..., n : n + 1] * (dropped @ A_i.T @ B_i.T)
    return output, probabilities
