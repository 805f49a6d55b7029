"""The localized balancing constraint (Dou et al. 2024, section 3.3) as pure functions of tensors.

With importance ``Q[m, n]``, what the router gives expert n over the tokens of sample m, and target ``I[m, n]``, 1 +
delta where the expert's group matches the sample's task type, 1 - delta where it does not and 1 where the type is
unknown:

    Z = Q / (I / mean_n I)  (corrected)  or  I * Q  (paper)
    term = var(Z) / mean(Z)^2  (the authors' code)  or  var(Z) / mean(Z)  (paper)

The term is smallest where Z is constant, so the corrected form draws Q towards I and the paper's towards 1 / I:
there the matched experts end with the smaller weight. See docs/balance.md.
"""

import torch
from torch import Tensor

from ..groups import ExpertGroups


EPS = 1e-10


def importance(probabilities: Tensor, sample_ids: Tensor, real: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Sum of the router probabilities over the real tokens of each sample.

    Args:
        probabilities: shape (..., T, N), floating point; any number of linears that see the same tokens.
        sample_ids: the sample that each token belongs to, shape (T,), int64, in 0 to num_samples - 1.
        real: False for padding, shape (T,), bool.
        num_samples: M.

    Returns:
        Importance, shape (..., M, N), dtype of `probabilities`; number of real tokens of each sample, shape (M,),
        int64.
    """
    masked = torch.where(real[:, None], probabilities, 0)
    *leading, _, num_experts = probabilities.shape
    sums = probabilities.new_zeros(*leading, num_samples, num_experts).index_add(-2, sample_ids, masked)
    counts = torch.zeros(num_samples, dtype=torch.int64, device=real.device).index_add(0, sample_ids, real.long())
    return sums, counts


def balance_targets(task_types: Tensor, groups: ExpertGroups, delta: float) -> Tensor:
    """Target ``I[m, n]`` of each expert's importance for each sample.

    Args:
        task_types: shape (M,), int64; g matches group g, -1 is unknown.
        groups: the expert groups.
        delta: in [0, 1).

    Returns:
        Targets, shape (M, N), float32.
    """
    group_of_expert = torch.tensor(groups.of_experts, device=task_types.device)
    matches = task_types[:, None] == group_of_expert
    return torch.where(task_types[:, None] < 0, 1.0, torch.where(matches, 1.0 + delta, 1.0 - delta))


def balance_term(
    sums: Tensor, counts: Tensor, targets: Tensor, *, formula: str, target: str, importance: str
) -> Tensor:
    """The balance term of one adapted linear, or of each of several.

    Args:
        sums: importance, shape (..., M, N), floating point.
        counts: real tokens of each sample, shape (..., M); samples without any do not count.
        targets: shape (..., M, N).
        formula: "cv_squared" or "variance_to_mean".
        target: "corrected" or "paper".
        importance: "mean" over a sample's tokens or "sum".

    Returns:
        Shape (...), dtype of `sums`; zero where no sample has a token.
    """
    used = (counts > 0).unsqueeze(-1)
    Q = sums / counts.clamp(min=1).unsqueeze(-1) if importance == "mean" else sums
    # Divided by its mean, so that samples whose groups differ in size (or whose type is unknown) can agree on one Z:
    # router probabilities sum to one for all of them.
    Z = Q / (targets / targets.mean(dim=-1, keepdim=True)) if target == "corrected" else Q * targets
    # Samples without tokens are masked instead of removed: no shape depends on the data.
    size = used.sum((-2, -1), keepdim=True) * sums.shape[-1]
    mean = torch.where(used, Z, 0).sum((-2, -1), keepdim=True) / size.clamp(min=1)
    variance = torch.where(used, (Z - mean) ** 2, 0).sum((-2, -1), keepdim=True) / (size - 1).clamp(min=1)
    return (variance / (mean**2 + EPS if formula == "cv_squared" else mean + EPS)).squeeze((-2, -1))
