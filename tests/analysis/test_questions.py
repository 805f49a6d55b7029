import json
import sys

import pytest

from peft_loramoe.analysis import Question, read_questions


pytestmark = pytest.mark.version_independent

PLAIN = [
    {"question": "Capital of France?", "answer": "Paris"},
    {"question": "Two times two?", "answer": ["4", "four"]},
]
EXPECTED = [Question("Capital of France?", ("Paris",)), Question("Two times two?", ("4", "four"))]
# The layouts of https://nlp.cs.washington.edu/triviaqa and of mandarjoshi/trivia_qa on the Hub.
TRIVIA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Park Grove (1895)", "York UK"],
                "HumanAnswers": ["Yorkshire's York"],
                "NormalizedAliases": ["park grove 1895", "york uk"],
                "Value": "York",
            },
            "Question": "Where in England was Dame Judi Dench born?",
            "QuestionId": "tc_3",
        }
    ],
    "Version": 1.0,
}
TRIVIA_ROW = {
    "question": "Where in England was Dame Judi Dench born?",
    "question_id": "tc_3",
    "answer": {
        "aliases": ["Park Grove (1895)", "York", "York UK", ""],
        "normalized_aliases": ["york"],
        "value": "York",
    },
}


def write(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_records_of_a_list(tmp_path):
    assert read_questions(write(tmp_path / "plain.json", PLAIN)) == EXPECTED


def test_records_of_lines(tmp_path):
    # U+2028 ends a line for str.splitlines, and may stand in a JSON text.
    lines = "\n\n".join(json.dumps(record) for record in PLAIN) + '\n{"question": "a\u2028b", "answer": ["c"]}\n'
    assert read_questions(str(write(tmp_path / "nq.jsonl", lines))) == [*EXPECTED, Question("a\u2028b", ("c",))]


def test_triviaqa_as_it_was_published(tmp_path):
    (question,) = read_questions(write(tmp_path / "wikipedia-dev.json", TRIVIA))
    assert question.question == "Where in England was Dame Judi Dench born?"
    assert question.answers == ("York", "Park Grove (1895)", "York UK", "Yorkshire's York")


def test_triviaqa_as_it_is_on_the_hub(tmp_path):
    (question,) = read_questions(write(tmp_path / "rows.jsonl", TRIVIA_ROW))
    assert question.answers == ("York", "Park Grove (1895)", "York UK")


CARD = """---
configs:
- {config_name: short, default: true, data_files: [{split: validation, path: short.jsonl}]}
- {config_name: long, data_files: [{split: validation, path: long.jsonl}, {split: test, path: test.jsonl}]}
---
"""


@pytest.fixture
def hub_data(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads a repository of the Hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "README.md", CARD)
    write(tmp_path / "data" / "short.jsonl", {"question": "q", "answer": ["a"], "context": [1]})
    write(tmp_path / "data" / "long.jsonl", "\n".join([json.dumps(TRIVIA_ROW)] * 2))
    write(tmp_path / "data" / "test.jsonl", TRIVIA_ROW)
    return f"hub:{tmp_path / 'data'}"


YORK = ("York", "Park Grove (1895)", "York UK")


@pytest.mark.parametrize("rest, answers", [("", [("a",)]), (":long", [YORK, YORK]), (":long:test", [YORK])])
def test_data_sets_of_the_hub(hub_data, rest, answers):
    assert [question.answers for question in read_questions(hub_data + rest)] == answers


def test_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hub:nq_open needs datasets: pip install"):
        read_questions("hub:nq_open")


# name of the file, its content, and the message; {file} is the path
BAD = {
    "no such file": ("missing.json", None, "No such file or directory"),
    "another suffix": ("questions.txt", PLAIN, "{file} must be a .json or .jsonl file, or hub:NAME"),
    "no JSON": ("questions.json", "{", "{file}, line 1: no valid JSON"),
    "no JSON in a line": ("questions.jsonl", '{"question": "q", "answer": "a"}\n\n[', "{file}, line 3: no valid JSON"),
    "no list": ("questions.json", {"Questions": []}, '{file} must be a list of records or {"Data"'),
    "no record": ("questions.json", PLAIN + ["Paris"], "{file}, record 3: must be a record like"),
    "no question": ("questions.jsonl", {"answer": "a"}, "{file}, line 1: must be a record like"),
    "a blank question": ("questions.json", [{"question": " ", "answer": "a"}], "the question is missing"),
    "no answer": ("questions.jsonl", {"question": "q"}, "{file}, line 1: the answer must be a string, .* not null"),
    "a number as answer": (
        "questions.jsonl",
        {"question": "q", "answer": [4]},
        r"the answer must be a string, .* not \[4\]",
    ),
    "no value": (
        "questions.json",
        {"Data": [{"Question": "q", "Answer": {}}]},
        "record 1: the answer must be .* not {}",
    ),
    "a blank answer": ("questions.json", [{"question": "q", "answer": ["", " "]}], "record 1: the answer is blank"),
    "nothing": ("questions.jsonl", "\n", "{file} contains no questions"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_bad_files(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        write(file, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("{file}", str(file))):
        read_questions(file)


@pytest.mark.parametrize("source", ["hub:", "hub:/", "hub:a:b:c:d"])
def test_bad_names_of_data_sets(source):
    with pytest.raises(ValueError, match=rf"{source} must have the form hub:NAME\[:CONFIG\[:SPLIT\]\]"):
        read_questions(source)


# accepted answers, a given one, whether it matches, F1 by hand
MATCHES = {
    "the same": (["Paris"], "Paris", True, 1.0),
    "case, articles, punctuation, spaces": (["The Beatles"], " the   beatles!", True, 1.0),
    "an alias": (["York", "Park Grove (1895)"], "park-grove 1895", True, 1.0),
    "quotation marks": (["Schindler\u2019s List"], "schindler s list", True, 1.0),
    "an underscore": (["New_York"], "new york", True, 1.0),
    "an article inside": (["Lord of the Rings"], "lord of rings", True, 1.0),
    "no article": (["Athens"], "thens", False, 0.0),
    "more words": (["York"], "York in England", False, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
    "fewer words": (["Sylvester Stallone", "Sly"], "Stallone", False, 2 * 1 * 0.5 / (1 + 0.5)),
    "a word too often": (["York"], "York York", False, 2 * 0.5 * 1 / (0.5 + 1)),
    "nothing": (["York"], "", False, 0.0),
    "nothing in common": (["York"], "London", False, 0.0),
    "an article as answer": (["A"], "a.", True, 1.0),
    "another article": (["A"], "the", False, 0.0),
    "nothing for an article": (["A"], "", False, 0.0),
    "a sign as answer": (["+"], " + ", True, 1.0),
    "another sign": (["+"], "-", False, 0.0),
}


@pytest.mark.parametrize("answers, given, exact, f1", MATCHES.values(), ids=MATCHES)
def test_answers_are_compared_after_normalisation(answers, given, exact, f1):
    question = Question("q", tuple(answers))
    assert (question.exact_match(given), question.f1(given)) == (exact, pytest.approx(f1))


@pytest.mark.parametrize("answers", ["Paris", ["Paris"], (), ("Paris", " "), (4,)])
def test_bad_answers(answers):
    with pytest.raises(ValueError, match="must be a tuple of at least one string, none of them blank .*'q'"):
        Question("q", answers)
