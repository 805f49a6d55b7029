"""Adds ``LORAMOE`` to PEFT's registry. The only module that changes anything in PEFT."""

import functools
import os
import warnings
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from .card import write_card
from .config import LoRAMoEConfig
from .model import LoRAMoEModel


PEFT_TYPE = "LORAMOE"


def register() -> None:
    """Register `LoRAMoEConfig` and `LoRAMoEModel` under ``PeftType.LORAMOE``.

    Calling it again, reloading this package or importing it twice changes nothing. If the installed PEFT brings a tuner
    of its own under that name, importing this package is taken as the wish to use this one: it takes the name over and
    says so in a warning.
    """
    peft_type = _peft_type_member()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is not None and not known.__module__.startswith(__package__):
        warnings.warn(
            f"PEFT already knows a tuner '{PEFT_TYPE}' ({known.__module__}.{known.__qualname__}); importing peft_loramoe "
            "replaces it in this process. Do not import peft_loramoe to use the other one.",
            stacklevel=2,
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = LoRAMoEConfig
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = LoRAMoEModel
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = LoRAMoEModel.prefix
    if not hasattr(PeftModel.create_or_update_model_card, "__wrapped__"):
        _keep_model_card()


def _peft_type_member() -> PeftType:
    """Return ``PeftType.LORAMOE``, adding it to the enumeration if it is not there."""
    if PEFT_TYPE in PeftType.__members__:
        return PeftType[PEFT_TYPE]
    # PEFT offers no way to register a type out of tree, and an Enum none to grow: do what EnumType does for a member.
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, PEFT_TYPE, member)  # before the maps: afterwards Enum refuses to set the attribute
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    return member


def _keep_model_card() -> None:
    """Let the model card of LoRAMoE adapters survive; models without one behave as before.

    `Trainer.push_to_hub` and `PeftModel.push_to_hub` replace the README.md that `save_pretrained` wrote, and PEFT has no hook
    for what a tuner has to say there: without `import peft_loramoe` a reader of the card could not load the adapter.
    """
    update, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    def loramoe_configs(model: PeftModel) -> list[LoRAMoEConfig]:
        return [config for config in model.peft_config.values() if isinstance(config, LoRAMoEConfig)]

    @functools.wraps(update)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        update(self, output_dir)
        for config in loramoe_configs(self)[:1]:
            write_card(os.path.join(output_dir, "README.md"), config)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if loramoe_configs(self):
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files
