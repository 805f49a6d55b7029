"""Convert adapter folders between the layouts of this package, the LoRAMoE authors and MoE-PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .authors import LOOKED_FOR as AUTHORS
from .authors import from_authors, is_authors, to_authors
from .files import CONFIG, PICKLE, abbreviate, new_folder, read_adapter, write_adapter
from .moe_peft import LOOKED_FOR as MOE_PEFT
from .moe_peft import from_moe_peft, is_moe_peft


LAYOUTS = ((is_authors, from_authors), (is_moe_peft, from_moe_peft))
TARGETS = ("loramoe", "authors")


def convert_checkpoint(source: str | Path, output: str | Path, to: str = "loramoe") -> Path:
    """Convert an adapter of the LoRAMoE authors or of MoE-PEFT to this package's layout, or back to the authors'.

    The layout of the source is detected from its options and tensor names. Tensors are stacked or split without
    changing their values, so that a round trip through this package restores the authors' layout bit by bit.

    Args:
        source: adapter folder or Hub id.
        output: folder to create.
        to: "loramoe" for this package's layout, "authors" for the authors'.

    Returns:
        The path of the new folder.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `source` or a file in it does not exist.
        ValueError: `to` is unknown, a file is damaged, the layout is unknown, or part of it has no counterpart.
            Nothing is written in this case.

    Example:
        >>> tiny_model(balance_loss_weight=0.0).save_pretrained("adapter")
        >>> convert_checkpoint("adapter", "for-the-authors-code", to="authors").name
        'for-the-authors-code'
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not one of {', '.join(map(repr, TARGETS))}.")
    with new_folder(output) as folder:
        config, tensors = read_adapter(source)
        ours = config.get("peft_type") == "LORAMOE" and "routing_strategy" not in config
        if to == "authors":
            if not ours:
                raise ValueError(
                    f"'{source}' has peft_type={config.get('peft_type')!r}: convert it to 'loramoe' first."
                )
            converted, separate = to_authors(config, tensors)
            (folder / CONFIG).write_text(json.dumps(converted, indent=2, sort_keys=True), encoding="utf-8")
            torch.save(separate, folder / PICKLE)
        elif ours:
            raise ValueError(f"'{source}' already has this package's layout; load it with PeftModel.from_pretrained.")
        else:
            for recognised, convert in LAYOUTS:
                if recognised(config, tensors):
                    write_adapter(folder, *convert(config, tensors))
                    break
            else:
                hint = (
                    " To turn plain LoRAs into experts, use peft_loramoe.interop.upcycle."
                    if config.get("peft_type") == "LORA"
                    else ""
                )
                raise ValueError(
                    f"The layout of '{source}' is unknown. Expected {AUTHORS}; or {MOE_PEFT}. Found "
                    f"peft_type={config.get('peft_type')!r}, the options {abbreviate(config, 40)}, the tensors "
                    f"{abbreviate(tensors)}.{hint}"
                )
    return Path(output)
