import sys

import pytest

from peft_loramoe.analysis import plot_group_weights


pytest.importorskip("matplotlib")


def records(adapter="default"):
    return [
        dict(adapter=adapter, layer=f"model.layers.{layer}.mlp.{kind}", task_type=task_type, expert=expert, group=expert // 2,
             weight=(0.3 if expert // 2 == task_type else 0.2))
        for layer in (0, 1) for kind in ("up_proj", "down_proj") for task_type in (0, 1) for expert in range(4)
    ]  # fmt: skip


def test_the_curves_are_the_groups_weights(tmp_path):
    figure = plot_group_weights(records(), tmp_path / "router.png", names=["facts", "tasks"])
    panels = figure.get_axes()
    assert [panel.get_title() for panel in panels] == [
        "facts samples, up_proj", "facts samples, down_proj", "tasks samples, up_proj", "tasks samples, down_proj"
    ]  # fmt: skip
    matched, even, other, _ = panels[0].get_lines()
    assert list(matched.get_xdata()) == [0, 1]
    assert list(matched.get_ydata()) == pytest.approx([0.6, 0.6])
    assert list(other.get_ydata()) == pytest.approx([0.4, 0.4])
    assert list(even.get_ydata()) == [0.5, 0.5]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_gives_the_format(suffix, start, tmp_path):
    path = tmp_path / f"router{suffix}"
    plot_group_weights(records(), path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(records=[]), "must be of one adapter, but hold 0"),
        (dict(records=records() + records("other")), "but hold 2"),
        (dict(path="router.gif"), "'router.gif' must end in .png, .svg, .pdf"),
        (dict(names=["facts"]), "must name all 2 expert groups"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot_group_weights(**{"records": records(), "path": "router.png", **options})


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        plot_group_weights(records(), "router.png")
