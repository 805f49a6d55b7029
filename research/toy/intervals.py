"""95 % intervals of means and of ratios of means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of it; infinite for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, mean - half, mean + half


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the means of paired values and Fieller's 95 % interval of it; infinite if the denominator may be zero.

    The interval holds the ratios q for which the paired differences numerator - q * denominator have a mean that does
    not differ from zero by Student's test.
    """
    count = len(numerators)
    a, b = sum(numerators) / count, sum(denominators) / count
    ratio = a / b if b else math.nan
    if count < 2:
        return ratio, -math.inf, math.inf
    t = stats.t.ppf(0.975, count - 1) ** 2 / count / (count - 1)
    aa = t * sum((x - a) ** 2 for x in numerators)
    bb = t * sum((y - b) ** 2 for y in denominators)
    ab = t * sum((x - a) * (y - b) for x, y in zip(numerators, denominators))
    square, middle, rest = b * b - bb, a * b - ab, a * a - aa
    if square <= 0:
        return ratio, -math.inf, math.inf
    root = math.sqrt(max(0.0, middle * middle - square * rest))
    return ratio, (middle - root) / square, (middle + root) / square
