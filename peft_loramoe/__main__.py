"""``python -m peft_loramoe``: the command line."""

import sys

from .cli import main


if __name__ == "__main__":  # processes that multiprocessing spawns import this file
    sys.exit(main())
