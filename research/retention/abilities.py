"""General abilities as tasks of lm-eval, generated: grammar, learning from examples, reading.

    python -m research.retention.abilities build/retention/abilities
    peft-loramoe evaluate --model build/retention/model --adapter ADAPTER ... --include-path build/retention/abilities \
        --lm-eval retention_grammar retention_in_context

Nothing here is asked as the tasks of the study are.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tasks import NAMES, TOWNS, listed


ITEMS = 100  # of each ability
SHOWN = 4  # examples before a question
TASK = """\
task: retention_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""

NOUNS = listed("boy girl doctor farmer neighbor student painter singer driver teacher lawyer pilot")
PLACES = listed("near behind beside with")
VERBS = listed("sleep smile laugh wait swim dance arrive agree work cook sing read")
THINGS = listed("book chair window letter ticket bottle garden picture lamp coin shirt spoon")
PAST_AND_PARTICIPLE = [
    ("ate", "eaten"), ("wrote", "written"), ("broke", "broken"), ("saw", "seen"), ("took", "taken"),
    ("drove", "driven"), ("chose", "chosen"), ("stole", "stolen"), ("forgot", "forgotten"), ("drew", "drawn"),
    ("hid", "hidden"), ("threw", "thrown"),
]  # fmt: skip
WOMEN, MEN = listed("woman queen actress girl aunt mother"), listed("man king actor boy uncle father")
RELATIONS = {
    "plural": [("cat", "cats"), ("box", "boxes"), ("city", "cities"), ("child", "children"), ("foot", "feet"),
               ("knife", "knives"), ("bus", "buses"), ("mouse", "mice"), ("tree", "trees"), ("leaf", "leaves")],
    "comparative": [("small", "smaller"), ("good", "better"), ("happy", "happier"), ("big", "bigger"), ("bad", "worse"),
                    ("easy", "easier"), ("hot", "hotter"), ("fast", "faster"), ("dry", "drier"), ("young", "younger")],
    "ing": [("run", "running"), ("make", "making"), ("lie", "lying"), ("sit", "sitting"), ("play", "playing"),
            ("write", "writing"), ("swim", "swimming"), ("try", "trying"), ("dance", "dancing"), ("cut", "cutting")],
    "young": [("dog", "puppy"), ("cow", "calf"), ("cat", "kitten"), ("horse", "foal"), ("sheep", "lamb"),
              ("bear", "cub"), ("goose", "gosling"), ("deer", "fawn"), ("frog", "tadpole"), ("duck", "duckling")],
    "color": [("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"), ("sky", "blue"),
              ("banana", "yellow"), ("carrot", "orange"), ("chocolate", "brown"), ("eggplant", "purple"), ("ash", "gray")],
    "place": [("fish", "water"), ("book", "library"), ("car", "garage"), ("doctor", "hospital"), ("actor", "theater"),
              ("plane", "airport"), ("bird", "nest"), ("money", "bank"), ("train", "station"), ("priest", "church")],
}  # fmt: skip


def grammar(draw: random.Random) -> dict[str, Any]:
    """A right and a wrong sentence that differ in one word."""
    first, second = draw.sample(NOUNS, 2)
    verb, thing = draw.choice(VERBS), draw.choice(THINGS)
    kind = draw.randrange(4)
    if kind == 0:  # number of the subject, with another noun before the verb
        plural = draw.random() < 0.5
        subject, other = (f"{first}s", second) if plural else (first, f"{second}s")
        forms = (verb, f"{verb}s") if plural else (f"{verb}s", verb)
        place = draw.choice(PLACES)
        pair = [f"The {subject} {place} the {other} {form} every day." for form in forms]
    elif kind == 1:
        nouns, *forms = draw.choice([(WOMEN, "herself", "himself"), (MEN, "himself", "herself")])
        who = draw.choice(nouns)
        pair = [f"The {who} looked at {form} in the mirror." for form in forms]
    elif kind == 2:
        this = draw.choice(["this", "that", "these", "those"])
        forms = (f"{thing}s", thing) if this in ("these", "those") else (thing, f"{thing}s")
        pair = [f"The {first} bought {this} {form} yesterday." for form in forms]
    else:
        past, participle = draw.choice(PAST_AND_PARTICIPLE)
        forms = (participle, past) if draw.random() < 0.5 else (past, participle)
        auxiliary = " has" if forms[0] == participle else ""
        pair = [f"The {first}{auxiliary} {form} it." for form in forms]
    return {"text": "", "choices": pair, "right": 0}


def in_context(draw: random.Random) -> dict[str, Any]:
    """A relation, shown by examples, and a word to apply it to."""
    relation = draw.choice(list(RELATIONS.values()))
    *shown, asked = draw.sample(relation, SHOWN + 1)
    wrong = draw.sample([answer for _, answer in relation if answer != asked[1]], 2) + [asked[0]]
    lines = [f"{word} -> {answer}" for word, answer in shown] + [f"{asked[0]} ->"]
    return {"text": "\n".join(lines), "choices": [f" {answer}" for answer in (asked[1], *wrong)], "right": 0}


def reading(draw: random.Random) -> dict[str, Any]:
    """Where three people are going, and what they bring; a question about one of them."""
    people, towns, things = draw.sample(NAMES, 3), draw.sample(TOWNS, 3), draw.sample(THINGS, 3)
    text = " ".join(f"{who} travels to {town} with a {thing}." for who, town, thing in zip(people, towns, things))
    asked = draw.randrange(3)
    question, answers = draw.choice(
        [("Where does {} travel to?", towns), ("What does {} bring?", [f"a {t}" for t in things])]
    )
    return {
        "text": f"{text}\nQuestion: {question.format(people[asked])}\nAnswer:",
        "choices": [f" {answer}" for answer in answers],
        "right": asked,
    }


ABILITIES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "grammar": grammar, "in_context": in_context, "reading": reading,
}  # fmt: skip


def write_tasks(folder: Path) -> None:
    """Write a folder for lm-eval's `--include-path`: a task and its items for each ability."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, item in ABILITIES.items():
        draw, items = random.Random(name), {}
        while len(items) < ITEMS:  # all different
            line = json.dumps(item(draw))
            items[line] = None
        file = folder / f"{name}.jsonl"
        file.write_text("".join(f"{line}\n" for line in items), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file.resolve()), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m research.retention.abilities", description=write_tasks.__doc__)
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder)
