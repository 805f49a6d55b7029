"""Files of anchors, and anchors out of texts that there are already."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


KINDS = ("prose", "chat")


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
        TypeError: an option is not an integer.
        ValueError: an option is not positive, or there are fewer distinct texts.
    """
    check_counts(number=number, max_tokens=max_tokens)
    distinct: dict[str, str] = {}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_tokens)["input_ids"]
        cut = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip().rstrip("\ufffd")
        if len(ids) > 1 and cut:
            distinct.setdefault(comparable(cut), cut)
    if len(distinct) < number:
        raise ValueError(
            f"The texts give {len(distinct)} distinct anchors of up to {max_tokens} tokens, fewer than number={number}: ask "
            "for fewer, or give more texts."
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
        ValueError: a line is not such a record, or there is none.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    anchors = []
    for number, line in enumerate(lines[:-1] if torn else lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no valid JSON ({error}).") from error
        anchors.append(check_anchor(record, f"{path}, line {number}"))
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
        ValueError: an anchor is no text and no such record.
    """
    lines = [json.dumps(check_anchor(anchor, f"anchors[{i}]"), ensure_ascii=False) + "\n" for i, anchor in enumerate(anchors)]
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
        raise ValueError(f'{place}: must be a record like {{"text": "...", "kind": "prose"}}; text is missing or empty.')
    if (kind := record.get("kind") or KINDS[0]) not in KINDS:
        raise ValueError(f"{place}: kind={kind!r} must be one of {', '.join(KINDS)}.")
    return {"text": record["text"], "kind": kind}


def comparable(text: str) -> str:
    """The text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def check_counts(**options: Any) -> None:
    """Raise unless the options are positive integers."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be an integer.")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, which an interrupted run leaves."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)
