"""Read adapter folders of any PEFT-like layout, and write them completely or not at all."""

from __future__ import annotations

import copy
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..card import write_card
from ..config import LoRAMoEConfig
from ..hub import check_source
from ..reading import read_json


CONFIG = "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every key that PEFT writes
EXPERT_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.loramoe_experts\.(?P<name>A|B|router)")


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the configuration and tensors of an adapter of any method.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), or the id of
            such a repository on the Hub. Only tensors are read from a pickle (``weights_only=True``); code in it is
            refused.

    Returns:
        The content of the JSON file, and the tensors by name, on the CPU, as they were saved.

    Raises:
        FileNotFoundError: the folder, the repository or a file in it does not exist.
        ValueError: a file is damaged, incomplete or of another format, or a pickle contains more than tensors.

    Example:
        >>> tiny_model().save_pretrained("adapter")
        >>> config, tensors = read_adapter("adapter")
        >>> config["peft_type"], len(tensors)
        ('LORAMOE', 18)
    """
    config = _read_config(_find(source, CONFIG))
    weights = _find(source, SAFETENSORS, PICKLE)
    tensors = _read_safetensors(weights) if weights.name == SAFETENSORS else _read_pickle(weights)
    _check_tensors(weights, tensors)
    return config, tensors


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Generator[Path]:
    """Create a folder atomically: it appears at `output` when the block succeeds, and nothing remains if it fails.

    Args:
        output: path of the folder. Missing parents are created.

    Yields:
        An empty temporary folder on the same file system, to be filled by the block.

    Raises:
        FileExistsError: `output` exists.
        NotADirectoryError: a parent is a file.

    Example:
        >>> with new_folder("adapter") as folder:
        ...     _ = (folder / "notes.txt").write_text("done")
        >>> Path("adapter/notes.txt").read_text()
        'done'
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
        _refuse_existing(output)  # it may exist by now, and rename would replace an empty folder
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(output)
        except OSError:  # another process has just written it
            _refuse_existing(output)
            raise


def write_adapter(folder: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter that PEFT can load: the configuration, the tensors and, for LoRAMoE, the model card.

    Args:
        folder: an existing folder, usually from `new_folder`.
        config: a LoRAMoEConfig or another PeftConfig.
        tensors: tensors by their names in PEFT (``base_model.model.<module>...``, without the name of the adapter).

    Example:
        >>> tiny_model().save_pretrained("adapter")
        >>> config, tensors = read_adapter("adapter")
        >>> halved = {name: tensor / 2 if name.endswith(".B") else tensor for name, tensor in tensors.items()}
        >>> with new_folder("halved") as folder:
        ...     write_adapter(folder, LoRAMoEConfig.from_pretrained("adapter"), halved)
    """
    folder = Path(folder)
    config = copy.copy(config)
    config.inference_mode = True  # as PEFT saves it; is_trainable=True overrides it
    # Not LoRAMoEConfig.save_pretrained, which logs how to load from this temporary folder.
    PeftConfig.save_pretrained(config, str(folder))
    own = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }  # no views
    save_file(own, folder / SAFETENSORS, {"format": "pt"})
    if isinstance(config, LoRAMoEConfig):
        write_card(str(folder / "README.md"), config.to_dict())


def expert_keys(module: str, A: Tensor, B: Tensor, router: Tensor) -> dict[str, Tensor]:
    """The tensors of an adapted linear by their names in ``adapter_model.safetensors``."""
    return {f"{PREFIX}{module}.loramoe_experts.{name}": t for name, t in (("A", A), ("B", B), ("router", router))}


def stack_experts(
    module: str, A: Mapping[int, Tensor], B: Mapping[int, Tensor], router: Tensor | None, num_experts: int, r: int
) -> dict[str, Tensor]:
    """Stack the separate tensors of a linear's experts.

    Args:
        module: name of the linear.
        A: expert -> (r, in_features).
        B: expert -> (out_features, r).
        router: (num_experts, in_features).
        num_experts: number of experts in the configuration.
        r: rank of each expert.

    Returns:
        The tensors, by the names of `expert_keys`.

    Raises:
        ValueError: an expert or the router is missing, unexpected, or has another shape.
    """
    wanted = set(range(num_experts))
    for part, experts in (("A", A), ("B", B)):
        if missing := wanted - experts.keys():
            raise ValueError(
                f"'{module}' lacks {part} of expert {_listed(missing)}, with {num_experts} experts: the experts have "
                "different target modules, or the file is incomplete."
            )
        if extra := experts.keys() - wanted:
            raise ValueError(f"'{module}' has {part} of expert {_listed(extra)}, but there are {num_experts} experts.")
    if router is None:
        raise ValueError(f"'{module}' has experts but no router: the file is incomplete.")
    for part, experts, axis in (("A", A, 0), ("B", B, 1)):
        for expert, tensor in experts.items():
            if tensor.dim() != 2 or not tensor.numel():
                raise ValueError(
                    f"{part} of expert {expert} of '{module}' has shape {tuple(tensor.shape)}, not that of a matrix. "
                    "(ZeRO-3 saves empty tensors if they are not gathered.)"
                )
        if {tensor.shape[axis] for tensor in experts.values()} != {r}:
            ranks = ", ".join(f"expert {expert}: {experts[expert].shape[axis]}" for expert in sorted(experts))
            raise ValueError(
                f"The experts of '{module}' cannot be stacked: r={r}, but the ranks of {part} are {ranks}."
            )
        if len(sizes := {tensor.shape[1 - axis] for tensor in experts.values()}) > 1:
            raise ValueError(f"The experts of '{module}' cannot be stacked: the widths of {part} are {sorted(sizes)}.")
    if tuple(router.shape) != (expected := (num_experts, A[0].shape[1])):
        raise ValueError(f"The router of '{module}' has shape {tuple(router.shape)}, not {expected}.")
    stacked = torch.cat([A[i] for i in sorted(A)]), torch.cat([B[i] for i in sorted(B)], dim=1)
    return expert_keys(module, *stacked, router)


def experts_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of a LoRAMoE adapter by adapted module.

    Args:
        tensors: the tensors from `read_adapter`.

    Returns:
        Module name -> {"A": (E*r, in), "B": (out, E*r), "router": (N, in)}, without other tensors such as
        `modules_to_save`.

    Raises:
        ValueError: there are no LoRAMoE tensors, a module lacks one of the three, or one is no matrix.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := EXPERT_KEY.fullmatch(key):
            modules.setdefault(match["module"], {})[match["name"]] = tensor
    if not modules:
        raise ValueError(
            f"No tensor is named {PREFIX}<module>.loramoe_experts.A, .B or .router; found {abbreviate(tensors)}."
        )
    for module, parts in modules.items():
        if missing := {"A", "B", "router"} - parts.keys():
            raise ValueError(
                f"'{module}' lacks the tensor loramoe_experts.{' or .'.join(sorted(missing))}: the file is incomplete."
            )
        for name, tensor in parts.items():
            if tensor.dim() != 2 or not tensor.numel():
                raise ValueError(
                    f"'{module}': loramoe_experts.{name} has shape {tuple(tensor.shape)}, not that of a matrix; the "
                    "file is damaged. (ZeRO-3 saves empty tensors if they are not gathered.)"
                )
    return modules


def abbreviate(names: Any, limit: int = 5) -> str:
    """A list of names for an error message, shortened to the first few."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(f"'{name}'" for name in names[:limit]) or "none") + more


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"The output folder '{output}' exists already; remove it or choose another one.")


