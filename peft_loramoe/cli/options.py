"""Shared parts of the parsers: their class, common options and types of values."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from ..reading import read_text


DTYPES = ("auto", "float32", "bfloat16", "float16")


class HelpFormatter(argparse.HelpFormatter):
    """Fills the paragraphs of descriptions, and keeps indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        for indented, lines in groupby(text.splitlines(), key=lambda line: not line or line.startswith(" ")):
            part = list(lines)
            filled += part if indented else self._split_lines(" ".join(part), width)
        return "".join(f"{indent}{line}\n" for line in filled)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # flags stay whole


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors.

    If it has an option --config, that names a YAML file with values of other options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse the flags, after those that a file named by --config stands for."""
        if args is not None and "--config" in self._option_string_actions:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("--config", type=Path)
            if file := finder.parse_known_args(args)[0].config:
                args = [*self._flags_of(file), *args]  # what comes later counts
        return super().parse_known_args(args, namespace)

    def _flags_of(self, file: Path) -> list[str]:
        """The options in a YAML file as flags."""
        import yaml

        try:
            text = read_text(file)
            options, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
        except RecursionError:
            self.error(f"--config {file}: cannot be read as YAML (it is nested too deeply)")
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {file}: cannot be read as YAML ({' '.join(str(error).split())})")
        if not isinstance(options, dict):
            self.error(f"--config {file}: must hold lines like `learning-rate: 1e-3`, not {options!r}")
        known = {flag for flag in self._option_string_actions if flag.startswith("--")} - {"--help", "--config"}
        keys = Counter(key.value.replace("_", "-") for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:  # YAML would take the last one
            self.error(f"--config {file}: '{twice[0]}' stands there {keys[twice[0]]} times; write it once")
        flags: list[str] = []
        for key, value in options.items():
            flag = "--" + str(key).replace("_", "-")
            if flag not in known or flag.startswith("--no-"):
                similar = difflib.get_close_matches(flag, known, n=1)
                self.error(
                    f"--config {file}: there is no option '{key}'"
                    + (f"; did you mean {similar[0][2:]}?" if similar else "")
                )
            flags += self._flag(flag, value, f"--config {file}: {key}")
        return flags

    def _flag(self, flag: str, value: Any, place: str) -> list[str]:
        action = self._option_string_actions[flag]
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                self.error(f"{place} is {value!r}; write true or false")
            off = "--no-" + flag[2:]
            return [flag] if value else [off] if off in self._option_string_actions else []
        if action.type is json_value:
            try:
                return [f"{flag}={value if isinstance(value, str) else json.dumps(value)}"]
            except (TypeError, ValueError) as error:  # YAML has dates, and lists that hold themselves
                self.error(f"{place} is {value!r}, which JSON cannot say ({error}); quote dates")
        if value is None:
            return []
        if action.nargs == "+":
            return [flag, *map(str, value if isinstance(value, list) else [value])]
        if isinstance(value, (bool, list, dict)):
            self.error(f"{place} is {value!r}; write one value")
        return [f"{flag}={value}"]

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


Command = Callable[..., Parser]


def command_adder(add: Callable[..., Parser]) -> Command:
    """A function that adds a command: its name, function, summary, details, and parsers of shared options.

    The function is given as "module:name" in this folder if its module imports torch: it is imported when it runs.
    """

    def command(name: str, function: str | Callable, summary: str, details: str, *options: Parser) -> Parser:
        description = f"{summary[0].upper()}{summary[1:]}. {details}"
        parser = add(name, help=summary, description=description, parents=options)
        parser.set_defaults(command=function, parser=parser)
        return parser

    return command


def output_option() -> Parser:
    """The option for the folder that a command creates."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write; must not exist"
    )
    return parser


def json_option() -> Parser:
    """The option to print JSON."""
    parser = Parser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def layers_option() -> Parser:
    """The option to print every linear."""
    parser = Parser(add_help=False)
    parser.add_argument("--layers", action="store_true", help="show each linear, not only the kinds of linears")
    return parser


def model_options() -> Parser:
    """The options for the base model of an adapter."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--base-model", metavar="MODEL", help="folder or Hub id (default: the one in the adapter's configuration)"
    )
    add_loading(parser)
    return parser


def add_loading(parser: argparse._ActionsContainer) -> None:
    """Add how a base model is loaded (`base_model.BaseModel.of`)."""
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise it to NF4 with bitsandbytes")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of its weights (default: auto, as they are saved)"
    )
    parser.add_argument("--device", help="cpu, cuda:1 or another (default: the GPU, if there is one)")
    add_gguf(parser)


def add_gguf(parser: argparse._ActionsContainer) -> None:
    """Add the option for a GGUF file."""
    parser.add_argument(
        "--gguf-file",
        metavar="NAME",
        help="a GGUF file in its folder or repository, which is dequantised (needs the package gguf)",
    )


def text_options(name: str, required: bool = False) -> Parser:
    """The options for a file of texts, under the given name, and for batches of them."""
    parser = Parser(add_help=False)
    parser.add_argument(
        name,
        dest="texts",
        required=required,
        type=Path,
        metavar="FILE",
        help='texts to measure on, one a line: {"text": "...", "task_type": 0}; task_type is optional',
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="texts per batch (default: 8)")
    parser.add_argument(
        "--max-length",
        type=positive,
        default=512,
        metavar="N",
        help="maximum length of a text, in tokens (default: 512)",
    )
    return parser


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return number


def steps(text: str) -> int:
    """Parse a number of steps, or -1 for no limit."""
    return -1 if text == "-1" else positive(text)


def check_output(file: Path | None, flag: str = "--output") -> None:
    """Check, before the work begins, that a file can be written.

    Args:
        file: the file, which may exist; None if none is to be written.
        flag: the option that names it, for messages.

    Raises:
        ValueError: it cannot.
    """
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{flag} {file}: is a folder; name a file.")
    if not file.parent.is_dir():
        raise ValueError(f"{flag} {file}: the folder {file.parent} does not exist; create it first.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{flag} {file}: cannot be written; choose a place where you may write.")


def json_value(text: str) -> Any:
    """A value in JSON, or a text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def rank(text: str) -> int | float:
    """Parse a rank, or the share of the squared singular values to keep."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, or the share to keep, like 0.9") from None


def name_or_index(text: str) -> int | str:
    """Parse the name or index of a task type or expert group."""
    return int(text) if text.isdecimal() else text
