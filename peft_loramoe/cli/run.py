"""Command `run`: run another Python program in this process with LORAMOE registered."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import sys
import sysconfig
import types
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any


STARTUP = Path(__file__).parent / "startup"


def find_program(command: Sequence[str]) -> Callable[[], Any]:
    """Find a Python program and prepare this process to run it.

    Sets `sys.argv` and the first entry of `sys.path` as Python does, and PYTHONPATH, so that LORAMOE is also
    registered in Python processes that the program starts (see `startup.sitecustomize`).

    Args:
        command: the words of the command: ``-m MODULE``, ``-c CODE``, ``-`` for a program from standard input, the
            path of a script, or the name of a console script of this environment; a leading ``python`` is skipped.

    Returns:
        A function that runs the program and returns the argument of `sys.exit`. Modules and scripts run as
        ``__main__``. Exceptions of the program pass through.

    Raises:
        ValueError: the program does not exist or is not a Python program.
    """
    words = list(command)
    if words and re.fullmatch(r"python(3(\.\d+)?)?(\.exe)?", words[0]):
        del words[0]
    if not words:
        raise ValueError(
            "run needs a program: a script's path, -m MODULE, or the name of a console script such as lm_eval."
        )
    name = words[0]
    if name == "-m":
        if len(words) == 1:
            raise ValueError("run -m needs the name of a module.")
        program = _module(words[1])
        sys.argv = words[1:]
    elif name == "-c":
        if len(words) == 1:
            raise ValueError("run -c needs the code of a program.")
        program = _code(words[1], "<string>")
        sys.argv = ["-c", *words[2:]]
    elif name == "-":
        program = _code(sys.stdin.read(), "<stdin>")
        sys.argv = words
    elif name.startswith("-"):
        raise ValueError(
            f"{name} is not a program; run takes a script's path, -m MODULE, -c CODE, - for standard input, or the "
            "name of a console script."
        )
    elif scripts := tuple(entry_points(group="console_scripts", name=name)):
        program = _console_script(scripts[0])
        sys.argv = [shutil.which(name, path=sysconfig.get_path("scripts")) or name, *words[1:]]
    elif Path(name).is_file() or (Path(name) / "__main__.py").is_file():
        program = _script(Path(name))
        sys.argv = words
    else:
        raise ValueError(
            f"'{name}' is neither a file, nor a console script of the environment of {sys.executable}; for a module, "
            f"-m {name}."
        )
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *([inherited] if inherited else [])])
    return program


def _module(name: str) -> Callable[[], Any]:
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        problem = "there is no such module, or it is a package without __main__"
    except (ModuleNotFoundError, ValueError) as error:  # a parent cannot be imported; no name of a module
        spec, problem = None, str(error)
    if spec is None:
        raise ValueError(f"-m {name} cannot be run with {sys.executable}: {problem}.")

    def run() -> None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def _code(code: str, name: str) -> Callable[[], Any]:
    _set_first_path("")
    try:
        compiled = compile(code, name, "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not a Python program: {error}.") from error

    def run() -> None:
        main = sys.modules["__main__"] = types.ModuleType("__main__")  # where pickle looks for the program's classes
        exec(compiled, main.__dict__)

    return run


def _console_script(script: EntryPoint) -> Callable[[], Any]:
    _set_first_path(sysconfig.get_path("scripts"))
    return lambda: script.load()()


def _script(path: Path) -> Callable[[], Any]:
    if path.is_dir() or zipfile.is_zipfile(path):  # with a __main__.py inside; runpy puts it on sys.path
        if path.is_file() and "__main__.py" not in zipfile.ZipFile(path).namelist():
            raise ValueError(f"'{path}' is not a Python program: the archive has no __main__.py.")
        if not getattr(sys.flags, "safe_path", False):
            del sys.path[0]
    else:
        try:
            compile(path.read_bytes(), str(path), "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"'{path}' is not a Python program: {error}.") from error
        _set_first_path(str(path.resolve().parent))

    def run() -> None:
        runpy.run_path(str(path), run_name="__main__")

    return run


def _set_first_path(folder: str) -> None:
    """Set the first entry of `sys.path`, which depends on the kind of program."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
