"""Adapter folders: reading any PEFT-like one, and writing one completely or not at all."""

from __future__ import annotations

import copy
import json
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..card import write_card
from ..config import LoRAMoEConfig


CONFIG = "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every key that PEFT writes
EXPERT_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.loramoe_experts\.(?P<name>A|B|router)")


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's configuration and tensors, of whatever method and program.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), or the id of such a
            repository on the Hub. Only tensors are read from a pickle (``weights_only=True``); code in it is refused.

    Returns:
        The configuration as it is in the JSON file, and the tensors by name, on the CPU, as they were saved.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing in it.
        ValueError: a file is damaged, incomplete or not what its name says, or a pickle holds something else than tensors.
    """
    config = _read_json(_find(source, CONFIG))
    weights = _find(source, SAFETENSORS, PICKLE)
    tensors = _read_safetensors(weights) if weights.name == SAFETENSORS else _read_pickle(weights)
    _check_tensors(weights, tensors)
    return config, tensors


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder that appears at `output` when the block has succeeded; if it fails, nothing stays behind.

    Args:
        output: where the folder is to be. Parents that do not exist are created with it.

    Yields:
        An empty temporary folder on the same file system, to be filled.

    Raises:
        FileExistsError: `output` exists.
        NotADirectoryError: one of its parents is a file.
    """
    output = Path(output).absolute()
    _refuse_existing(output)
    parent = next(parent for parent in output.parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"The output folder '{output}' cannot be created: '{parent}' is a file.")
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name[:40]}-") as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        yield folder
        _refuse_existing(output)  # somebody else may have been faster, and rename would replace an empty folder
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)


def write_adapter(folder: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter that PEFT can load: the configuration, the tensors and, for LoRAMoE, the model card.

    Args:
        folder: an existing folder, usually that of `new_folder`.
        config: a LoRAMoEConfig or another configuration of PEFT.
        tensors: by the names that PEFT gives them (``base_model.model.<module>...``, without the adapter's name).
    """
    folder = Path(folder)
    config = copy.copy(config)
    config.inference_mode = True  # as PEFT saves it; is_trainable=True overrides it
    # The base class's method: that of LoRAMoEConfig logs how to load from this folder, which is going to be renamed.
    PeftConfig.save_pretrained(config, str(folder))
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}  # no views
    save_file(own, folder / SAFETENSORS, {"format": "pt"})
    if isinstance(config, LoRAMoEConfig):
        write_card(str(folder / "README.md"), config.to_dict())


def expert_keys(module: str, A: Tensor, B: Tensor, router: Tensor) -> dict[str, Tensor]:
    """The tensors of one adapted linear under the names that they have in ``adapter_model.safetensors``."""
    return {f"{PREFIX}{module}.loramoe_experts.{name}": t for name, t in (("A", A), ("B", B), ("router", router))}


def stack_experts(
    module: str, A: Mapping[int, Tensor], B: Mapping[int, Tensor], router: Tensor | None, num_experts: int, r: int
) -> dict[str, Tensor]:
    """Stack the experts of one linear, kept as tensors of their own elsewhere.

    Args:
        module: the linear's name.
        A: expert -> (r, in_features).
        B: expert -> (out_features, r).
        router: (num_experts, in_features).
        num_experts: how many experts the configuration names.
        r: their rank.

    Returns:
        The tensors under the names of `expert_keys`.

    Raises:
        ValueError: an expert or the router is missing or left over, or has another shape; the message says which.
    """
    wanted = set(range(num_experts))
    for part, experts in (("A", A), ("B", B)):
        if missing := wanted - experts.keys():
            raise ValueError(
                f"'{module}' has no {part} matrix of expert {_listed(missing)}, of {num_experts} experts: the experts have "
                "different target modules, or the file is incomplete."
            )
        if extra := experts.keys() - wanted:
            raise ValueError(f"'{module}' has a {part} matrix of expert {_listed(extra)}, but there are {num_experts} experts.")
    if router is None:
        raise ValueError(f"'{module}' has experts but no router: the file is incomplete.")
    for part, experts, axis in (("A", A, 0), ("B", B, 1)):
        for expert, tensor in experts.items():
            if tensor.dim() != 2 or not tensor.numel():
                raise ValueError(f"{part} of expert {expert} of '{module}' has the shape {tuple(tensor.shape)}, not that of a "
                                 "matrix. (Saved in ZeRO-3 training without gathering, tensors are empty.)")  # fmt: skip
        if {tensor.shape[axis] for tensor in experts.values()} != {r}:
            ranks = ", ".join(f"expert {expert}: {experts[expert].shape[axis]}" for expert in sorted(experts))
            raise ValueError(f"The experts of '{module}' cannot be stacked: r={r}, but the ranks of {part} are {ranks}.")
        if len(sizes := {tensor.shape[1 - axis] for tensor in experts.values()}) > 1:
            raise ValueError(f"The experts of '{module}' cannot be stacked: their {part} have the widths {sorted(sizes)}.")
    if tuple(router.shape) != (expected := (num_experts, A[0].shape[1])):
        raise ValueError(f"The router of '{module}' has the shape {tuple(router.shape)}, not {expected}.")
    stacked = torch.cat([A[i] for i in sorted(A)]), torch.cat([B[i] for i in sorted(B)], dim=1)
    return expert_keys(module, *stacked, router)


def experts_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of a LoRAMoE adapter by the module that they adapt.

    Args:
        tensors: what `read_adapter` returned.

    Returns:
        Module name -> {"A": (E*r, in), "B": (out, E*r), "router": (N, in)}; other tensors (`modules_to_save`, biases) are
        left out.

    Raises:
        ValueError: there is no tensor of LoRAMoE, or one of the three is missing for some module.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := EXPERT_KEY.fullmatch(key):
            modules.setdefault(match["module"], {})[match["name"]] = tensor
    if not modules:
        raise ValueError(f"No tensor is named {PREFIX}<module>.loramoe_experts.A, .B or .router; found {some(tensors)}.")
    for module, parts in modules.items():
        if missing := {"A", "B", "router"} - parts.keys():
            raise ValueError(
                f"'{module}' has no tensor loramoe_experts.{' or .'.join(sorted(missing))}: the file is incomplete."
            )
    return modules


def some(names: Any, limit: int = 5) -> str:
    """The first few of many names, for an error message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(f"'{name}'" for name in names[:limit]) or "none") + more


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"The output folder '{output}' exists already. Remove it, or choose another one.")


