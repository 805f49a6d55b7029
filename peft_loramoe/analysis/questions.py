"""Questions with their accepted answers: reading them and matching given answers."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub import check_source, parse_dataset
from ..reading import read_json, read_json_lines
from ..version import needs


HUB = "hub:"
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Question:
    """A question and its accepted answers, the most common one first.

    Answers are compared after `normalize_answer`. If that leaves nothing of an accepted answer, such as the letter A
    or a plus sign, articles and, if necessary, punctuation are kept.

    Raises:
        ValueError: the answers are not a tuple of strings, there are none, or one is blank.

    Example:
        >>> question = Question("What is the capital of France?", ("Paris", "Paris, France"))
        >>> question.exact_match("The paris!"), round(question.f1("Paris in France"), 2)
        (True, 0.8)
    """

    question: str
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        answers = self.answers
        if not isinstance(answers, tuple) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(
                f"answers={answers!r} must be a tuple of at least one string, none of them blank (the question is "
                f"{self.question!r})."
            )

    def exact_match(self, given: str) -> bool:
        """Whether an answer equals an accepted one after normalization."""
        return any(first == second for first, second in self._normalized(given))

    def f1(self, given: str) -> float:
        """Word overlap with the best accepted answer, in [0, 1]: the harmonic mean of precision and recall."""
        return max(_f1(first.split(), second.split()) for first, second in self._normalized(given))

    def _normalized(self, given: str) -> Iterator[tuple[str, str]]:
        """The given answer and each accepted one, both normalized as far as something of the accepted one remains."""
        for accepted in self.answers:
            normalize = next(way for way in (normalize_answer, _words, _lower_case) if way(accepted))
            yield normalize(given), normalize(accepted)


def normalize_answer(text: str) -> str:
    """Lower-case an answer and remove punctuation, English articles and extra whitespace.

    As in TriviaQA's evaluation (https://github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py).
    """
    return _lower_case(ARTICLES.sub(" ", _words(text)))


def read_questions(source: str | Path) -> list[Question]:
    """Read questions from a file or from the Hugging Face Hub.

    A record is `{"question": "...", "answer": ...}`. The answer is a string, a list of strings (as in NQ-open), or
    TriviaQA's `{"value": "...", "aliases": [...]}`. Keys may be capitalized, as in TriviaQA's files.

    Args:
        source: a `.jsonl` file with one record per line; a `.json` file with a list of records or TriviaQA's `{"Data":
            [...]}`; or a dataset of the Hub as `hub:NAME[:CONFIG[:SPLIT]]`, by default its split "validation", for
            example `hub:mandarjoshi/trivia_qa:rc.nocontext` or `hub:google-research-datasets/nq_open`.

    Returns:
        The questions, in the order of the file. Duplicate and blank answers of a record are dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: `source` is on the Hub and `datasets` is not installed.
        ValueError: the file or a record has another format; the message names file and line.

    Example:
        >>> _ = Path("facts.jsonl").write_text('{"question": "2 + 2?", "answer": ["4", "four"]}')
        >>> read_questions("facts.jsonl")
        [Question(question='2 + 2?', answers=('4', 'four'))]
    """
    records = _hub_records(str(source)) if str(source).startswith(HUB) else _file_records(Path(source))
    questions = [_question(record, place) for place, record in records]
    if not questions:
        raise ValueError(f"{source} contains no questions.")
    return questions


def _words(text: str) -> str:
    return _lower_case(text.lower().translate(PUNCTUATION))


def _lower_case(text: str) -> str:
    return " ".join(text.lower().split())


def _f1(given: list[str], accepted: list[str]) -> float:
    common = sum((Counter(given) & Counter(accepted)).values())
    return 2 * common / (len(given) + len(accepted)) if common else 0.0


def _file_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record with its location, for messages."""
    if file.suffix == ".jsonl":
        yield from read_json_lines(file)
    elif file.suffix == ".json":
        records = read_json(file)
        if isinstance(records, dict):
            records = records.get("Data")
        if not isinstance(records, list):
            raise ValueError(
                f'{file} must be a list of records or {{"Data": [...]}}; save one record per line as .jsonl.'
            )
        yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, start=1))
    else:
        raise ValueError(f"{file} must be a .json or .jsonl file, or {HUB}NAME for a dataset of the Hugging Face Hub.")


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(needs(source, "datasets", "train")) from error
    name, config, split = parse_dataset(source.removeprefix(HUB), source, HUB)
    check_source(name, "README.md", repo_type="dataset", what=source)
    rows = load_dataset(name, config, split=split or "validation")
    columns = [
        column for column in rows.column_names if column in ("question", "answer")
    ]  # other columns may be large
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows.select_columns(columns)))


def _question(record: Any, place: str) -> Question:
    fields = _lower(record)
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f'{place}: must be a record like {{"question": "...", "answer": "..."}}; the question is missing.'
        )
    if isinstance(answer, dict):
        named = _lower(answer)
        answer = [named.get("value"), *(named.get("aliases") or ()), *(named.get("humananswers") or ())]
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise ValueError(
            f'{place}: the answer must be a string, a list of strings, or {{"value": "...", "aliases": [...]}}, not '
            f"{json.dumps(record.get('answer', record.get('Answer')))[:100]}."
        )
    kept = tuple(dict.fromkeys(text.strip() for text in answers if text.strip()))
    if not kept:
        raise ValueError(f"{place}: the answer is blank.")
    return Question(question.strip(), kept)


def _lower(record: Any) -> dict[str, Any]:
    return {key.lower(): value for key, value in record.items()} if isinstance(record, dict) else {}
