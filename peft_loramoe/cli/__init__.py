"""The command line: ``python -m peft_loramoe``, or the console script ``peft-loramoe``."""

from .program import main


__all__ = ["main"]
