"""Entry point of the command line: parse arguments, run the command, report errors."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shlex
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .arguments import PROGRAM, build_parser
from .run import find_program


# Raised for bad input, here and in libraries. All other errors are bugs and show their traceback.
ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)
# Logger -> what it says of other packages when they are imported, and of which no user here can act on.
NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # Intel CPUs with AVX512-BF16
}


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command line.

    Args:
        arguments: the arguments without the name of the program; None for those of this process.

    Returns:
        The exit code: 0, or 2 after a one-line message about bad input; for `run`, the value that the program
        returned.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    runs = words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"])
    options = Namespace(traceback="--traceback" in words, parser=None)  # until they are parsed
    try:
        if runs:  # argparse would parse the options of the program
            program = find_program(words[2:] if words[1:2] == ["--"] else words[1:])
            import_package()
        else:
            options = build_parser().parse_args(words)
            with warnings.catch_warnings():
                warnings.showwarning = lambda *warning, **_: _show_warning(options, *warning)
                with _cleaning_up_when_terminated():
                    _function(options.command)(options)
    except Exception as error:
        if not isinstance(error, _errors()) or (not runs and options.traceback):
            raise
        text = " ".join(str(error).split())
        print(f"{PROGRAM}: error: {text if runs else _with_flags(text, options)}", file=sys.stderr)
        return 2
    return program() if runs else 0


def import_package() -> None:
    """Import what `peft_loramoe/__init__.py` left out while the arguments were parsed, and register the tuner."""
    entry = sys.modules.get("_peft_loramoe_command")
    if entry is not None and entry.PARSING:
        entry.PARSING = False
        for name, text in NOISE.items():
            logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
        importlib.reload(sys.modules["peft_loramoe"])


def _function(command: str | Callable) -> Callable:
    """The function of a command, which is named by its module here, a colon and its name."""
    if not isinstance(command, str):
        return command
    import_package()
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    module, _, name = command.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _with_flags(message: str, options: Namespace) -> str:
    """The message with options written as on the command line: `--top-k 9` for `top_k=9`, `--top-k` for `top_k`."""
    for action in () if options.parser is None else options.parser._actions:
        name, flags = action.dest, [flag for flag in action.option_strings if flag.startswith("--")]
        if not flags:
            continue
        for value in (getattr(options, name, None), *(action.choices or ())):
            flag = _as_flag(flags, value)
            for written in (f"{name}={value!r}", f"{name}={value}"):
                # whole words only: not in `set_top_k=9`, and not in `top_k=90` or `top_k=9.5`
                whole = rf"(?<![\w.-]){re.escape(written)}(?!\w|\.\d)"
                message = re.sub(whole, lambda _, flag=flag: flag, message)
        if "_" in name:  # no word of the language
            message = re.sub(rf"(?<![\w.-]){name}(?![\w=(]|\.\w)", flags[0], message)
    return message


def _as_flag(flags: list[str], value: Any) -> str:
    """An option with its value."""
    if value is None:
        return f"no {flags[0]}"
    if isinstance(value, bool):
        return flags[0] if value else flags[-1]
    if isinstance(value, (list, dict)):
        value = json.dumps(value, default=str)
    return f"{flags[0]} {shlex.quote(value) if isinstance(value, str) else value}"


def _errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError  # a chat template refuses a conversation
    from safetensors import SafetensorError

    return (*ERRORS, SafetensorError, TemplateError)


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what it was writing is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _show_warning(options: Namespace, message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):  # but no deprecation warnings of libraries
        print(f"{PROGRAM}: warning: {_with_flags(str(message), options)}", file=sys.stderr)
