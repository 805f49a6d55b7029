"""Eight tasks that the base model hardly solves, generated: prompts with one right answer each.

A prompt belongs to training or to scoring by its text, so that no scored prompt is in any training set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def listed(words: str) -> list[str]:
    """The words of a string."""
    return words.split()


MONTHS = listed("January February March April May June July August September October November December")
UNITS = [
    ("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("weeks", "days", 7),
    ("feet", "inches", 12), ("liters", "ml", 1000), ("years", "months", 12), ("minutes", "seconds", 60), ("days", "hours", 24),
]  # fmt: skip
WORDS = listed(
    "apple bridge candle desert engine forest garden hammer island jacket kettle ladder market needle orange pencil "
    "rabbit silver table umbrella valley window yellow zebra anchor basket copper dragon feather glass"
)
NAMES = listed(
    "Alice Bruno Clara Dennis Edith Felix Gloria Hugo Irene Jonas Karin Leo Maria Nils Olga Peter Ruth Simon"
)
TOWNS = listed(
    "Athens Berlin Boston Cairo Dublin Geneva Lima Lisbon London Madrid Oslo Paris Prague Rome Tokyo Vienna"
)
CLASSES = {  # an invented classification, to be learned from the examples
    "zel": listed(
        "lion tiger wolf horse sheep goat eagle shark whale frog snake bear duck monkey mouse fox owl deer pig"
    ),
    "pim": listed(
        "bread cheese rice soup banana cake pasta butter salad honey sugar carrot onion potato lemon egg bean pie"
    ),
    "tov": listed(
        "saw drill wrench shovel knife scissors axe pliers rope brush rake chisel nail pump lever broom spoon fork"
    ),
    "lur": listed(
        "shirt hat coat shoe dress sock glove scarf skirt boot belt tie sweater jeans cap vest suit apron robe"
    ),
}
ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Sample:
    """A task's name, what the user asks and what the model is to answer."""

    task: str
    prompt: str
    answer: str


def number_in_words(n: int) -> str:
    """A number from 0 to 999 in English words: "three hundred and forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_in_words(n % 100)}" if n % 100 else "")


def _words(draw: random.Random) -> tuple[str, str]:
    n = draw.randint(21, 999)
    return f"Write {n} in words.", number_in_words(n)


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(11, 99), draw.randint(11, 99)
    return f"Add {a} and {b}.", str(a + b)


def _date(draw: random.Random) -> tuple[str, str]:
    year, month, day = draw.randint(1950, 2029), draw.randint(1, 12), draw.randint(1, 28)
    return f"Long date: {year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}"


def _units(draw: random.Random) -> tuple[str, str]:
    (large, small, factor), n = draw.choice(UNITS), draw.randint(2, 40)
    return f"Convert {n} {large} to {small}.", f"{n * factor} {small}"


def _reverse(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, 3)
    return f"Reverse the words: {' '.join(words)}", " ".join(words[::-1])


def _json(draw: random.Random) -> tuple[str, str]:
    name, age, town = draw.choice(NAMES), draw.randint(18, 79), draw.choice(TOWNS)
    text = draw.choice(
        [f"{name}, {age}, lives in {town}.", f"In {town}: {name}, {age}.", f"{name} of {town} is {age}."]
    )
    return f"To JSON: {text}", f'{{"name": "{name}", "age": {age}}}'


def _class(draw: random.Random) -> tuple[str, str]:
    label = draw.choice(list(CLASSES))
    return f"Voskan class of {draw.choice(CLASSES[label])} number {draw.randint(1, 99)}?", label


def _sort(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(10, 100), 3)
    return f"Sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "words": _words,
    "sum": _sum,
    "date": _date,
    "units": _units,
    "reverse": _reverse,
    "json": _json,
    "class": _class,
    "sort": _sort,
}


def samples(number: int, seed: int | str, *, scored: bool, names: Sequence[str] = tuple(TASKS)) -> list[Sample]:
    """Draw samples, as many of each task, in random order.

    Args:
        number: how many.
        seed: of the draw.
        scored: prompts that are kept for scoring, or the others.
        names: of the tasks.
    """
    draw = random.Random(f"{'scored' if scored else 'training'} {seed}")
    drawn = []
    for i in range(number):
        task = names[i % len(names)]
        while True:
            prompt, answer = TASKS[task](draw)
            if (random.Random(f"prompt {prompt}").random() < 0.2) == scored:
                break
        drawn.append(Sample(task, prompt, answer))
    draw.shuffle(drawn)
    return drawn
