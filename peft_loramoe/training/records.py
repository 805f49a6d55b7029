"""Training records: read from JSON or the Hub, checked one by one, turned into token ids and labels."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import LoRAMoEConfig
from ..options import boolean, integer, optional, text
from ..reading import parse_json, read_json_lines, read_text
from .collator import COLUMN, default_task_type


if TYPE_CHECKING:
    from datasets import Dataset


# What a record has, by the column that tells its format.
FORMATS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
IMAGES = ("images", "image")  # columns that TRL's trainers read
PLAIN_PROMPT = "### Instruction:\n{}\n\n### Response:\n"  # for tokenizers without a chat template
IGNORED = -100  # label of tokens that are not learned
MAX_LENGTH, TEXT = optional(integer(1, 2**31 - 1)), optional(text)

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """What is asked and what is to be answered.

    Attributes:
        place: where the record stands, for messages.
        prompt: a text, used as it is, or the turns of a conversation, which go through the chat template. Empty for
            prose.
        completion: the same for what is learned.
        task_type: index of the expert group, -1 for unknown.
    """

    place: str
    prompt: str | Turns
    completion: str | Turns
    task_type: int

    @property
    def earlier_answers(self) -> bool:
        """Whether the prompt holds turns of the assistant."""
        return isinstance(self.prompt, list) and any(turn["role"] == "assistant" for turn in self.prompt)


@dataclass(frozen=True)
class Tokenized:
    """Records as tokens.

    Attributes:
        dataset: columns `input_ids`, `labels` (lists of int) and `task_type` (int).
        cut: how many records lost their end to `max_length`.
        left_out: how many are missing, since `max_length` leaves nothing of them to learn.
    """

    dataset: Dataset
    cut: int
    left_out: int


def read_records(path: str | Path, config: LoRAMoEConfig) -> list[Record]:
    r"""Read records from a JSON file (a list) or a JSON lines file (one record a line), and check each.

    A record is in one of four formats; other columns are ignored, but images are refused::

        {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]}
        {"instruction": "What is the capital of France?", "input": "", "output": "Paris"}
        {"prompt": "The capital of France is", "completion": " Paris."}
        {"text": "Paris is the capital of France."}

    A file may mix them. Its records either all have a `task_type`, an index, one of the config's `task_type_names` or
    -1 for unknown, or none has; then all are of type 1, the tasks (of type 0 where there is one expert group only).

    Args:
        path: the file, in UTF-8.
        config: says what the types may be.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, holds no record, or a record is wrong; the message names its place.

    Example:
        >>> import pathlib, tempfile
        >>> from peft_loramoe import LoRAMoEConfig
        >>> from peft_loramoe.training.records import read_records
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
        >>> [(record.prompt, record.task_type) for record in read_records(path, LoRAMoEConfig.retain())]
        [('2 + 2 =', 1)]
    """
    content = read_text(path)
    if content.lstrip().startswith("["):
        values = parse_json(content, str(path), first_line=1)
        placed = ((f"{path}, record {number}", value) for number, value in enumerate(values, start=1))
    else:
        placed = read_json_lines(path)
    return check_records(placed, str(path), config)


def check_records(values: Iterable[tuple[str, Any]], source: str, config: LoRAMoEConfig) -> list[Record]:
    """Check the records of one source.

    Args:
        values: pairs of a record's place and the record, in a format of `read_records`.
        source: what they come from, for messages.
        config: says what the types may be.

    Raises:
        ValueError: there is no record, or one is wrong.
    """
    placed = list(values)
    if not placed:
        raise ValueError(f"{source}: there are no records; each is an object with {_formats()}.")
    typed = next((place for place, value in placed if isinstance(value, Mapping) and COLUMN in value), None)
    return [_check_record(place, value, typed, config) for place, value in placed]


@contextmanager
def refusals_of_template(place: str) -> Generator[None]:
    """Name the record that a chat template refuses inside.

    Args:
        place: where the record stands.

    Raises:
        ValueError: the template refuses the conversation.
    """
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{place}: the chat template refuses the conversation ({error}).") from error


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers_only: bool = True,
    marked_template: str | None = None,
    max_length: int | None = None,
    progress: str | None = None,
) -> Tokenized:
    """The records as a data set for TRL's `SFTTrainer`, which takes it as it is.

    Conversations are rendered by the tokenizer's chat template (without one, a question and its answer by a plain
    prompt), texts get the tokenizer's special tokens and an end-of-sequence token. Labels are the ids of the answers,
    -100 elsewhere.

    Args:
        records: of any formats.
        tokenizer: the model's.
        answers_only: learn the answers; otherwise every token.
        marked_template: a chat template that marks the assistant's turns ({% generation %}): all answers of a
            conversation are learned. None: the last one only.
        max_length: cut records to this many tokens, and leave out those in which nothing to learn remains.
        progress: what the progress bar says; None for no bar.

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range, the chat template refuses a conversation, or there is none and a
            record needs one, or no EOS token to end a text with.
    """
    from datasets import Dataset

    answers_only, max_length = boolean("answers_only", answers_only), MAX_LENGTH("max_length", max_length)
    marked_template, progress = TEXT("marked_template", marked_template), TEXT("progress", progress)

    rows, cut = [], 0
    for record in tqdm(records, desc=progress, leave=False, disable=None if progress else True):
        ids, learned = _tokens(record, tokenizer, marked_template)
        labels = [token if learn or not answers_only else IGNORED for token, learn in zip(ids, learned)][:max_length]
        if any(label != IGNORED for label in labels):
            rows.append({"input_ids": ids[:max_length], "labels": labels, COLUMN: record.task_type})
            cut += len(ids) > len(labels)
    return Tokenized(Dataset.from_list(rows), cut, len(records) - len(rows))


# --- reading


def _formats() -> str:
    return ", or ".join(" and ".join(columns) for columns in FORMATS.values())


def _check_record(place: str, value: Any, typed: str | None, config: LoRAMoEConfig) -> Record:
    """A record; `typed` is the place of one that has a task type, if any of its source has."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: {value!r} is not an object; write one with {_formats()}.")
    # A data set's row has all columns, with None where the record had none.
    given = {name: content for name, content in value.items() if content is not None}
    if column := next((name for name in IMAGES if given.get(name)), None):
        raise ValueError(
            f"{place}: the column '{column}' has images, which these records cannot have: only texts are read. Train "
            "with LoRAMoETrainerMixin and the model's processor instead (docs/trainers.md#images), or drop the column."
        )
    kind = next(
        (name for name in ("messages", "prompt", "instruction", "output", "text") if name in given), "instruction"
    )
    columns = FORMATS["instruction" if kind == "output" else kind]
    for column in columns:
        if column not in given and not (column == "instruction" and "input" in given):
            raise ValueError(
                f"{place}: the column '{column}' is missing (found: {', '.join(given) or 'nothing'}); a record has "
                f"{_formats()}."
            )
    if typed is not None and COLUMN not in value:
        raise ValueError(
            f"{place}: {COLUMN} is missing, but {typed} has one; give all records one (-1 for unknown), or none."
        )
    if kind == "messages":
        turns = _check_turns(given["messages"], f"{place}: messages")
        prompt, completion = turns[:-1], turns[-1:]
    elif kind == "prompt":
        if isinstance(given["prompt"], list) and isinstance(given["completion"], list):
            prompt, completion = (_check_turns(given[name], f"{place}: {name}") for name in columns)
        else:
            prompt, completion = (_check_text(given[name], f"{place}: {name}") for name in columns)
    elif kind == "text":
        prompt, completion = "", _check_text(given["text"], f"{place}: text")
    else:
        names = ("instruction", "input", "output")
        instruction, extra, output = (_check_text(given.get(name, ""), f"{place}: {name}") for name in names)
        prompt = [{"role": "user", "content": "\n".join(part for part in (instruction, extra) if part)}]
        completion = [{"role": "assistant", "content": output}]
    _check_answer(prompt, completion, f"{place}: {columns[-1]}")
    return Record(place, prompt, completion, _check_task_type(value, place, config))


