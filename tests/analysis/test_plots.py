import subprocess
import sys

import pytest

from peft_loramoe.analysis import plot_group_weights


def records(adapter="default", layers=("layers.0.up_proj", "layers.0.down_proj", "layers.1.up_proj"), task_types=(0, 1)):
    return [
        {"adapter": adapter, "layer": layer, "task_type": task_type, "expert": expert, "group": expert // 2, "weight": weight}
        for layer in layers
        for task_type in task_types
        for expert, weight in enumerate((0.1, 0.2, 0.3, 0.4) if task_type else (0.4, 0.3, 0.2, 0.1))
    ]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_suffix_gives_the_format(tmp_path, suffix, start):
    path = tmp_path / f"router{suffix}"
    plot_group_weights(records(), path)
    assert path.read_bytes().startswith(start)


def test_panels_and_curves(tmp_path):
    figure = plot_group_weights(records(), tmp_path / "router.png", names=["facts", "skills"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{name} samples, {kind}" for name in ("facts", "skills") for kind in ("up_proj", "down_proj")]
    first, even, second, _ = figure.axes[0].get_lines()
    assert list(first.get_xdata()) == [0, 1] and list(first.get_ydata()) == pytest.approx([0.7, 0.7])
    assert list(even.get_ydata()) == [0.5, 0.5] and list(second.get_ydata()) == pytest.approx([0.3, 0.3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["expert group facts", "expert group skills"]


def test_layers_are_drawn_at_their_block_number(tmp_path):
    blocks = ("model.layers.3.mlp.up_proj", "model.layers.11.mlp.up_proj")
    figure = plot_group_weights(records(layers=blocks), tmp_path / "router.png")
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [3, 11]


def test_unknown_type_has_a_panel(tmp_path):
    figure = plot_group_weights(records(layers=("up_proj",), task_types=(-1,)), tmp_path / "router.png", names=["a", "b"])
    assert figure.axes[0].get_title() == "unknown samples, up_proj"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(records=[]), "of one adapter, but hold 0"),
        (dict(records=records("a") + records("b")), r"hold 2: \['a', 'b'\]"),
        (dict(path="router.txt"), "path 'router.txt' must end in .png, .svg, .pdf"),
        (dict(names=["only"]), r"names=\['only'\] must name all 2 expert groups"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_group_weights(**{"records": records(), "path": tmp_path / "router.png", **arguments})


def test_matplotlib_is_imported_by_the_plot_only():
    code = "import sys, peft_loramoe.analysis; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_group_weights(records(), tmp_path / "router.png")
