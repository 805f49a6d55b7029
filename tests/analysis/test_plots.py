import math
import subprocess
import sys
import time
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from peft_loramoe.analysis import (
    RouterStatistics,
    RouterTrace,
    plot_entropy,
    plot_frontier,
    plot_group_weights,
    plot_load,
    plot_trace,
)
from peft_loramoe.analysis.plots.figure import GREY, figure_file, linears_by_kind, style


pytestmark = pytest.mark.version_independent

LAYERS = ("layers.0.up_proj", "layers.0.down_proj", "layers.1.up_proj", "layers.1.down_proj")
NAMES = ["facts", "skills"]
WEIGHTS = {-1: (0.25, 0.25, 0.25, 0.25), 0: (0.4, 0.3, 0.2, 0.1), 1: (0.1, 0.2, 0.3, 0.4)}


def statistics(
    adapter="default", layers=LAYERS, task_types=(0, 1), sizes=(2, 2), names=NAMES, weights=WEIGHTS, null=()
):
    """The same weights in every layer; `weights` is by task type, or by layer and task type."""
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    experts, of_layers = [], []
    for layer in layers:
        for task_type in task_types:
            fields = {"adapter": adapter, "layer": layer, "task_type": task_type}
            of_type = weights[layer, task_type] if (layer, task_type) in weights else weights[task_type]
            experts += [
                {**fields, "expert": i, "group": group, "null": group in null, "weight": weight, "importance": weight}
                for i, (group, weight) in enumerate(zip(groups, of_type))
            ]
            of_layers.append(
                {
                    **fields,
                    "samples": 2,
                    "tokens": 9,
                    "entropy": 0.5 + 0.1 * task_type,
                    "load_entropy": 1 + 0.1 * task_type,
                    "num_experts": len(groups),
                }
            )
    return RouterStatistics(experts, of_layers, {adapter: names})


def joined(*parts):
    names = {adapter: names for part in parts for adapter, names in part.task_type_names.items()}
    return RouterStatistics([r for p in parts for r in p.experts], [r for p in parts for r in p.layers], names)


def trace(tokens=("<s>", " The", " sun", "\n"), layers=LAYERS, **options):
    """The weight of group 0 is 0.1 more for each token and layer."""
    probabilities = {
        layer: [
            [w / 4, 3 * w / 4, 1 - w] for w in ((0.1 * (position + number)) % 1 for position in range(len(tokens)))
        ]
        for number, layer in enumerate(layers)
    }
    options = {
        "task_type_names": NAMES,
        "null_groups": [],
        "expert_groups": {layer: [2, 1] for layer in layers},
        **options,
    }
    return RouterTrace("default", "".join(tokens), list(tokens), [*range(len(tokens))], probabilities, **options)


def model(label, downstream, retention, **more):
    return {"label": label, "downstream": downstream, "retention": retention, **more}


MODELS = [
    model("weak", 50, 80, series="a", downstream_low=48, downstream_high=53),
    model("strong", 60, 90, series="a", retention_low=88.5, retention_high=91),
    model("forgetful", 70, 40, series="b"),
    model("base", 10, 100),
]
PLOTS = {
    "group_weights": lambda path: plot_group_weights(statistics(), path),
    "load": lambda path: plot_load(statistics(), path),
    "entropy": lambda path: plot_entropy(statistics(), path),
    "trace": lambda path: plot_trace(trace(), path),
    "frontier": lambda path: plot_frontier(MODELS, path),
}
OF_STATISTICS = [plot_group_weights, plot_load, plot_entropy]


def texts(labels):
    return [label.get_text() for label in labels]


