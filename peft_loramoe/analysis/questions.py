"""Questions with their accepted answers: where they come from, and whether a given answer is one of them."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HUB = "hub:"
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Question:
    """A question and the answers that count as right, the usual one first.

    An accepted answer is compared after `normalize_answer`; one of which that leaves nothing, such as the letter A or a plus
    sign, with its articles, and if need be with its punctuation.

    Raises:
        ValueError: the answers are not a tuple of texts, there is none, or one is blank.
    """

    question: str
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        answers = self.answers
        if not isinstance(answers, tuple) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(
                f"answers={answers!r} must be a tuple of at least one text, none of them blank (the question is "
                f"{self.question!r})."
            )

    def exact_match(self, given: str) -> bool:
        """Whether an answer is, normalised, an accepted one."""
        return any(first == second for first, second in self._normalized(given))

    def f1(self, given: str) -> float:
        """How far the words of an answer are those of the accepted answer that they fit best, in [0, 1].

        The harmonic mean of precision and recall over normalised words.
        """
        return max(_f1(first.split(), second.split()) for first, second in self._normalized(given))

    def _normalized(self, given: str) -> Iterator[tuple[str, str]]:
        """The given and each accepted answer, both normalised in the first way that leaves something of the accepted one."""
        for accepted in self.answers:
            normalize = next(way for way in (normalize_answer, _words, _lower_case) if way(accepted))
            yield normalize(given), normalize(accepted)


def normalize_answer(text: str) -> str:
    """An answer without upper case, punctuation, English articles and surplus whitespace.

    As in TriviaQA's evaluation (https://github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py).
    """
    return _lower_case(ARTICLES.sub(" ", _words(text)))


def read_questions(source: str | Path) -> list[Question]:
    """Read questions from a file or from the Hugging Face Hub.

    A record is `{"question": "...", "answer": ...}`. The answer is a text, a list of texts (as in NQ-open), or TriviaQA's
    `{"value": "...", "aliases": [...]}`; the names may begin with capitals, as in TriviaQA's own files.

    Args:
        source: a `.jsonl` file with one record a line; a `.json` file with a list of records, or with TriviaQA's
            `{"Data": [...]}`; or `hub:NAME[:CONFIG[:SPLIT]]`, a data set of the Hub (SPLIT is "validation" if not given), for
            example `hub:mandarjoshi/trivia_qa:rc.nocontext` and `hub:google-research-datasets/nq_open`.

    Returns:
        The questions, in the order of the file. Answers that occur twice in a record, and blank ones, are dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: a data set of the Hub, without `datasets`.
        ValueError: the file or a record is not as above; the message names file and line.
    """
    records = _hub_records(str(source)) if str(source).startswith(HUB) else _file_records(Path(source))
    questions = [_question(record, place) for place, record in records]
    if not questions:
        raise ValueError(f"{source} has no question.")
    return questions


def _words(text: str) -> str:
    return _lower_case(text.lower().translate(PUNCTUATION))


def _lower_case(text: str) -> str:
    return " ".join(text.lower().split())


def _f1(given: list[str], accepted: list[str]) -> float:
    common = sum((Counter(given) & Counter(accepted)).values())
    return 2 * common / (len(given) + len(accepted)) if common else 0.0


def _file_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record and where it is."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")
    elif file.suffix == ".json":
        records = _parse(text, str(file))
        if isinstance(records, dict):
            records = records.get("Data")
        if not isinstance(records, list):
            raise ValueError(f'{file} must be a list of records, or have one as "Data"; one record a line is a .jsonl file.')
        yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, start=1))
    else:
        raise ValueError(f"{file} must be a .json or .jsonl file, or {HUB}NAME for a data set of the Hugging Face Hub.")


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source} is read with datasets: pip install datasets") from error
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source} must be {HUB}NAME[:CONFIG[:SPLIT]].")
    config, split = rest + ["", ""][len(rest) :]
    rows = load_dataset(name, config or None, split=split or "validation")
    columns = [column for column in rows.column_names if column in ("question", "answer")]  # others may be large
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows.select_columns(columns)))


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: no valid JSON ({error}).") from error


def _question(record: Any, place: str) -> Question:
    fields = _lower(record)
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{place}: must be a record like {{"question": "...", "answer": "..."}}; the question is missing.')
    if isinstance(answer, dict):
        named = _lower(answer)
        answer = [named.get("value"), *(named.get("aliases") or ()), *(named.get("humananswers") or ())]
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise ValueError(
            f'{place}: the answer must be a text, a list of texts, or {{"value": "...", "aliases": [...]}}, not '
            f"{json.dumps(record.get('answer', record.get('Answer')))[:100]}."
        )
    kept = tuple(dict.fromkeys(text.strip() for text in answers if text.strip()))
    if not kept:
        raise ValueError(f"{place}: the answer is blank.")
    return Question(question.strip(), kept)


def _lower(record: Any) -> dict[str, Any]:
    return {key.lower(): value for key, value in record.items()} if isinstance(record, dict) else {}
