"""`python -m research.method_comparison --peft-checkout PATH --anchors FILE EXPERIMENT`: see README.md."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import runpy
import sys
import warnings
from pathlib import Path


EXPERIMENTS = Path(__file__).parent / "experiments"
PROGRAM = Path("method_comparison", "MetaMathQA")
TESTED_COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
TESTED_FILES = {  # sha256
    "run.py": "087803eff6e2a80bc7b3ee19d72920bdf3022186f06a3c398cff39bf00714fd4",
    "utils.py": "8a8a0a68a2dd0422b985e08816f702cabd7054b97599a934564feed827400d19",
    "data.py": "7ea9f1339a4da2b247c6f565e1142fe2f3b3e99bb4cd56d71f4ddd75d3c40ce6",
    "default_training_params.json": "62f12d0dd4a40bfeac1df38c00ad9d3db49f841e025f722b79ed05d193e6c061",
}


def differences(program: Path) -> list[str]:
    """How a folder of PEFT's comparison, and this Python, differ from what was tested."""
    found = [
        f"{name} is another version than that of PEFT's commit {TESTED_COMMIT[:9]}"
        for name, digest in TESTED_FILES.items()
        if hashlib.sha256((program / name).read_bytes()).hexdigest() != digest
    ]
    if sys.version_info < (3, 12):
        found.append(f"PEFT's program needs Python 3.12 to save the adapter, and this is {sys.version.split()[0]}")
    return found


def program_folder(checkout: Path, untested: bool) -> Path:
    """The folder of PEFT's program in a checkout.

    Raises:
        FileNotFoundError: it is not there.
        RuntimeError: it differs from what was tested, and `untested` does not allow that.
    """
    program = checkout.resolve() / PROGRAM
    needed = [*(PROGRAM / name for name in TESTED_FILES), Path("src", "peft", "__init__.py")]
    if missing := [str(path) for path in needed if not (checkout / path).is_file()]:
        raise FileNotFoundError(
            f"--peft-checkout {checkout}: there is no {missing[0]} in it. Clone PEFT's repository; its packages do not "
            "contain the comparison."
        )
    found = differences(program)
    if found and not untested:
        raise RuntimeError(
            f"--peft-checkout {checkout}: {'; '.join(found)}. Change that, or pass --untested to run it all the same."
        )
    for difference in found:
        warnings.warn(f"Untested: {difference}.")
    return program


def experiment_folder(name: str) -> Path:
    """The folder of an experiment, from its name or path.

    Raises:
        FileNotFoundError: it has no adapter_config.json.
        ValueError: its path does not end with experiments/METHOD/NAME, which PEFT's program expects.
    """
    folder = (EXPERIMENTS / name if (EXPERIMENTS / name).is_dir() else Path(name)).resolve()
    if not (folder / "adapter_config.json").is_file():
        known = ", ".join(sorted(path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.glob("*/*")))
        raise FileNotFoundError(f"{folder} has no adapter_config.json. The experiments here are {known}.")
    if folder.parents[1].name != "experiments":
        raise ValueError(f"{folder} must be .../experiments/METHOD/NAME, as PEFT's program expects.")
    return folder


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m research.method_comparison", description=__doc__)
    parser.add_argument("experiment", help="METHOD/NAME in the folder `experiments` here, or a folder")
    parser.add_argument("--peft-checkout", type=Path, required=True, help="a clone of PEFT's repository")
    parser.add_argument("--anchors", type=Path, required=True, help="JSONL file of `peft-loramoe anchors`")
    parser.add_argument("--clean", action="store_true", help="delete the adapter after the run")
    parser.add_argument("--untested", action="store_true", help="run with versions that were not tested, too")
    options = parser.parse_args(arguments)
    try:
        program = program_folder(options.peft_checkout, options.untested)
        experiment = experiment_folder(options.experiment)
        if not options.anchors.is_file():
            raise FileNotFoundError(
                f"--anchors {options.anchors}: there is no such file; README.md says how to make it."
            )
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    anchors = options.anchors.resolve()

    sys.path[:0] = [str(program), str(program.parents[1] / "src")]  # PEFT itself is that of the checkout, too
    anchored = importlib.import_module(f"{__package__}.anchored")
    anchored.install(importlib.import_module("utils"), anchors)
    os.chdir(experiment.parents[2])
    sys.argv = ["run.py", "-v", *(["--clean"] if options.clean else []), str(experiment.relative_to(Path.cwd()))]
    runpy.run_path(str(program / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
