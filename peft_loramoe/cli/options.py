"""What the commands' parsers share: their class, options that several commands have, types of values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


Command = Callable[..., Parser]


def command_adder(add: Callable[..., Parser]) -> Command:
    """A function that adds a command: its name, what it calls, a line about it, more about it, and parsers of its options."""

    def command(name: str, function: Callable, summary: str, details: str, *options: Parser) -> Parser:
        description = f"{summary[0].upper()}{summary[1:]}. {details}"
        parser = add(name, help=summary, description=description, parents=options)
        parser.set_defaults(command=function)
        return parser

    return command


def output_option() -> Parser:
    """The folder that a command writes."""
    parser = Parser(add_help=False)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    return parser


def json_option() -> Parser:
    """JSON instead of what people read."""
    parser = Parser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def model_options() -> Parser:
    """The base model, and where it runs."""
    parser = Parser(add_help=False)
    parser.add_argument("--base-model", metavar="MODEL", help="folder or Hub id (default: the one that the adapter names)")
    parser.add_argument("--device", help="where the model runs, for example cpu or cuda:1 (default: the GPU, if any)")
    return parser


def text_options(name: str, required: bool = False) -> Parser:
    """The file with the texts that the model reads, under the command's name for it, and how they become batches."""
    parser = Parser(add_help=False)
    parser.add_argument(
        name,
        dest="texts",
        required=required,
        type=Path,
        metavar="FILE",
        help='texts to measure on, one a line: {"text": "...", "task_type": 0}; task_type, an index or a name, may be left out',
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument("--max-length", type=positive, default=512, metavar="N", help="tokens of a text (default: 512)")
    return parser


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 1")
    return int(text)


def rank(text: str) -> int | float:
    """A rank, or the share of the squared singular values to keep."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, or the share to keep, like 0.9") from None


def name_or_index(text: str) -> int | str:
    """A task type or expert group."""
    return int(text) if text.isdecimal() else text
