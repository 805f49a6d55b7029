"""Kinds of option values: each checks one value, and says what to pass instead.

A kind is a function of an option's name and value. It returns the value, in the type that the configuration keeps, or
raises `TypeError` or `ValueError` with the name, the value and the fix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from packaging.version import InvalidVersion, Version


Kind = Callable[[str, Any], Any]

# What PEFT makes of the keys of rank_pattern and the like, and of the names in modules_to_save.
AT_THE_END = r"(.*\.)?({})$"
MODULE_TO_SAVE = r"(^|.*\.){}($|\..*)"


def shown(value: Any) -> str:
    """The value as a message shows it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # numbers of thousands of digits, foreign objects
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"


def integer(minimum: int, maximum: int, too_large: str = "") -> Kind:
    """Integers in a range, both ends included; `too_large` says why there is an upper limit."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name}={shown(value)} must be an integer, at least {minimum}.")
        if int(value) < minimum:
            raise ValueError(f"{name}={shown(value)} must be at least {minimum}.")
        if int(value) > maximum:
            raise ValueError(f"{name}={shown(value)} must be at most {maximum}{too_large}.")
        return int(value)

    return check


def number(
    minimum: float, maximum: float, *, open_minimum: bool = False, open_maximum: bool = False, why: str = ""
) -> Kind:
    """Finite numbers in an interval; `why` gives a reason for its ends."""
    interval = f"{'(' if open_minimum else '['}{minimum:g}, {maximum:g}{')' if open_maximum else ']'}"

    def check(name: str, value: Any) -> int | float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}={shown(value)} must be a number in {interval}{why}.")
        compared: Any = value  # Real does not declare that it can be; not as a float, which has no 10 ** 400
        inside = minimum <= compared <= maximum  # false for NaN
        if not inside or (open_minimum and value == minimum) or (open_maximum and value == maximum):
            raise ValueError(f"{name}={shown(value)} must be in {interval}{why}.")
        return int(value) if isinstance(value, Integral) else float(value)

    return check


def boolean(name: str, value: Any) -> bool:
    """True or False; numbers and words are not taken for them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} must be True or False.")
    return value


def choice(*choices: Any) -> Kind:
    """One of some values."""

    def check(name: str, value: Any) -> Any:
        for known in choices:
            if isinstance(value, type(known)) and value == known:
                return known
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}.")

    return check


def text(name: str, value: Any) -> str:
    """A string that can be written to a file."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={shown(value)} has a character that no file can hold ({error}); leave it out."
        ) from error
    return value


def expression(template: str = "{}") -> Kind:
    """A regular expression, as PEFT puts it into `template`."""

    def check(name: str, value: Any) -> str:
        value = text(name, value)
        try:
            re.compile(template.format(value))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{name}={shown(value)} is no valid regular expression ({error}); write '\\' before characters that "
                "are meant literally."
            ) from error
        return value

    return check


def version(name: str, value: Any) -> str:
    """A version number, such as 0.1.0."""
    try:
        Version(text(name, value))
    except InvalidVersion as error:
        raise ValueError(f"{name}={shown(value)} is no version such as '0.1.0'; leave it out.") from error
    return value


def optional(kind: Kind) -> Kind:
    """None, or what `kind` takes."""
    return lambda name, value: None if value is None else kind(name, value)


def list_of(kind: Kind, what: str, *, container: type = list, empty: bool = True) -> Kind:
    """A list (tuple, set) of such values, kept as `container`; `what` names them.

    A string is no list of characters.
    """

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple, set, frozenset)) or not (value or empty):
            raise TypeError(f"{name}={shown(value)} must be a list of {what}.")
        return container([kind(f"{name}[{i}]", entry) for i, entry in enumerate(value)])

    return check


def mapping(key: Kind, kind: Kind, what: str) -> Kind:
    """A dictionary from strings to such values; `what` describes it."""

    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}={shown(value)} must be a dictionary of {what}; {{}} for none.")
        return {key(f"a key of {name}", k): kind(f"{name}[{shown(k)}]", entry) for k, entry in value.items()}

    return check


def by_type(what: str, **kinds: Kind) -> Kind:
    """What the kind of the value's type takes: `string`, `integer`, `list` or `mapping`; `what` names all of them."""
    types = {"string": str, "integer": Integral, "list": (list, tuple, set, frozenset), "mapping": Mapping}

    def check(name: str, value: Any) -> Any:
        for kind, check_value in kinds.items():
            if isinstance(value, types[kind]) and not isinstance(value, bool):
                return check_value(name, value)
        raise TypeError(f"{name}={shown(value)} must be {what}.")

    return check
