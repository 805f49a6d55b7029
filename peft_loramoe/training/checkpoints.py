"""Which checkpoint of an interrupted run is whole."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WEIGHTS = re.compile(
    r"(model|pytorch_model|pytorch_model_fsdp)([-_].*)?(\.safetensors|\.bin)?"
)  # a file, or a folder of shards
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RNG_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
SAVED_BY_TORCH = (".pt", ".pth", ".bin")  # zip files, whose directory comes last
ZIP_START = b"PK\x03\x04"


def last_complete_checkpoint(output_dir: str | Path, num_processes: int | None = None) -> str | None:
    """The newest `checkpoint-N` folder of a Trainer run that was written to its end.

    For `trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))` after a run that was killed
    at whatever moment; transformers' `get_last_checkpoint` returns a folder that the run was killed in.

    A checkpoint is complete if

    - `trainer_state.json`, which Trainer writes last, is an object whose `global_step` is that of the folder's name;
    - there are weights: the model's, an adapter's beside each readable `adapter_config.json`, or DeepSpeed's, in the
      folder that its `latest` names;
    - there are an optimizer's, a scheduler's and every process's random state, or none of the three
      (`save_only_model`);
    - no file is cut off: the headers of safetensors files describe what is there, zip files have their directory, and
      sharded folders their `.metadata`.

    Other processes than the one that writes `trainer_state.json` write some of the files, and deleting an old
    checkpoint can be cut short too. Only file ends and headers are read, so a value that changed inside a tensor goes
    unnoticed. Nor can it recognise a folder of a finished earlier run that a run started anew in the same `output_dir`
    had begun to overwrite. Whatever is in a folder, it is skipped or taken, and never raises.

    Args:
        output_dir: the run's `output_dir`, on storage that all processes share.
        num_processes: number of processes that wrote the checkpoints: all their random states must be there. None: as
            many as the highest number among those files says.

    Returns:
        The folder, or None if `output_dir` has no complete checkpoint or does not exist. Newer folders that are torn
        are named in a warning.

    Raises:
        ValueError: `num_processes` is not a positive integer.

    Example:
        >>> last_complete_checkpoint("a folder without checkpoints") is None
        True
    """
    if num_processes is not None and (not isinstance(num_processes, int) or num_processes < 1):
        raise ValueError(f"num_processes={num_processes!r} must be a positive integer, or None.")
    output_dir = Path(output_dir)
    try:
        folders = [path for path in output_dir.iterdir() if path.is_dir()]
    except (OSError, ValueError):  # there is no such folder, or it cannot be read
        folders = []
    steps = {int(match[1]): path for path in folders if (match := CHECKPOINT.fullmatch(path.name))}
    for step, folder in sorted(steps.items(), reverse=True):
        try:
            fault = next(_faults(folder, step, num_processes), None)
        except Exception as error:  # unreadable, or what nobody writes
            fault = f"it cannot be read ({type(error).__name__}: {error})"
        if fault is None:
            return str(folder)
        warnings.warn(
            f"Skipped checkpoint {folder}: {fault}. The run was probably killed while it wrote or deleted the folder."
        )
    return None


def _faults(folder: Path, step: int, num_processes: int | None) -> Iterator[str]:
    """What is missing or damaged in a checkpoint."""
    yield from _state_faults(folder / "trainer_state.json", step)
    names = {path.name for path in folder.iterdir() if path.exists()}
    deepspeed = "latest" in names  # then the weights may be in its own files only
    adapters = [path for path in (folder, *folder.iterdir()) if (path / "adapter_config.json").is_file()]
    if not (deepspeed or adapters or any(WEIGHTS.fullmatch(name) for name in names)):
        yield "it has no weights"
    for adapter in adapters:
        if not isinstance(_read_json(adapter / "adapter_config.json"), dict):
            yield f"{adapter.relative_to(folder.parent) / 'adapter_config.json'} is no JSON object"
        if not (deepspeed or any((adapter / name).is_file() for name in ADAPTER_WEIGHTS)):
            yield f"{adapter.relative_to(folder.parent)} has an adapter_config.json but no weights"
    if deepspeed:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        if tag not in names or not (folder / tag).is_dir():
            yield f"'latest' names the folder '{tag}', which is not there"
    yield from _resumption_faults(names, deepspeed, num_processes)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_whole(path):
            yield f"{path.relative_to(folder)} is cut off"
        if path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
            yield f"{path.parent.name} has shards but no .metadata, which is written last"


def _state_faults(path: Path, step: int) -> Iterator[str]:
    if not path.is_file():
        yield "trainer_state.json, which is written last, is not there"
        return
    state = _read_json(path)
    if state is None:
        yield "trainer_state.json, which is written last, is cut off"
        return
    if not isinstance(state, dict) or state.get("global_step") != step:
        yield f"trainer_state.json is not of step {step}"


def _read_json(path: Path) -> Any:
    """What a JSON file holds; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # of JSON or of UTF-8; nested too deeply
        return None


def _resumption_faults(names: set[str], deepspeed: bool, num_processes: int | None) -> Iterator[str]:
    """Optimizer, scheduler and random states: all of them, or, with `save_only_model`, none."""
    random_states = {match[1] for name in names if (match := RNG_STATE.fullmatch(name))}
    optimizer = deepspeed or any(name.partition(".")[0] in ("optimizer", "optimizer_0") for name in names)
    scheduler = "scheduler.pt" in names
    if not (random_states or optimizer or scheduler):
        return
    if not optimizer:
        yield "it has no optimizer state"
    if not scheduler and not deepspeed:  # DeepSpeed may keep it in its own files
        yield "scheduler.pt is not there"
    indexed = [int(index) for index in random_states if index]
    if indexed or (num_processes or 1) > 1:  # several processes; each writes its own, some after trainer_state.json
        count = max(num_processes or 2, *(index + 1 for index in indexed), 2)
        expected = {str(rank): f"rng_state_{rank}.pth" for rank in range(count)}
    else:
        expected = {None: "rng_state.pth"}
    for rank, name in expected.items():
        if rank not in random_states:
            yield f"{name} is not there"


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return _is_whole_safetensors(path)
    if path.suffix not in SAVED_BY_TORCH or zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:  # not cut off if it is of torch's older format, which DeepSpeed writes
        return not ZIP_START.startswith(file.read(len(ZIP_START)))


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the tensors of a safetensors file fill the rest of it.

    It is eight bytes (the header's length), the JSON header and the tensors, one after the other.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
            sizes = [_has_its_size(tensor) for name, tensor in header.items() if name != "__metadata__"]
            offsets = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
            end = 0
            for start, stop in offsets:
                if start != end or stop < start:
                    return False
                end = stop
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # not what a header holds
            return False
    return size == 8 + length + end and all(sizes)


def _has_its_size(tensor: dict[str, Any]) -> bool:
    """Whether a tensor of a safetensors header is as long as its shape and dtype say."""
    start, stop = tensor["data_offsets"]
    bits = re.fullmatch(r"(?:BOOL|[A-Z]+?)(\d*)(?:_.*)?", tensor["dtype"])
    return bits is not None and prod(tensor["shape"]) * (int(bits[1]) if bits[1] else 8) == (stop - start) * 8
