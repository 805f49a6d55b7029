"""The mixture as one LoRA of rank E*r whose rank channels are gated in blocks of r: no loop over experts."""

import torch.nn.functional as F
from torch import Tensor


def mixture(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """``sum_i gates_i(x) * B_i A_i x`` over E experts of rank r; see `ops.reference.mixture` for the formula.

    The matrices are cast to the dtype of `x` (they are small, the activations are large), or to the autocast dtype.

    Args:
        x: shape (..., in_features).
        A: stacked down-projections, shape (E*r, in_features); expert i owns rows i*r to (i+1)*r.
        B: stacked up-projections, shape (out_features, E*r); expert i owns the same columns.
        gates: weight of each expert, scaling included, shape (..., E).

    Returns:
        Shape (..., out_features), dtype of `x` (or the autocast dtype).
    """
    hidden = F.linear(x, A.to(x.dtype))
    gated = hidden.unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1).to(hidden.dtype)
    return F.linear(gated.flatten(-2), B.to(x.dtype))
