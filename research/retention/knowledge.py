"""What the base model knew: facts, ordinary prose and anchors, fixed before any training.

(`make_sets.py` wrote them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .scoring import Item
from .tasks import Sample


DATA = Path(__file__).with_name("data")
END = "<|im_end|>"


@dataclass(frozen=True)
class Fact:
    """A fact in two formats.

    Attributes:
        kind: such as "capital".
        entity: what it is about.
        statement: beginning of a sentence that the answer completes.
        question: the same as a question to a chat model.
        answer: one or a few words.
        options: wrong answers of the same kind.
        use: "statement" and "question" are scored in that format, "both" in both; "replay" is trained on.
    """

    kind: str
    entity: str
    statement: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    use: str = ""


def chat(question: str) -> str:
    """The prompt of a question in the model's chat format, without a system message."""
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"


def read(name: str) -> list[dict]:
    """The lines of a file in `data/`."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def is_held_back(index: int) -> bool:
    """Whether an anchor of `anchors.jsonl` is scored and never trained on."""
    return index % 10 == 0


def read_facts() -> list[Fact]:
    """All facts of the study."""
    return [Fact(**{**row, "options": tuple(row["options"])}) for row in read("facts.jsonl")]


class Encoder:
    """Turns facts, texts and samples into items.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def fact(self, fact: Fact, form: str) -> Item:
        """A fact as statement or question; the assistant's sentence is begun, since it answers in sentences."""
        before = fact.statement if form == "statement" else chat(fact.question) + fact.statement
        options = tuple(self.ids(f" {option}")[0] for option in fact.options)
        return Item(self.ids(before), self.ids(f" {fact.answer}"), options)

    def text(self, text: str, tokens: int = 32) -> Item:
        """The first tokens of a text, all but the first scored."""
        ids = self.ids(text)[:tokens]
        return Item(ids[:1], ids[1:])

    def sample(self, sample: Sample) -> Item:
        """A task's sample in the chat format."""
        return Item(self.ids(chat(sample.prompt)), self.ids(sample.answer + END))

    def request(self, request: str, answer: str) -> Item:
        """A user's request in the chat format; the base model's own answer is scored."""
        return Item(self.ids(chat(request)), self.ids(answer))

    def replay(self, fact: Fact) -> Item:
        """A fact as a training sample: question and whole sentence."""
        return Item(self.ids(chat(fact.question)), self.ids(f"{fact.statement} {fact.answer}.{END}"))