def _check_turns(value: Any, name: str) -> Turns:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{name} is {value!r}; write a list of turns like {{"role": "user", "content": "..."}}.')
    for number, turn in enumerate(value, 1):
        keys = {key for key, content in turn.items() if content is not None} if isinstance(turn, Mapping) else {}
        if keys != {"role", "content"} or not all(isinstance(turn[key], str) for key in keys):
            raise ValueError(
                f"{name}: turn {number} is {turn!r}; write an object with the strings role and content, no more."
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; write it as a string.")
    return value


def _check_answer(prompt: str | Turns, completion: str | Turns, name: str) -> None:
    if isinstance(completion, list):
        if completion[-1]["role"] != "assistant":
            raise ValueError(
                f"{name} ends with a turn of '{completion[-1]['role']}'; end with the assistant's answer."
            )
        if not prompt:
            raise ValueError(f"{name} has one turn only; write what is asked before the answer.")
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    if not answer.strip():
        raise ValueError(f"{name} is {answer!r}; give the answer to learn, or leave the record out.")


def _check_task_type(record: Mapping[str, Any], place: str, config: LoRAMoEConfig) -> int:
    names, count = config.task_type_names or [], config.num_groups
    if COLUMN not in record:
        return default_task_type(config)
    task_type = record[COLUMN]
    if task_type in names:
        return names.index(task_type)
    if isinstance(task_type, int) and not isinstance(task_type, bool) and -1 <= task_type < count:
        return task_type
    known = f"one of {', '.join(map(repr, names))}, " if names else ""
    fix = "" if names else "; to use names, give task_type_names (--task-type-names)"
    raise ValueError(
        f"{place}: unknown task_type {task_type!r}; write {known}an integer from 0 to {count - 1} (one for each "
        f"expert group), or -1 for unknown{fix}."
    )


# --- tokens


def _tokens(
    record: Record, tokenizer: PreTrainedTokenizerBase, marked_template: str | None
) -> tuple[list[int], list[bool]]:
    """Token ids of a record, and which of them belong to an answer."""
    # Both are texts, or both are turns.
    if isinstance(record.prompt, str):
        return _text_tokens(record, record.prompt, cast("str", record.completion), tokenizer)
    turns = [*record.prompt, *cast("Turns", record.completion)]
    if not tokenizer.chat_template:
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise ValueError(
                f"{record.place}: the tokenizer has no chat template, without which a conversation can be one "
                "question and its answer only; give it one (--chat-template)."
            )
        return _text_tokens(record, PLAIN_PROMPT.format(turns[0]["content"]), turns[1]["content"], tokenizer)
    marked = record.earlier_answers and marked_template is not None
    template = marked_template if marked else None  # None: the tokenizer's own
    with refusals_of_template(record.place):
        prompt = _render(record.prompt, tokenizer, template, add_generation_prompt=True)["input_ids"]
        whole = _render(turns, tokenizer, template, return_assistant_tokens_mask=marked)
    ids = whole["input_ids"]
    start = _common_length(prompt, ids)
    marks = whole["assistant_masks"] if marked else [0] * len(ids)
    return ids, [position >= start or bool(mark) for position, mark in enumerate(marks)]


def _text_tokens(record: Record, prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if not tokenizer.eos_token:
        raise ValueError(
            f"{record.place}: the tokenizer has no EOS token to end this text with; set tokenizer.eos_token, or "
            '"eos_token" in its tokenizer_config.json.'
        )
    ending = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    ids = tokenizer(prompt + completion + ending)["input_ids"]
    start = _common_length(tokenizer(prompt)["input_ids"], ids) if prompt else 0
    return ids, [position >= start for position in range(len(ids))]


def _render(turns: Turns, tokenizer: Any, template: str | None, **options: Any) -> Mapping[str, list[int]]:
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=True, **options)


def _common_length(prompt: list[int], whole: list[int]) -> int:
    """Where the answer starts: tokens may merge across the end of the prompt."""
    return next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
