"""Text and JSON files, read with errors that name the place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: str | os.PathLike[str], torn: bool = False) -> str:
    """Read a file in UTF-8, with or without a byte-order mark; line ends become "\\n".

    Args:
        path: the file.
        torn: leave out a last line without its end, which an interrupted writer leaves.

    Raises:
        OSError: the file does not exist, is a folder, or may not be read.
        ValueError: it is not UTF-8; the message names the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror}.") from error
    if torn:
        content = content[: content.rfind(b"\n") + 1]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is no UTF-8; save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n")


def parse_json(text: str, place: str, first_line: int | None = None) -> Any:
    """Parse JSON.

    Args:
        text: one value.
        place: where it stands, for errors.
        first_line: the line of the file on which `text` begins, where `place` does not name it.

    Raises:
        ValueError: it is no valid JSON, is nested too deeply, has a number of thousands of digits, or text that is no
            Unicode.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
    except json.JSONDecodeError as error:
        line = "" if first_line is None else f", line {first_line + error.lineno - 1}"
        raise ValueError(f"{place}{line}: no valid JSON ({error.msg}, column {error.colno}).") from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: a text holds half of a surrogate pair ({error.object[error.start]!r}), which is no Unicode."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place}: no valid JSON (it is nested too deeply).") from error
    except ValueError as error:
        raise ValueError(f"{place}: no valid JSON ({error}).") from error
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        OSError: as in `read_text`.
        ValueError: it is damaged; the message names file and line.

    Example:
        >>> _ = Path("facts.json").write_text('["2 + 2 = 4"]')
        >>> read_json("facts.json")
        ['2 + 2 = 4']
    """
    return parse_json(read_text(path), str(path), first_line=1)


def read_json_lines(path: str | os.PathLike[str], torn: bool = False) -> Iterator[tuple[str, Any]]:
    """Read a JSONL file: one value a line; blank lines are skipped.

    Args:
        path: the file, in UTF-8.
        torn: as in `read_text`.

    Yields:
        The place of a value, for errors, and the value.

    Raises:
        OSError: as in `read_text`.
        ValueError: it is damaged; the message names file and line.

    Example:
        >>> _ = Path("facts.jsonl").write_text('{"text": "2 + 2 = 4"}')
        >>> list(read_json_lines("facts.jsonl"))
        [('facts.jsonl, line 1', {'text': '2 + 2 = 4'})]
    """
    for number, line in enumerate(read_text(path, torn).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)
