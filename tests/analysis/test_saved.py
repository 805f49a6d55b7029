import json

import pytest

from peft_loramoe.analysis import RouterStatistics, RouterTrace


pytestmark = pytest.mark.version_independent

OF_LAYER = {"adapter": "default", "layer": "up_proj", "block": None, "linear": "up_proj", "task_type": -1}
EXPERT = {**OF_LAYER, "expert": 0, "group": 0, "null": False, "weight": 0.1 + 0.2, "importance": 0.25}
STATISTICS = RouterStatistics(
    experts=[EXPERT],
    layers=[{**OF_LAYER, "samples": 1, "tokens": 7, "entropy": 1e-300, "load_entropy": 0.5, "num_experts": 1}],
    task_type_names={"default": ["facts", "tâches"], "other": None},
)
TRACE = RouterTrace(
    adapter="default",
    text="é \ufffd 💡",
    tokens=["é", " \ufffd", " 💡"],
    token_ids=[3, 1, 2],
    layers={"up_proj": [[1 / 3, 2 / 3]] * 3, "down_proj": [[0.25, 0.75]] * 3},
    expert_groups={"up_proj": [1, 1], "down_proj": [1, 1]},
    task_type_names=None,
    null_groups=[1],
)


@pytest.mark.parametrize("result", [STATISTICS, TRACE], ids=lambda result: type(result).__name__)
def test_what_is_loaded_is_what_was_saved(result, tmp_path):
    result.save(tmp_path / "result.json")
    loaded = type(result).load(tmp_path / "result.json")
    assert loaded == result and type(loaded) is type(result)


def test_the_order_of_the_layers_is_kept(tmp_path):
    TRACE.save(tmp_path / "trace.json")
    assert list(RouterTrace.load(tmp_path / "trace.json").layers) == ["up_proj", "down_proj"]


def test_the_file_says_what_it_is(tmp_path):
    STATISTICS.save(tmp_path / "statistics.json")
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert content["kind"] == "RouterStatistics" and content["experts"] == STATISTICS.experts


def test_paths_may_be_strings(tmp_path):
    TRACE.save(f"{tmp_path}/trace.json")
    assert RouterTrace.load(f"{tmp_path}/trace.json") == TRACE


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"expert": 0}]', "the content is not a JSON object with a `kind`"),
        ('{"experts": []}', "the content is not a JSON object with a `kind`"),
        ('{"kind": "RouterTrace"}', "its kind is 'RouterTrace'"),
        (
            '{"kind": "RouterStatistics", "experts": []}',
            r"its fields are \['experts'\], not \['experts', 'layers', 'task_type",
        ),
        (
            '{"kind": "RouterStatistics", "experts": [], "layers": [], "task_type_names": {}, "more": 1}',
            r"its fields are \['experts', 'layers', 'more', 'task_type_names'\], not",
        ),
    ],
    ids=["list", "no kind", "another kind", "a field missing", "a field more"],
)
def test_other_files_are_refused(content, problem, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"file\.json' was not written by RouterStatistics\.save: {problem}"):
        RouterStatistics.load(path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "file.json").write_text("{")
    with pytest.raises(ValueError, match="file.json, line 1: no valid JSON"):
        RouterStatistics.load(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        (
            [EXPERT, {k: v for k, v in EXPERT.items() if k not in ("block", "null")}],
            r"experts\[1\] lacks block, null\.",
        ),
        ([7], r"experts\[0\]=7 is not a record\."),
        (7, r"experts is not a list of records\."),
    ],
    ids=["fields missing", "no record", "no list"],
)
def test_records_that_are_not_whole_are_refused(experts, problem, tmp_path):
    RouterStatistics(experts, STATISTICS.layers, STATISTICS.task_type_names).save(tmp_path / "file.json")
    with pytest.raises(ValueError, match=rf"file\.json' was not written by RouterStatistics\.save: {problem}"):
        RouterStatistics.load(tmp_path / "file.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        RouterStatistics.load(tmp_path / "missing.json")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.result\.json"):
        STATISTICS.save(tmp_path / "missing" / "result.json")
