"""The walls between the rooms (docs/design.md): imports run downward only."""

import ast
from pathlib import Path

import pytest

import peft_loramoe


PACKAGE = Path(peft_loramoe.__file__).parent

# Module (or folder) -> what it may import from this package, and whether it may know PEFT.
ROOMS = {
    "version": ((), False),
    "ops": (("routing",), False),
    "routing": ((), False),
    "balance": ((), False),
    "samples": ((), False),
    "targets": ((), False),
    "experts": (("ops",), False),
    "geometry": ((), False),
    "modes": ((), False),
    "card": (("config",), False),  # config for type annotations only
    "config": (("card", "version"), True),
    "peft_api": ((), True),
    "collectives": ((), False),
    "forward_pass": (("balance", "config", "experts", "samples"), False),
    "terms": (("balance", "collectives", "config", "forward_pass"), False),
    "recorder": (("config", "experts", "forward_pass", "samples", "terms"), False),
    "layer": (("config", "experts", "peft_api", "recorder"), False),  # config and recorder for annotations only
    "loading": (("recorder",), False),
    "model": (("config", "layer", "loading", "peft_api", "recorder", "targets"), False),
    "registration": (("card", "config", "loading", "model", "recorder"), True),
    "__init__": (("config", "experts", "layer", "model", "recorder", "registration", "version"), False),
    "analysis": (("__init__", "geometry", "modes"), False),
    "training": (("__init__", "samples"), False),
    "interop": (("__init__", "card", "geometry", "modes", "peft_api", "routing", "samples"), True),
    "cli": (("__init__", "analysis", "card", "interop"), True),
    "__main__": (("cli",), False),
}


def imports(path: Path) -> tuple[set[str], bool]:
    """Rooms of this package that a file imports from, and whether it imports PEFT."""
    own, knows_peft = set(), False
    here = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            own.add((*base, *(node.module or "__init__").split("."))[0])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            knows_peft |= any(name.split(".")[0] == "peft" for name in names)
            own |= {(name.split(".") + ["__init__"])[1] for name in names if name.split(".")[0] == "peft_loramoe"}
    return own, knows_peft


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ROOMS, f"{path.name} has no place in docs/design.md"
    allowed, may_know_peft = ROOMS[room]
    own, knows_peft = imports(path)
    assert own - {room} <= set(allowed)
    assert may_know_peft or not knows_peft


def test_files_are_small():
    assert not {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
