"""What a model knew before and knows after, question by question."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .closed_book import ClosedBookResult


RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same n questions; "known" is answered right by exact match.

    Attributes:
        known: number of questions that the first model knew.
        lost: number of those that the second does not know.
        gained: number of questions that only the second knows.
        difference: of the shares of questions known, second minus first, in [-1, 1].
        interval: 95 % interval of the difference, a percentile bootstrap over the questions, which keeps the two answers to a
            question together. It has no width if none or all of the questions were lost, or gained.
        p_value: of McNemar's exact test: how likely so unequal numbers of lost and gained questions are if a question is as
            likely lost as gained.
    """

    known: int
    lost: int
    gained: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def compare_results(before: ClosedBookResult, after: ClosedBookResult, seed: int = 0) -> Comparison:
    """Compare the answers of two models, for example of a base model without and with an adapter, question by question.

    Args:
        before: the first model's answers.
        after: the second model's answers to the same questions.
        seed: of the bootstrap.

    Raises:
        ValueError: the questions differ.
    """
    if [r.question for r in before.responses] != [r.question for r in after.responses]:
        raise ValueError(
            f"The results are of different questions ({len(before.responses)} and {len(after.responses)}); only answers to the "
            "same questions in the same order can be compared."
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
    """Resampling questions whose differences are 1, -1 and 0 is drawing how many there are of each."""
    generator = torch.Generator().manual_seed(seed)
    totals = torch.full((RESAMPLES,), total, dtype=torch.float64)
    drawn_gained = torch.binomial(totals, torch.full_like(totals, gained / total), generator=generator)
    share_lost = torch.full_like(totals, lost / max(total - gained, 1))
    drawn_lost = torch.binomial(totals - drawn_gained, share_lost, generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = ((drawn_gained - drawn_lost) / total).quantile(quantiles).tolist()
    return low, high


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial test of lost against gained, with even chances."""
    changed = lost + gained
    tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)
