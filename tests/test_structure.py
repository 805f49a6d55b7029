"""The walls between the rooms (docs/design.md): imports run downward only."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import peft_loramoe


pytestmark = pytest.mark.version_independent

PACKAGE = Path(peft_loramoe.__file__).parent

# From the ground up; a module (or folder) imports from lower floors only, and within its own folder.
FLOORS = [
    {"options", "streams", "version"},
    {"card", "console", "fields", "gradients", "groups", "hub", "modes", "names", "ops", "peft_api", "reading"}
    | {"targets", "writing"},
    {"config", "experts"},
    {"balance", "layer"},
    {"loading", "training", "analysis"},
    {"model", "interop"},
    {"registration", "cli", "serving"},
    {"__init__", "__main__"},
]
KNOWS_PEFT = {"config", "peft_api", "registration", "interop", "cli"}
PROGRAMS = {"cli/startup/sitecustomize.py"}  # run by Python itself: like a user, they import the package
FREE_OF_BALANCE = {"ops", "experts", "layer"}  # all that inference needs


def imported(path: Path) -> tuple[set[str], bool]:
    """Rooms of this package that a file imports from at run time, and whether it imports PEFT."""
    own, knows_peft = set(), False
    here = path.relative_to(PACKAGE).parts
    tree = ast.parse(path.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(child) for block in for_types for child in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {(*base, *name.split("."))[0] for name in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            knows_peft |= any(name.split(".")[0] == "peft" for name in names)
            own |= {(name.split(".") + ["__init__"])[1] for name in names if name.split(".")[0] == "peft_loramoe"}
    return own, knows_peft


def floor(room: str) -> int:
    return next((height for height, rooms in enumerate(FLOORS) if room in rooms), -1)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert floor(room) >= 0, f"{room} has no floor: add it to FLOORS and to docs/design.md"
    own, knows_peft = imported(path)
    if path.relative_to(PACKAGE).as_posix() in PROGRAMS:
        own -= {"__init__"}
    below = set().union(*FLOORS[: floor(room)])
    assert own - {room} <= below
    assert not (room in FREE_OF_BALANCE and "balance" in own)
    assert room in KNOWS_PEFT or not knows_peft


PACKAGES = [
    "peft_loramoe",
    *(
        module.name
        for module in pkgutil.walk_packages(peft_loramoe.__path__, "peft_loramoe.")
        if module.ispkg and not module.name.endswith(".startup")
    ),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_hides_a_module(package):
    package = importlib.import_module(package)
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    hidden = [name for name in modules if not inspect.ismodule(getattr(package, name, package))]
    assert not hidden
