"""Anchors: short texts that the base model itself writes, which stand for what it knows (task type 0)."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from .. import options
from ..modes import base_model
from ..reading import read_json_lines


KINDS = ("prose", "chat")
MAX_COUNT = 2**31 - 1
COUNT = options.integer(1, MAX_COUNT)
SEED = options.integer(0, 2**32 - 1)  # as of transformers' `set_seed`
# Openings of a text. A model without a BOS token needs one to start from.
PREFIXES = (
    *("The", "In", "A", "It", "He", "She", "They", "This", "There", "When", "One", "For", "Many", "Some", "At", "As"),
    *("If", "On", "Most", "After", "People", "You", "We", "What", "How", "During", "An", "While", "By", "With"),
)
SENTENCE_END = re.compile("[.?!\u3002\uff1f\uff01](?=\\s|$)|\n")  # Latin and Chinese
SEPARATOR = "<|endoftext|>"  # of documents, for the models that see no BOS token: GPT-2, Qwen, SmolLM and others
SPARE = 1.3  # texts sampled for each that is missing: some repeat others or do not end
SMALLEST = 8  # texts sampled at once
FEW = 12  # batches in a row that bring nothing new, after which sampling gives up


def sample_anchors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    number: int = 400,
    *,
    max_tokens: int = 32,
    chat: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float = 0.95,
    prefixes: Sequence[str] = PREFIXES,
    path: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, str]]:
    """Sample short texts from the base model; an attached adapter is disabled meanwhile.

    Prose starts from the token that documents begin with in pretraining, where the tokenizer has one (BOS, or
    "<|endoftext|>"), and a prefix; every other text from BOS alone, if the tokenizer adds one. For chat, the model
    writes the user's turn after the template's opening of that turn (as in Magpie, Xu et al. 2024, arXiv 2406.08464)
    up to the end of a sentence, then the answer to it. Texts are distinct, whatever their case and spacing. The same
    seed, batch size and device give the same texts, also where sampling was interrupted between batches.

    Args:
        model: a causal language model, quantised or not, with or without an adapter.
        tokenizer: its tokenizer or, for a vision-language model, its processor; anchors have no images.
        number: how many anchors.
        max_tokens: tokens to sample for each; half of them for the user's turn and half for the answer in a chat. What
            the template adds comes on top.
        chat: share of chats, from 0 to 1; None for half of them if the tokenizer has a chat template, and none
            otherwise.
        seed: of the sampling. The state of torch's random number generators is left as it was.
        batch_size: texts generated at a time.
        temperature: of the sampling.
        top_p: tokens that make up this share of the probability are sampled from.
        prefixes: openings of prose, in the language of your texts.
        path: JSONL file that the anchors of each batch are appended to. Those that it holds already count: a run that
            was interrupted goes on.
        progress: show a progress bar, on a terminal.

    Returns:
        `number` records `{"text": ..., "kind": "prose" or "chat"}`. The text of a chat contains the template's tokens.

    Raises:
        TypeError: an option is not of its type.
        FileNotFoundError: there is no folder for `path`.
        ValueError: an option is out of its range, `chat` is positive for a tokenizer without a chat template, `path`
            holds more anchors of a kind than asked for, or the model writes too few distinct texts.
        RuntimeError: another process writes to `path`.

    Example:
        >>> anchors = sample_anchors(model, tokenizer, 400, path="anchors.jsonl")  # doctest: +SKIP
        >>> trainer = LoRAMoESFTTrainer(model=model, anchors=anchors, ...)  # doctest: +SKIP
    """
    number, batch_size = COUNT("number", number), COUNT("batch_size", batch_size)
    max_tokens, seed = options.integer(4, MAX_COUNT)("max_tokens", max_tokens), SEED("seed", seed)
    chat = options.optional(options.number(0, 1, why=": the share of chats"))("chat", chat)
    temperature = options.number(0, 1e6, open_minimum=True)("temperature", temperature)
    top_p = options.number(0, 1, open_minimum=True)("top_p", top_p)
    prefixes = options.list_of(_opening, "openings of texts", container=tuple)("prefixes", prefixes)
    progress = options.boolean("progress", progress)
    if path is not None:
        _check_folder(Path(path))
    processor: Any = tokenizer if hasattr(tokenizer, "tokenizer") else None
    template = None if processor is None else processor.chat_template
    wanted = _numbers(number, chat, tokenizer)
    text_only: Any = tokenizer if processor is None else processor.tokenizer
    generation = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        pad_token_id=_pad_id(text_only),
        eos_token_id=_end_ids(model, text_only),
        use_cache=True,
    )
    sampler = _Sampler(model, text_only, max_tokens, generation, template)
    anchors = read_anchors(path, torn=True) if path is not None and Path(path).exists() else []
    for kind, count in wanted.items():
        if (found := sum(anchor["kind"] == kind for anchor in anchors)) > count:
            raise ValueError(
                f"{path} holds {found} anchors of kind {kind}, more than the {count} asked for: ask for more, change "
                "`chat`, or write to another file."
            )
    size = 0
    if path is not None:
        drop_torn_line(Path(path))
        size = _size(path)
    write: dict[str, Callable[[int], list[str]]] = {
        "prose": lambda n: sampler.prose(n, prefixes),
        "chat": sampler.chats,
    }
    # A bar for people only: disable=None hides it where there is no terminal.
    bar = tqdm(total=number, initial=len(anchors), desc="anchors", disable=None if progress else True)
    with bar, base_model(model), _own_random_numbers(model):
        for kind, count in wanted.items():
            for new in _distinct(write[kind], kind, count, anchors, batch_size, seed):
                anchors += new
                bar.update(len(new))
                if path is not None:
                    if _size(path) != size:
                        raise RuntimeError(
                            f"{path} was changed while anchors were written to it: does another process write there, "
                            "too? Its content is kept; run one at a time."
                        )
                    write_anchors(path, new, append=True)
                    size = _size(path)
    return anchors


def anchors_from_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, number: int = 400, *, max_tokens: int = 32, seed: int = 0
) -> list[dict[str, str]]:
    """Take anchors from texts of your own that the model knows well, such as pretraining data.

    Args:
        texts: of any length; each is cut to its first `max_tokens` tokens.
        tokenizer: the model's tokenizer.
        number: how many anchors; a random choice if there are more distinct texts.
        max_tokens: tokens of each.
        seed: of the choice.

    Returns:
        `number` records `{"text": ..., "kind": "prose"}`, distinct.

    Raises:
        TypeError: an option is not an integer, or `texts` is not a list of strings.
        ValueError: an option is out of its range, or there are fewer distinct texts.

    Example:
        >>> anchors_from_texts(["w3 w4 w5", "w6 w7 w8"], tiny_tokenizer(), number=1, max_tokens=2, seed=0)[0]["kind"]
        'prose'
    """
    number, seed = COUNT("number", number), SEED("seed", seed)
    max_tokens = options.integer(2, MAX_COUNT)("max_tokens", max_tokens)
    if isinstance(texts, (str, Mapping)):  # its letters or keys are no texts
        raise TypeError(f"texts={options.shown(texts)} must be a list of texts.")
    distinct: dict[str, str] = {}
    for i, given in enumerate(texts):
        ids = tokenizer(
            options.text(f"texts[{i}]", given), add_special_tokens=False, truncation=True, max_length=max_tokens
        )["input_ids"]
        cut = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip().rstrip("\ufffd")
        if len(ids) > 1 and cut:
            distinct.setdefault(comparable(cut), cut)
    if len(distinct) < number:
        raise ValueError(
            f"The texts give {len(distinct)} distinct anchors of up to {max_tokens} tokens, fewer than "
            f"number={number}: ask for fewer, or give more texts."
        )
    return [{"text": text, "kind": "prose"} for text in random.Random(seed).sample(list(distinct.values()), number)]


def read_anchors(path: str | Path, *, torn: bool = False) -> list[dict[str, str]]:
    """Read a JSONL file of anchors.

    Args:
        path: one record a line, `{"text": ..., "kind": "prose" or "chat"}`; `kind` is "prose" if left out.
        torn: ignore a last line without its end, which an interrupted run leaves; then the file may hold no record.

    Returns:
        The records, each with its kind.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: `torn` is not True or False.
        ValueError: a line is not such a record, or there is none.

    Example:
        >>> write_anchors("anchors.jsonl", ["The sky is blue."])
        >>> read_anchors("anchors.jsonl")
        [{'text': 'The sky is blue.', 'kind': 'prose'}]
    """
    torn = options.boolean("torn", torn)
    anchors = [check_anchor(record, place) for place, record in read_json_lines(path, torn=torn)]
    if not anchors and not torn:
        raise ValueError(f"{path} holds no anchor; write some with `peft-loramoe anchors` or sample_anchors.")
    return anchors


def write_anchors(path: str | Path, anchors: Iterable[str | Mapping[str, Any]], *, append: bool = False) -> None:
    """Write anchors to a JSONL file.

    Args:
        path: the file.
        anchors: texts, or records with a `text` and perhaps a `kind`.
        append: add to a file that exists.

    Raises:
        FileExistsError: the file exists, and `append` is False.
        TypeError: `anchors` is one anchor, not a list of them, or `append` is not True or False.
        ValueError: an anchor is no text and no such record.

    Example:
        >>> write_anchors("more.jsonl", ["The sky is blue.", {"text": "2 + 2 = 4", "kind": "prose"}])
        >>> len(read_anchors("more.jsonl"))
        2
    """
    append = options.boolean("append", append)
    if isinstance(anchors, (str, Mapping)):  # its letters or keys are no anchors
        raise TypeError(f"anchors={options.shown(anchors)} must be a list of texts or records.")
    lines = [
        json.dumps(check_anchor(anchor, f"anchors[{i}]"), ensure_ascii=False) + "\n"
        for i, anchor in enumerate(anchors)
    ]
    if not append and Path(path).exists():
        raise FileExistsError(f"The file {path} exists already. Pass append=True, or choose another one.")
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))


def check_anchor(anchor: Any, place: str) -> dict[str, str]:
    """An anchor as a record.

    Args:
        anchor: a text, or a mapping with a `text` and perhaps a `kind`.
        place: where it stands, for errors.

    Raises:
        ValueError: it is neither, the text is empty, or the kind is unknown.
    """
    record = {"text": anchor} if isinstance(anchor, str) else anchor
    if not isinstance(record, Mapping) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise ValueError(
            f'{place}: must be a record like {{"text": "...", "kind": "prose"}}; text is missing or empty.'
        )
    if (kind := record.get("kind")) is None:
        kind = KINDS[0]
    if kind not in KINDS:
        raise ValueError(f"{place}: kind={kind!r} must be one of {', '.join(KINDS)}.")
    return {"text": options.text(f"{place}: text", record["text"]), "kind": kind}


def comparable(text: str) -> str:
    """The text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def _opening(name: str, value: Any) -> str:
    """A kind of option: a text that is not blank."""
    if not options.text(name, value).strip():
        raise ValueError(f"{name}={value!r} is blank; leave it out.")
    return value


