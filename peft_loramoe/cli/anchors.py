"""`peft-loramoe anchors`: short texts that the base model writes, for training that keeps what it knows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from ..reading import read_json_lines, read_text
from ..training import anchors_from_texts, sample_anchors, write_anchors
from .options import Command, Parser, positive


DETAILS = """\
Anchors stand for what the model knows, so that nothing has to be labelled or replayed: give the file to
`peft-loramoe train` or to LoRAMoETrainerMixin. The model writes prose and, if its tokenizer has a chat template, as
many chats. A run that was interrupted goes on with the same command. With --texts or --dataset, anchors are the
beginnings of texts of your own."""
READ = 20_000  # records of a data set on the Hub that anchors are chosen from


def base_options(parser: argparse._ActionsContainer) -> None:
    """Add how a base model without adapters is loaded."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="base model, folder or Hub id")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the model to NF4 (needs bitsandbytes)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model's weights (default: auto, as they are saved)",
    )
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: the GPU, if any)")


def load_base(options: argparse.Namespace) -> PreTrainedModel:
    """The base model that `base_options` name, in evaluation mode."""
    quantization = None
    if options.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype),
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, device_map={"": device}, quantization_config=quantization
    ).eval()


def add_anchors(command: Command) -> None:
    """Add the command to a parser."""
    parser: Parser = command(
        "anchors", anchors, "sample short texts from a base model, which stand for what it knows", DETAILS
    )
    base_options(parser)
    parser.add_argument("--number", type=positive, default=400, metavar="N", help="how many anchors (default: 400)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file; anchors that it holds already count",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help='take texts from here: .jsonl of {"text": "..."}, or .txt, one a line',
    )
    source.add_argument(
        "--dataset", metavar="NAME", help="take texts from the column `text` of a Hub data set: NAME[:CONFIG[:SPLIT]]"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens of an anchor, without a template's (default: 32)",
    )
    parser.add_argument(
        "--chat", type=float, metavar="SHARE", help="share of chats (default: 0.5 with a chat template, else 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="texts at a time (default: 32)")


def anchors(options: argparse.Namespace) -> None:
    """Write a file of anchors."""
    if options.texts is None and options.dataset is None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        written = sample_anchors(
            load_base(options),
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
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        written = anchors_from_texts(
            texts, tokenizer, options.number, max_tokens=options.max_tokens, seed=options.seed
        )
        write_anchors(options.output, written)
    chats = sum(anchor["kind"] == "chat" for anchor in written)
    print(f"{options.output} holds {len(written)} anchors, {chats} of them chats. The first ones:")
    shown = [anchor for kind in ("prose", "chat") for anchor in written if anchor["kind"] == kind][:3]
    for anchor in shown:
        print(f"  {anchor['text'][:100]!r}")


def _texts_of_file(path: Path) -> Iterator[str]:
    if path.suffix not in (".jsonl", ".json"):
        yield from (line for line in read_text(path).split("\n") if line.strip())
        return
    yield from (_text_of(record, place) for place, record in read_json_lines(path))


def _texts_of_dataset(source: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    records = load_dataset(name, config or None, split=split or "train", streaming=True)
    return (_text_of(record, f"{source}, record {i}") for i, record in enumerate(islice(records, READ)))


def _text_of(record: Any, place: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = ", ".join(record) if isinstance(record, dict) else repr(record)
        raise ValueError(f'{place}: must have a text, like {{"text": "..."}} (found: {found}).')
    return record["text"]
