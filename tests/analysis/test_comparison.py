import random

import pytest

from peft_loramoe.analysis import ClosedBookResult, Response, compare_results


pytestmark = pytest.mark.version_independent


def result(exact_matches, name="q"):
    return ClosedBookResult(
        [
            Response(f"{name}{i}", expected="a", given="a", exact_match=exact_match, f1=0.0, loss=1.0)
            for i, exact_match in enumerate(exact_matches)
        ]
    )


BEFORE, AFTER = [True] * 60 + [False] * 40, [True] * 45 + [False] * 15 + [True] * 4 + [False] * 36


def test_questions_are_compared_one_by_one():
    comparison = compare_results(result(BEFORE), result(AFTER))
    assert (comparison.known, comparison.lost, comparison.gained) == (60, 15, 4)
    assert comparison.difference == pytest.approx(-0.11)


def test_the_interval_is_that_of_resampled_pairs():
    generator, differences = random.Random(0), sorted([-1] * 15 + [1] * 4 + [0] * 81)
    means = sorted(sum(generator.choices(differences, k=100)) / 100 for _ in range(10_000))
    low, high = compare_results(result(BEFORE), result(AFTER)).interval
    assert (low, high) == pytest.approx((means[250], means[9750]), abs=0.01)


def test_the_interval_depends_on_the_seed_alone():
    intervals = [
        compare_results(result([True, False] * 500), result([False] * 700 + [True] * 300), s).interval
        for s in (3, 3, 4)
    ]
    assert intervals[0] == intervals[1] != intervals[2]


# before, after, the p-value of the binomial test by hand
CHANGES = {
    "nothing": ([True, False], [True, False], 1.0),
    "as much each way": ([True, False], [False, True], 1.0),
    "all lost": ([True] * 6, [False] * 6, 2 / 2**6),
    "all gained": ([False] * 6, [True] * 6, 2 / 2**6),
    "four of five": ([True] * 4 + [False], [False] * 4 + [True], 2 * (1 + 5) / 2**5),
}


@pytest.mark.parametrize("before, after, p_value", CHANGES.values(), ids=CHANGES)
def test_the_exact_test(before, after, p_value):
    assert compare_results(result(before), result(after)).p_value == pytest.approx(p_value)


def test_the_test_of_many_questions_does_not_overflow():
    assert compare_results(result([True] * 3000), result([False] * 3000)).p_value == 0.0


@pytest.mark.parametrize("lost", [True, False])
def test_a_change_of_all_questions_has_no_spread(lost):
    comparison = compare_results(result([lost] * 9), result([not lost] * 9))
    assert (
        comparison.interval == (comparison.difference, comparison.difference) == ((-1.0, -1.0) if lost else (1.0, 1.0))
    )


@pytest.mark.parametrize("after", [result([True]), result([True, True], name="other")])
def test_other_questions_are_refused(after):
    with pytest.raises(ValueError, match=rf"different questions \(2 and {len(after.responses)}\)"):
        compare_results(result([True, True]), after)