def _find(source: str | Path, *names: str) -> Path:
    """The first of these files that exists."""
    if Path(source).is_dir():
        for name in names:
            if (path := Path(source, name)).is_file():
                return path
        content = abbreviate(path.name for path in Path(source).iterdir())
        raise FileNotFoundError(
            f"'{source}' has no {' or '.join(names)}, so it is not an adapter folder; it contains {content}."
        )
    check_source(str(source), names[0], what=f"adapter {source}")
    cause: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(str(source), name))
        except EntryNotFoundError as error:  # also if offline and not cached
            cause = error
        except OSError as error:  # no such repository, no access, no connection
            cause = error
            break
    raise FileNotFoundError(
        f"'{source}' is neither a local folder nor a Hub repository from which {' or '.join(names)} can be read "
        f"({type(cause).__name__}: {str(cause).strip().splitlines()[0]})."
    ) from cause


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"The file is damaged; copy or download it again. {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"'{path}' contains a JSON {type(config).__name__}, not an object of options; it is not an adapter config."
        )
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
            f"'{path}' is refused: it is damaged, or it holds more than tensors, possibly code that runs when it is "
            f"read ({_reason(error)}). If you trust its author, have them save it as {SAFETENSORS}."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise AssertionError, AttributeError, ...
        raise ValueError(
            f"'{path}' cannot be read ({_reason(error)}): the file is incomplete or damaged. Copy or download it "
            "again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(
            f"'{path}' must hold a dictionary of tensors, not {_describe(tensors)}; these are not the weights of an "
            "adapter."
        )
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot belong to an adapter, and warn of values that are not finite."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(
                f"'{path}' has a tensor with the name {name!r}, not a string; it does not hold the weights of an "
                "adapter."
            )
        if "lora" in name and not tensor.is_floating_point():
            raise ValueError(
                f"'{path}': '{name}' has dtype {tensor.dtype}, but the matrices of adapters are floating point. The "
                "file is damaged or of another kind."
            )
    dense = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.layout == torch.strided
    }
    if bad := [name for name, tensor in dense.items() if not tensor.float().isfinite().all()]:
        warnings.warn(f"'{path}' has NaN or infinity in {abbreviate(bad)}; outputs will be NaN, too.")


def _reason(error: Exception) -> str:
    """The message of torch without its advice to load the file unsafely."""
    found = re.search(r"Unsupported (?:global|class|operand)[^\n.]*(?:\.\w[^\n. ]*)*", str(error))
    return (
        found[0] if found else f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    )


def _describe(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return "a dictionary with " + abbreviate(
        f"{key}: {type(v).__name__}" for key, v in value.items() if not isinstance(v, Tensor)
    )