def _check_folder(file: Path) -> None:
    """Check, before the work begins, that there is a folder for the file."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"path={str(file)!r}: the folder {file.parent} does not exist; create it first.")


def _size(path: str | Path) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, which an interrupted run leaves."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


class _Sampler:
    """Generates texts of each kind, a batch at a time."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_tokens: int,
        generation: GenerationConfig,
        template: str | None,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.generation = generation
        self.template = template  # a processor's; None for the tokenizer's own
        self.in_parts = False  # whether messages are lists of parts, as templates for images read them
        self.device = next(p.device for p in model.parameters() if p.device.type != "meta")

    def prose(self, number: int, prefixes: Sequence[str]) -> list[str]:
        start, alone = _start_of_documents(self.tokenizer)
        if not alone and not prefixes:
            raise ValueError("The tokenizer begins texts with no BOS token: give prefixes that prose starts from.")
        choices: list[int] = torch.randint(max(len(prefixes), 1), (number,)).tolist()
        prompts = [
            start + self._encode("" if not prefixes or (alone and i % 2) else prefixes[choice])
            for i, choice in enumerate(choices)
        ]
        room = self.max_tokens - max(len(prompt) - len(start) for prompt in prompts)
        texts = [p[len(start) :] + new for p, new in zip(prompts, self._generate(prompts, max(room, 1)))]
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts]

    def chats(self, number: int) -> list[str]:
        opening = self._encode(self._opening())
        turns = [self._user_turn(ids) for ids in self._generate([opening] * number, self.max_tokens // 2)]
        turns = [turn for turn in turns if turn]
        if not turns:
            return []
        prompts = [self._render(turn, add_generation_prompt=True) for turn in turns]
        answers = self._generate([self._encode(prompt) for prompt in prompts], self.max_tokens - self.max_tokens // 2)
        special = set(self.tokenizer.all_special_ids)
        whole = [
            (prompt, self.tokenizer.decode(ids))
            for prompt, ids in zip(prompts, answers)
            if not special & set(ids[:-1])
        ]
        return [prompt + answer for prompt, answer in whole if answer.strip()]

    def _opening(self) -> str:
        """What a conversation has before the user's first words."""
        mark = "USER-TURN"
        for self.in_parts in (False, True):
            before, found, _ = self._render(mark).partition(mark)
            if found and before:
                return before
            if found:
                raise ValueError(
                    "The chat template has nothing before the user's turn, so that none can be sampled: set chat=0."
                )
        raise ValueError("The chat template drops the user's turn, so that none can be sampled: set chat=0.")

    def _render(self, turn: str, **options: Any) -> str:
        content = [{"type": "text", "text": turn}] if self.in_parts else turn
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, **options)

    def _user_turn(self, ids: list[int]) -> str | None:
        """The sentences of a generated turn that are whole; None if there is none."""
        ended = bool(ids) and ids[-1] in self.generation.eos_token_id
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not ended:
            ends = [match.end() for match in SENTENCE_END.finditer(text)]
            text = text[: ends[-1]] if ends else ""
        return text.strip() or None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The tokens that follow each prompt, up to and with the one that ends the text."""
        width = max(map(len, prompts))
        pad = self.generation.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device
        )
        self.generation.max_new_tokens = max_new_tokens
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.generation)
        return [_until_end(row, self.generation.eos_token_id) for row in output[:, width:].tolist()]


def _distinct(
    sample: Callable[[int], list[str]],
    kind: str,
    count: int,
    known: Sequence[Mapping[str, Any]],
    batch_size: int,
    seed: int,
) -> Iterator[list[dict[str, str]]]:
    """Batches of new anchors of a kind, until there are `count` of it."""
    seen = {comparable(anchor["text"]) for anchor in known}
    found, in_vain = sum(anchor["kind"] == kind for anchor in known), 0
    while found < count:
        # Of what is known, so that an interrupted run goes on with the batch that it would have sampled.
        torch.manual_seed(random.Random(f"{seed} {kind} {found} {in_vain}").getrandbits(63))
        new = []
        for text in sample(min(batch_size, max(SMALLEST, math.ceil(SPARE * (count - found))))):
            if (
                len(comparable(text)) > 1
                and "\ufffd" not in text
                and comparable(text) not in seen
                and found + len(new) < count
            ):
                seen.add(comparable(text))
                new.append({"text": text, "kind": kind})
        in_vain = 0 if new else in_vain + 1
        if in_vain == FEW:
            raise ValueError(
                f"The model wrote {found} distinct anchors of kind {kind}, and nothing new in {FEW} batches; {count} "
                "were asked for. Raise temperature, top_p or max_tokens, give more prefixes, or ask for fewer anchors."
            )
        found += len(new)
        if new:
            yield new


def _numbers(number: int, chat: float | None, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, int]:
    """How many anchors of each kind."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError(f"chat={chat} needs a chat template, which the tokenizer does not have: set chat=0.")
    chats = round(number * ((0.5 if has_template else 0.0) if chat is None else chat))
    return {"prose": number - chats, "chat": chats}


def _start_of_documents(tokenizer: Any) -> tuple[list[int], bool]:
    """The token that pretraining documents begin with, if any, and whether a text can start from it alone."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return [bos], True
    # What follows a separator of packed documents may be the rest of one that was cut.
    separator = tokenizer.get_vocab().get(SEPARATOR)
    return ([] if separator is None else [separator]), False


def _pad_id(tokenizer: Any) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return list(dict.fromkeys([*ends, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]


@contextmanager
def _own_random_numbers(model: nn.Module) -> Generator[None]:
    devices = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        yield
