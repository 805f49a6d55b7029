"""`peft-loramoe anchors`: short texts that the base model writes, for training that keeps what it knows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..hub import check_source, parse_dataset
from ..reading import read_json_lines, read_text
from ..training import anchors_from_texts, sample_anchors, write_anchors
from ..training.anchors import KINDS
from ..version import needs
from .base_model import BaseModel
from .options import check_output


READ = 20_000  # records of a data set on the Hub that anchors are chosen from


def anchors(options: argparse.Namespace) -> None:
    """Write a file of anchors."""
    check_output(options.output)
    base = BaseModel.of(options, options.model)
    if options.texts is None and options.dataset is None:
        tokenizer = base.tokenizer()
        written = sample_anchors(
            base.load(),
            tokenizer,
            options.number,
            max_tokens=options.max_tokens,
            chat=options.chat,
            seed=options.seed,
            batch_size=options.batch_size,
            path=options.output,
        )
    else:
        if options.chat is not None:
            raise ValueError(f"--chat {options.chat} has no effect with texts of your own; leave it out.")
        if options.output.exists():  # before a data set is loaded for it
            raise FileExistsError(f"The file '{options.output}' exists already. Remove it, or choose another one.")
        texts = _texts_of_file(options.texts) if options.texts is not None else _texts_of_dataset(options.dataset)
        written = anchors_from_texts(
            texts, base.tokenizer(), options.number, max_tokens=options.max_tokens, seed=options.seed
        )
        write_anchors(options.output, written)
    chats = sum(anchor["kind"] == "chat" for anchor in written)
    print(f"{options.output} holds {len(written)} anchors, {chats} of them chats. The first ones:")
    for kind in KINDS:
        for anchor in [anchor for anchor in written if anchor["kind"] == kind][:2]:
            print(f"  {kind:5}  {anchor['text'][:68]!r}")


def _texts_of_file(path: Path) -> Iterator[str]:
    if path.suffix not in (".jsonl", ".json"):
        yield from (line for line in read_text(path).split("\n") if line.strip())
        return
    yield from (_text_of(record, place) for place, record in read_json_lines(path))


def _texts_of_dataset(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(needs(f"--dataset {source}", "datasets", "train")) from error
    name, config, split = parse_dataset(source, f"--dataset {source!r}")
    check_source(name, "README.md", repo_type="dataset", what=f"--dataset {source}")
    records = load_dataset(name, config, split=split or "train", streaming=True)
    return (_text_of(record, f"{source}, record {i}") for i, record in enumerate(islice(records, READ), start=1))


def _text_of(record: Any, place: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = ", ".join(record) if isinstance(record, dict) else repr(record)
        raise ValueError(f'{place}: must have a text, like {{"text": "..."}} (found: {found}).')
    return record["text"]