def shown(figure, labels):
    """Boxes of the labels that are not empty, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return {
        label.get_text(): Text.get_window_extent(label, renderer) for label in labels if label.get_text()
    }  # no pointers


def assert_apart(boxes):
    assert len(boxes) > 1
    assert not [(one, other) for one, other in combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]


# --- files


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_suffix_gives_the_format(tmp_path, suffix, start):
    path = tmp_path / f"router{suffix}"
    plot_group_weights(statistics(), path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_drawing_gives_the_same_file(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for path in paths:
        plot_load(statistics(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_files_have_no_date(tmp_path):
    for suffix, date in ((".svg", b"<dc:date>"), (".pdf", b"/CreationDate")):
        plot_entropy(statistics(), tmp_path / f"router{suffix}")
        assert date not in (tmp_path / f"router{suffix}").read_bytes()


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_another_suffix_is_refused(tmp_path, plot):
    with pytest.raises(ValueError, match=r"router.txt' must end in .png, .svg, .pdf"):
        plot(tmp_path / "router.txt")


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_missing_matplotlib_is_explained(tmp_path, monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="A figure needs matplotlib: pip install"):
        plot(tmp_path / "router.png")


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_plots_only():
    code = "import sys, peft_loramoe.analysis; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_drawing_that_fails_writes_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), figure_file(tmp_path / "router.png", 2, 2):
        raise ZeroDivisionError
    assert not [*tmp_path.iterdir()]


def test_dollar_signs_are_no_mathematics(tmp_path):
    figure = plot_group_weights(statistics(names=[r"$\frac$", "b"]), tmp_path / "router.png")
    assert texts(figure.legends[0].get_texts())[0] == r"expert group $\frac$"
    plot_trace(trace(tokens=["$5", r" $\frac$"]), tmp_path / "trace.png")
    plot_frontier([model(r"$\frac$", 1, 2)], tmp_path / "frontier.png")


# --- order and looks

KINDS = {
    "one kind": (
        ["model.layers.3.up", "model.layers.11.up"],
        {"up": {3: "model.layers.3.up", 11: "model.layers.11.up"}},
    ),
    "by number": (["h.10.fc", "h.9.fc"], {"fc": {9: "h.9.fc", 10: "h.10.fc"}}),
    "same last part": (
        ["layer.0.attention.output.dense", "layer.0.output.dense"],
        {
            "attention.output.dense": {0: "layer.0.attention.output.dense"},
            "*.output.dense": {0: "layer.0.output.dense"},
        },
    ),
    "two numbers": (
        ["encoder.block.2.layer.1.wi", "decoder.block.2.layer.2.wi"],
        {"1.wi": {2: "encoder.block.2.layer.1.wi"}, "2.wi": {2: "decoder.block.2.layer.2.wi"}},
    ),
    "number first": (["0.up", "1.up"], {"up": {0: "0.up", 1: "1.up"}}),
    "no number": (["score", "fc1"], {"score": {0: "score"}, "fc1": {0: "fc1"}}),
}


@pytest.mark.parametrize(("layers", "kinds"), KINDS.values(), ids=KINDS)
def test_linears_are_ordered_by_kind_and_block(layers, kinds):
    found = linears_by_kind(layers)
    assert found == kinds and [[*blocks] for blocks in found.values()] == [[*blocks] for blocks in kinds.values()]


def test_curves_differ_in_colour_or_marker():
    assert len({tuple(style(i).values()) for i in range(49)}) == 49


@pytest.mark.parametrize("plot", OF_STATISTICS)
def test_one_of_several_adapters_is_drawn(tmp_path, plot):
    both = joined(statistics("a"), statistics("b", layers=["layers.7.fc1"], names=None))
    figure = plot(both, tmp_path / "router.png", adapter_name="b")
    assert figure.axes[0].get_title() == "fc1"
    with pytest.raises(ValueError, match="contain the adapters a, b; choose one with adapter"):
        plot(both, tmp_path / "router.png")
    with pytest.raises(ValueError, match="adapter_name='c' is unknown; the statistics contain a, b"):
        plot(both, tmp_path / "router.png", adapter_name="c")


@pytest.mark.parametrize("plot", OF_STATISTICS)
def test_statistics_without_records_are_refused(tmp_path, plot):
    with pytest.raises(ValueError, match="no records"):
        plot(RouterStatistics([], [], {}), tmp_path / "router.png")


@pytest.mark.parametrize("plot", OF_STATISTICS)
def test_layers_are_numbered_as_in_the_model(tmp_path, plot):
    for blocks in ([5], [3, 11]):
        figure = plot(statistics(layers=[f"layers.{block}.fc1" for block in blocks]), tmp_path / "router.png")
        panel = figure.axes[0]
        assert panel.get_xlim() == (blocks[0] - 0.5, blocks[-1] + 0.5)
        assert all(tick == int(tick) for tick in panel.get_xticks())


# --- group weights


def test_group_weights_have_panels_and_curves(tmp_path):
    figure = plot_group_weights(statistics(), tmp_path / "router.png")
    assert [panel.get_title() for panel in figure.axes] == ["up_proj", "down_proj", "", ""]
    assert [panel.get_ylabel() for panel in figure.axes[::2]] == [
        "facts samples\nrouter weight",
        "skills samples\nrouter weight",
    ]
    first, second, even = figure.axes[0].get_lines()
    assert list(first.get_xdata()) == [0, 1] and list(first.get_ydata()) == pytest.approx([0.7, 0.7])
    assert list(second.get_ydata()) == pytest.approx([0.3, 0.3])
    assert list(even.get_ydata()) == [0.5, 0.5] and even.get_color() == GREY
    labels = ["expert group facts", "expert group skills", "uniform router"]
    assert texts(figure.legends[0].get_texts()) == labels


def test_groups_of_different_sizes_have_even_weights_of_their_own(tmp_path):
    figure = plot_group_weights(statistics(sizes=(1, 3), names=None, null=[0]), tmp_path / "router.png")
    first, second, *even = figure.axes[0].get_lines()
    assert [(line.get_ydata()[0], line.get_color()) for line in even] == [
        (0.25, first.get_color()),
        (0.75, second.get_color()),
    ]
    assert texts(figure.legends[0].get_texts())[:2] == ["expert group 0 (null)", "expert group 1"]


def test_unknown_and_nameless_types_have_panels(tmp_path):
    figure = plot_group_weights(statistics(task_types=(-1, 0), names=None), tmp_path / "router.png")
    labels = [panel.get_ylabel().partition("\n")[0] for panel in figure.axes[::2]]
    assert labels == ["samples of unknown type", "type 0 samples"]


# --- load


def cells(panel):
    return panel.images[0].get_array().filled(math.nan).tolist()


def test_load_shows_every_weight(tmp_path):
    figure = plot_load(statistics(), tmp_path / "load.png")
    for panel, task_type in zip(figure.axes, (0, 0, 1, 1)):
        assert cells(panel) == [[weight, weight] for weight in WEIGHTS[task_type]]
        assert panel.images[0].get_clim() == (0, 0.4)
        assert [line.get_ydata()[0] for line in panel.get_lines()] == [1.5]  # between the groups
    assert texts(figure.axes[0].get_yticklabels()) == ["group facts   0", "1", "group skills   2", "3"]
    assert not figure.legends


def test_dead_and_dominating_experts_are_marked(tmp_path):
    first, *_, last = LAYERS
    weights = {**WEIGHTS, (last, 0): (0.01, 0.34, 0.33, 0.32), (last, 1): (0.02, 0.18, 0.4, 0.4)}
    weights |= {(first, 0): (0.1, 0.1, 0.7, 0.1), (first, 1): (0.1, 0.1, 0.7, 0.1)}
    figure = plot_load(statistics(weights=weights), tmp_path / "load.png")
    marked = [[(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in panel.get_lines()[1:]]
              for panel in figure.axes[:4]]  # fmt: skip
    assert marked == [[(0, 2, "o")], [(1, 0, "x")]] * 2
    assert texts(figure.legends[0].get_texts()) == ["dead expert", "dominating expert"]


def test_missing_experts_and_blocks_are_empty_cells(tmp_path):
    large = statistics(layers=["layers.0.fc1", "layers.2.fc1"])
    small = statistics(layers=["layers.0.fc2"], sizes=(1, 2), weights={0: (0.5, 0.3, 0.2), 1: (0.5, 0.3, 0.2)})
    figure = plot_load(joined(large, small), tmp_path / "load.png")
    nan = pytest.approx(math.nan, nan_ok=True)
    assert cells(figure.axes[0]) == [[weight, nan, weight] for weight in WEIGHTS[0]]
    assert cells(figure.axes[1]) == [[0.5], [nan], [0.3], [0.2]]
    assert texts(figure.axes[0].get_yticklabels()) == ["group facts   0", "1", "group skills   0", "1"]


@pytest.mark.parametrize("sizes", [(3, 3), (16,) * 4, (1, 63)])
def test_labels_of_the_load_do_not_overlap(tmp_path, sizes):
    weights = dict.fromkeys((0, 1), (1 / sum(sizes),) * sum(sizes))
    figure = plot_load(statistics(sizes=sizes, names=None, weights=weights), tmp_path / "load.png")
    assert_apart(shown(figure, figure.axes[0].get_yticklabels()))
    assert_apart(shown(figure, [panel.yaxis.label for panel in figure.axes[:4:2]]))


# --- entropy


def test_entropy_has_curves_for_tokens_and_means(tmp_path):
    figure = plot_entropy(statistics(task_types=(-1, 0, 1)), tmp_path / "entropy.png")
    assert [panel.get_title() for panel in figure.axes] == ["up_proj", "down_proj"]
    lines = [(line.get_linestyle(), line.get_ydata()[1]) for line in figure.axes[1].get_lines()]
    pairs = [pair for kind in (-1, 0, 1) for pair in (("-", 0.5 + 0.1 * kind), ("--", 1 + 0.1 * kind))]
    assert lines == [*pairs, (":", math.log(4))]
    labels = ["samples of unknown type", "facts samples", "skills samples", "of the mean weights", "uniform router"]
    assert texts(figure.legends[0].get_texts()) == labels


def test_entropy_panels_show_the_curves_and_the_even_router(tmp_path):
    for entropy in (0.01, 1.37):
        found = statistics()
        layers = [{**record, "entropy": entropy, "load_entropy": 1.38} for record in found.layers]
        figure = plot_entropy(RouterStatistics(found.experts, layers, found.task_type_names), tmp_path / "entropy.png")
        low, high = figure.axes[0].get_ylim()
        assert 0 <= low < entropy < math.log(4) < high and high - low > 0.25 * math.log(4)


def test_lines_without_markers_show_one_layer_too(tmp_path):
    figure = plot_entropy(statistics(layers=LAYERS[:1]), tmp_path / "entropy.png")
    assert all(line.get_marker() != "None" or len(line.get_xdata()) == 2 for line in figure.axes[0].get_lines())


# --- trace


def test_trace_shows_the_weight_of_a_group(tmp_path):
    figure = plot_trace(trace(), tmp_path / "trace.png", group="facts")
    mean, up, down = figure.axes[:3]
    assert [panel.get_ylabel() for panel in (mean, up, down)] == ["all linears", "up_proj", "down_proj"]
    rows = [[0.1 * (position + number) for position in range(4)] for number in range(4)]
    for panel, expected in ((up, rows[::2]), (down, rows[1::2]), (mean, [[sum(column) / 4 for column in zip(*rows)]])):
        assert [pytest.approx(row) for row in expected] == panel.images[0].get_array().tolist()
        assert panel.images[0].get_clim() == (0, 1)
    assert texts(up.get_yticklabels()) == ["0", "1"] and texts(down.get_xticklabels()) == ["<s>", "The", "sun", "↵"]
    assert figure.axes[3].get_ylabel() == "router weight of\ngroup facts"


def test_another_group_is_drawn_by_its_number(tmp_path):
    figure = plot_trace(trace(task_type_names=None, null_groups=[1]), tmp_path / "trace.png", group=1)
    assert figure.axes[1].images[0].get_array()[0].tolist() == pytest.approx([1, 0.9, 0.8, 0.7])
    assert figure.axes[3].get_ylabel() == "router weight of\ngroup 1 (null)"


@pytest.mark.parametrize(
    ("names", "group", "message"),
    [
        (NAMES, "art", r"group='art' is unknown; it must be one of \['facts', 'skills'\], or an index from 0 to 1"),
        (None, "facts", "group='facts' is unknown; it must be an index from 0 to 1"),
        (NAMES, 2, "group=2 is unknown"),
        (NAMES, -1, "group=-1 is unknown"),
    ],
)
def test_unknown_groups_are_refused(tmp_path, names, group, message):
    with pytest.raises(ValueError, match=message):
        plot_trace(trace(task_type_names=names), tmp_path / "trace.png", group=group)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (5, 1), (20, 12), (60, 32)])
def test_labels_of_a_trace_do_not_overlap(tmp_path, tokens, blocks):
    layers = [f"layers.{block}.{kind}" for block in range(blocks) for kind in ("gate_proj", "up_proj", "down_proj")]
    words = [f"{'token' * (i % 4)}{i}" for i in range(tokens)]
    figure = plot_trace(trace(words, layers), tmp_path / "trace.png")
    strips = figure.axes[:-1]
    numbers = shown(figure, strips[1].get_yticklabels())
    numbers |= {strip.get_ylabel(): strip.yaxis.label.get_window_extent() for strip in strips}
    assert_apart(numbers)
    words_shown = shown(figure, strips[-1].get_xticklabels())
    assert [*words_shown] == words
    if tokens > 1:
        assert_apart(words_shown)


# --- frontier


def test_frontier_has_a_point_for_each_model(tmp_path):
    panel = plot_frontier(MODELS, tmp_path / "frontier.png").axes[0]
    series = {container.get_label(): container for container in panel.containers}
    points, _, (horizontal, vertical) = series["a"].lines
    assert points.get_linestyle() == "-" and points.get_xydata().tolist() == [[50, 80], [60, 90]]
    assert horizontal.get_segments()[0].tolist() == [[48, 80], [53, 80]]
    assert vertical.get_segments()[1].tolist() == [[60, 88.5], [60, 91]]
    assert series["b"].lines[0].get_xydata().tolist() == [[70, 40]]
    (alone,) = (container for name, container in series.items() if name not in ("a", "b"))
    assert alone.lines[0].get_linestyle() == "None" and alone.lines[0].get_xydata().tolist() == [[10, 100]]
    assert len({to_hex(container.lines[0].get_color()) for container in series.values()}) == 3
    assert texts(panel.texts) == [record["label"] for record in MODELS]


def test_models_have_the_colour_and_marker_that_they_name(tmp_path):
    looks = [{"color": "#0072B2", "marker": "s"}, {"color": "#D55E00", "marker": "*"}]
    models = [{"label": str(n), "downstream": n, "retention": 9 - n, **look} for n, look in enumerate(looks)]
    points = [container.lines[0] for container in plot_frontier(models, tmp_path / "frontier.png").axes[0].containers]
    assert [{"color": line.get_color(), "marker": line.get_marker()} for line in points] == looks


def test_the_axes_say_what_is_good(tmp_path):
    panel = plot_frontier(MODELS, tmp_path / "frontier.png").axes[0]
    assert "right is better" in panel.get_xlabel() and "up is better" in panel.get_ylabel()


def test_the_frontier_joins_models_that_no_other_beats(tmp_path):
    panel = plot_frontier(MODELS, tmp_path / "frontier.png").axes[0]
    (line,) = (line for line in panel.get_lines() if line.get_label() == "frontier")
    left, bottom = panel.get_xlim()[0], panel.get_ylim()[0]
    corners = [[70, bottom], [70, 40], [60, 40], [60, 90], [10, 90], [10, 100], [left, 100]]
    assert line.get_xydata().tolist() == corners


CROWDS = {
    "spread": [model(f"model {i}", 80 + 7 * i % 10, 90 - 3 * i % 10) for i in range(10)],
    "close": [model(f"model {i}", 80 + 0.05 * i, 90 + 0.02 * i) for i in range(8)],
    "at the right": [
        model("base", 1, 90),
        model("a model with a long name", 80, 90),
        model("another long name", 80, 89),
    ],
    "joined": [model(f"model {i}", 80 + i, 90 + i, series="a") for i in range(5)],
}


@pytest.mark.parametrize("records", CROWDS.values(), ids=CROWDS)
def test_labels_of_models_cover_neither_each_other_nor_points(tmp_path, records):
    figure = plot_frontier(records, tmp_path / "frontier.png")
    panel = figure.axes[0]
    boxes = shown(figure, panel.texts)
    assert_apart(boxes)
    frame = panel.get_window_extent()
    points = panel.transData.transform([(record["downstream"], record["retention"]) for record in records])
    between = [points[i] + t / 50 * (points[i + 1] - points[i]) for i in range(len(points) - 1) for t in range(51)]
    for box in boxes.values():
        assert frame.contains(*box.min) and frame.contains(*box.max)
        assert not any(box.contains(*point) for point in (between if "series" in records[0] else points))


def test_many_labels_are_placed_at_once(tmp_path):
    records = [model(f"model number {i}", 80 + 7 * i % 10, 90 - 3 * i % 17, series="ab"[i % 2]) for i in range(20)]
    plot_frontier(records[:1], tmp_path / "warm.png")  # matplotlib loads its fonts
    start = time.process_time()
    plot_frontier(records, tmp_path / "frontier.png")
    assert time.process_time() - start < 2  # drawing alone takes a few tenths


BAD = {
    "nothing": ([], "There are no records"),
    "no dictionary": ([["LoRA", 1, 2]], r"records\[0\]=\['LoRA', 1, 2\] must be a dictionary"),
    "two colours of a series": (
        [{**MODELS[0], "series": "a", "color": colour} for colour in ("black", "grey")],
        r"series='a' have several values of color",
    ),
    "no retention": ([{"label": "LoRA", "downstream": 1}], r"records\[0\] lacks retention"),
    "an unknown field": (
        [model("a", 1, 2), model("b", 1, 2, colour="red")],
        r"records\[1\] has unknown fields: colour",
    ),
    "a label that is no text": ([model(3, 1, 2)], "label=3 must be a string"),
    "a series that is no text": ([model("a", 1, 2, series=None)], "series=None must be a string"),
    "text for a number": ([model("a", "1", 2)], "downstream='1' must be a finite number"),
    "true for a number": ([model("a", 1, True)], "retention=True must be a finite number"),
    "nan": ([model("a", 1, math.nan)], "retention=nan must be a finite number"),
    "an infinite end": (
        [model("a", 1, 2, downstream_low=0, downstream_high=math.inf)],
        "downstream_high=inf must be a finite",
    ),
    "one end": ([model("a", 1, 2, retention_low=1)], "only one of retention_low and retention_high"),
    "outside": (
        [model("a", 1, 2, downstream_low=2, downstream_high=3)],
        "downstream=1 is not between downstream_low=2 and downstream_high=3",
    ),
}


@pytest.mark.parametrize(("records", "message"), BAD.values(), ids=BAD)
def test_bad_records_are_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        plot_frontier(records, tmp_path / "frontier.png")
    assert not [*tmp_path.iterdir()]
