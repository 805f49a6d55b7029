"""Compare the answers of two models, question by question."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .closed_book import ClosedBookResult


RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Answers of two models to the same n questions. A question is known if its answer is an exact match.

    Attributes:
        known: number of questions that the first model knows.
        lost: number of those that the second model does not know.
        gained: number of questions that only the second model knows.
        difference: share of questions known by the second model minus that of the first, in [-1, 1].
        interval: 95 % interval of the difference, from a paired percentile bootstrap over the questions. Its width is
            zero if no question or every question changed in the same direction.
        p_value: p-value of McNemar's exact test: the probability of counts at least as unequal as `lost` and `gained`
            if both directions were equally likely.

    Example:
        >>> Comparison(known=50, lost=9, gained=1, difference=-0.08, interval=(-0.14, -0.03), p_value=0.0215).lost
        9
    """

    known: int
    lost: int
    gained: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def compare_results(before: ClosedBookResult, after: ClosedBookResult, seed: int = 0) -> Comparison:
    """Compare the answers of two models question by question, for example without and with an adapter.

    Args:
        before: answers of the first model.
        after: answers of the second model to the same questions.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the questions differ.

    Example:
        >>> from peft_loramoe.analysis import ClosedBookResult, Response
        >>> def result(*correct):
        ...     return ClosedBookResult([Response("q", "a", "", right, 0.0, 1.0) for right in correct])
        >>> before, after = result(True, True, False, True), result(True, False, False, False)
        >>> comparison = compare_results(before, after)
        >>> comparison.known, comparison.lost, comparison.difference, comparison.p_value
        (3, 2, -0.5, 0.5)
    """
    if [r.question for r in before.responses] != [r.question for r in after.responses]:
        raise ValueError(
            f"The results belong to different questions ({len(before.responses)} and {len(after.responses)}); compare "
            "answers to the same questions in the same order."
        )
    pairs = [(first.exact_match, second.exact_match) for first, second in zip(before.responses, after.responses)]
    known, lost, gained = sum(first for first, _ in pairs), pairs.count((True, False)), pairs.count((False, True))
    return Comparison(
        known=known,
        lost=lost,
        gained=gained,
        difference=(gained - lost) / len(pairs),
        interval=_bootstrap_interval(lost, gained, len(pairs), seed),
        p_value=_mcnemar(lost, gained),
    )


def _bootstrap_interval(lost: int, gained: int, total: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean difference, drawn as counts of the differences -1, 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    totals = torch.full((RESAMPLES,), total, dtype=torch.float64)
    drawn_gained = torch.binomial(totals, torch.full_like(totals, gained / total), generator=generator)
    share_lost = torch.full_like(totals, lost / max(total - gained, 1))
    drawn_lost = torch.binomial(totals - drawn_gained, share_lost, generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = ((drawn_gained - drawn_lost) / total).quantile(quantiles).tolist()
    return low, high


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial test of lost against gained with probability 1/2."""
    changed = lost + gained
    tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)
