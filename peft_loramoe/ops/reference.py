"""The mixture as its formula reads, expert by expert, in the dtype of its inputs: the specification of `ops.mixture`."""

import torch
from torch import Tensor


def mixture(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """``sum_i gates_i(x) * B_i A_i x`` (Dou et al. 2024, equation 4); arguments and result as in `ops.mixture`."""
    num_experts = gates.shape[-1]
    r = A.shape[0] // num_experts
    output = torch.zeros(*x.shape[:-1], B.shape[0], dtype=x.dtype, device=x.device)
    for i in range(num_experts):
        A_i, B_i = A[i * r : (i + 1) * r], B[:, i * r : (i + 1) * r]
        output = output + gates[..., i : i + 1] * (x @ A_i.T @ B_i.T)
    return output
