"""Entry point of the command line: parse arguments, run the command, report errors."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from .arguments import PROGRAM, build_parser
from .run import find_program


# Raised for bad input, here and in libraries. All other errors are bugs and show their traceback.
ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError)


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
    try:
        if runs:  # argparse would parse the options of the program
            program = find_program(words[2:] if words[1:2] == ["--"] else words[1:])
        else:
            options = build_parser().parse_args(words)
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                with _cleaning_up_when_terminated():
                    options.command(options)
    except ERRORS as error:
        if not runs and options.traceback:
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return program() if runs else 0


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


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):  # but no deprecation warnings of libraries
        print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
