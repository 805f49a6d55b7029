"""`convert_checkpoint`: from another program's adapter folder to this package's, and back to the authors'."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .authors import LOOKED_FOR as AUTHORS
from .authors import from_authors, is_authors, to_authors
from .files import CONFIG, PICKLE, new_folder, read_adapter, some, write_adapter
from .moe_peft import LOOKED_FOR as MOE_PEFT
from .moe_peft import from_moe_peft, is_moe_peft


LAYOUTS = ((is_authors, from_authors), (is_moe_peft, from_moe_peft))
TARGETS = ("loramoe", "authors")


def convert_checkpoint(source: str | Path, output: str | Path, to: str = "loramoe") -> Path:
    """Convert an adapter of the authors' repository or of MoE-PEFT to this package's format, or one of this package to theirs.

    The layout of the source is recognised by its configuration and the names of its tensors. Tensors are stacked or split,
    never changed, so the authors' layout survives the way here and back bit by bit.

    Args:
        source: an adapter folder or the id of a Hub repository.
        output: the folder to write; it must not exist.
        to: "loramoe" for this package's format, "authors" for that of the authors' repository.

    Returns:
        The path of the new folder.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `source` or a file in it does not exist.
        ValueError: `to` is unknown, a file is damaged, the layout is not recognised, or something in it has no counterpart.
            Nothing is written then.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not one of {', '.join(map(repr, TARGETS))}.")
    with new_folder(output) as folder:
        config, tensors = read_adapter(source)
        ours = config.get("peft_type") == "LORAMOE" and "routing_strategy" not in config
        if to == "authors":
            if not ours:
                raise ValueError(f"'{source}' has peft_type={config.get('peft_type')!r}: convert it to 'loramoe' first.")
            converted, separate = to_authors(config, tensors)
            (folder / CONFIG).write_text(json.dumps(converted, indent=2, sort_keys=True), encoding="utf-8")
            torch.save(separate, folder / PICKLE)
        elif ours:
            raise ValueError(f"'{source}' has this package's format already; PeftModel.from_pretrained loads it.")
        else:
            for recognised, convert in LAYOUTS:
                if recognised(config, tensors):
                    write_adapter(folder, *convert(config, tensors))
                    break
            else:
                hint = (
                    " A plain LoRA becomes experts with peft_loramoe.interop.upcycle."
                    if config.get("peft_type") == "LORA"
                    else ""
                )
                raise ValueError(
                    f"The layout of '{source}' is not recognised. Looked for {AUTHORS}; and for {MOE_PEFT}. Found "
                    f"peft_type={config.get('peft_type')!r}, the options {some(config, 40)}, the tensors {some(tensors)}.{hint}"
                )
    return Path(output)
