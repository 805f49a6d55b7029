from benchmarks import figures as benchmarks
from research.palette import COLOURS
from research.retention.methods import METHODS
from research.toy.figures import CURVES, MARKERS, POINTS


def test_methods_of_one_figure_have_different_colours():
    for methods in (METHODS, {*benchmarks.HATCHES, *benchmarks.MARKERS}, {*POINTS, *CURVES}):
        assert len({COLOURS[method] for method in methods}) == len(methods)
    assert {*POINTS, *CURVES} <= set(MARKERS)
