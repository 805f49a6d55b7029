"""The public names and their signatures, in tests/api.txt: a change there is a change for users (docs/release.md).

`make api` writes the file.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest


pytestmark = pytest.mark.version_independent

FILE = Path(__file__).parent / "api.txt"
PACKAGES = ("peft_loramoe", "peft_loramoe.analysis", "peft_loramoe.interop", "peft_loramoe.training")


def describe(name: str, value: object) -> list[str]:
    """The name with its signature; for a class, also the fields, properties and public methods that are not inherited
    from other packages."""
    if inspect.isfunction(value):
        return [f"{name}{signature(value)}"]
    if not inspect.isclass(value):
        return [name]
    classes = [base for base in reversed(value.__mro__) if base.__module__.startswith("peft_loramoe")]
    lines = []
    if dataclasses.is_dataclass(value):
        names = {field for base in classes for field in vars(base).get("__annotations__", {})}
        lines += [
            f"{field.name}: {field.type}{default(field)}" for field in dataclasses.fields(value) if field.name in names
        ]
    for member, of_class in {name: member for base in classes for name, member in vars(base).items()}.items():
        method = getattr(of_class, "__func__", of_class)
        public = not member.startswith("_") or (member == "__init__" and not dataclasses.is_dataclass(value))
        if public and isinstance(method, property):
            lines += [member]
        elif public and inspect.isfunction(method):
            lines += [f"{member}{signature(method)}"]
    return [f"class {name}", *(f"    {line}" for line in lines)]


def signature(function: Callable) -> str:
    """Its signature, whether or not its module postpones the evaluation of annotations."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return "" if field.default_factory is dataclasses.MISSING else f" = {field.default_factory.__name__}()"


def snapshot() -> str:
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        lines += [f"# {package}", ""]
        for name in sorted(module.__all__):
            lines += describe(name, getattr(module, name))
        lines += [""]
    return "\n".join(lines)


def test_the_public_names_and_signatures_are_those_on_file():
    assert snapshot() == FILE.read_text(encoding="utf-8"), "see docs/release.md; `make api` writes tests/api.txt"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_documented(package):
    module = importlib.import_module(package)
    values = [getattr(module, name) for name in module.__all__]
    assert [value for value in values if callable(value) and not inspect.getdoc(value)] == []


if __name__ == "__main__":
    FILE.write_text(snapshot(), encoding="utf-8")