def _find(source: str | Path, *names: str) -> Path:
    """The first of the files that is there."""
    if Path(source).is_dir():
        for name in names:
            if (path := Path(source, name)).is_file():
                return path
        content = some(path.name for path in Path(source).iterdir())
        raise FileNotFoundError(f"'{source}' has no {' or '.join(names)}, so it is no saved adapter; it contains {content}.")
    cause: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(str(source), name))
        except EntryNotFoundError as error:  # also: offline, and not in the cache
            cause = error
        except (HFValidationError, OSError) as error:  # no such repository, no access, no connection
            cause = error
            break
    raise FileNotFoundError(
        f"'{source}' is neither a folder here nor a repository on the Hub from which {' or '.join(names)} can be read "
        f"({type(cause).__name__}: {str(cause).strip().splitlines()[0]})."
    ) from cause


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"'{path}' is not valid JSON ({error}): the file is damaged. Copy or download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a JSON {type(config).__name__}, not an object of options: it is no adapter config.")
    return config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' cannot be read ({error}): the file is incomplete or damaged. Copy or download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' is refused: it is damaged, or it holds more than tensors, possibly code that runs when it is read "
            f"({_reason(error)}). If you trust its author, have them save it as {SAFETENSORS}."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever torch meets in a damaged file: AssertionError, AttributeError, ...
        raise ValueError(
            f"'{path}' cannot be read ({_reason(error)}): the file is incomplete or damaged. Copy or download it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"'{path}' holds no dictionary of tensors but {_describe(tensors)}: it is no adapter's weights.")
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no adapter has, and warn of values that are not finite."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"'{path}' has a tensor whose name is {name!r}, no string: it is no adapter's weights.")
        if "lora" in name and not tensor.is_floating_point():
            raise ValueError(
                f"'{path}': '{name}' has dtype {tensor.dtype}, but the matrices of adapters are floating point. The file is "
                "damaged or of another kind."
            )
    dense = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.layout == torch.strided}
    if bad := [name for name, tensor in dense.items() if not tensor.float().isfinite().all()]:
        warnings.warn(f"'{path}' has NaN or infinity in {some(bad)}: whatever is computed with it will be NaN, too.")


def _reason(error: Exception) -> str:
    """What torch says, without its advice to read the file all the same."""
    found = re.search(r"Unsupported (?:global|class|operand)[^\n.]*(?:\.\w[^\n. ]*)*", str(error))
    return found[0] if found else f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def _describe(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return "a dictionary with " + some(f"{key}: {type(v).__name__}" for key, v in value.items() if not isinstance(v, Tensor))
