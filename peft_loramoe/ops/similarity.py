"""How alike the experts of one linear are, from A and B alone: no matrix of the linear's own size is built."""

import torch
from torch import Tensor


def inner_products(A: Tensor, B: Tensor, r: int) -> Tensor:
    """``<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))``, the matrices taken as vectors, for all pairs of
    experts.

    Args:
        A: shape (E*r, in_features), expert i owns rows i*r to (i+1)*r, floating point.
        B: shape (out_features, E*r), the same columns.
        r: rank of each expert.

    Returns:
        Shape (E, E), float64, on the CPU.
    """
    A, B = _exact(A), _exact(B)
    return (B.T @ B * (A @ A.T)).unflatten(0, (-1, r)).unflatten(2, (-1, r)).sum((1, 3))


def cosines(inner: Tensor) -> Tensor:
    """The cosines that inner products, shape (E, E), give; not a number where one of the two is zero."""
    norms = inner.diagonal().clamp(min=0).sqrt()
    return (inner / torch.outer(norms, norms)).clamp(-1, 1)


def subspace_overlaps(matrices: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles between the column spaces of each pair of matrices.

    ``|Q_i^T Q_j|_F^2 / min(rank_i, rank_j)`` with orthonormal bases Q, the subspace similarity of Hu et al. 2022
    (LoRA, section 7.2): 1 where one space contains the other, 0 where they are orthogonal.

    Args:
        matrices: shape (E, m, r), floating point.

    Returns:
        Shape (E, E), float64, on the CPU; not a number where one of the two is zero.
    """
    U, sizes, _ = torch.linalg.svd(_exact(matrices), full_matrices=False)
    # Rounding the entries to their dtype may add this much in any direction, so what is smaller says nothing.
    rounding = torch.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5 * sizes[:, :1]
    kept = sizes > rounding
    Q = U * kept[:, None]
    squares = torch.einsum("imr,jms->ijrs", Q, Q).square().sum((2, 3))
    ranks = kept.sum(1)
    return (squares / torch.minimum(ranks[:, None], ranks)).clamp(max=1)


def _exact(matrix: Tensor) -> Tensor:
    """In float64, on the CPU: some devices have no float64."""
    return matrix.detach().cpu().double()
