"""Adds ``LORAMOE`` to PEFT's registry. The only module that changes anything in PEFT."""

import functools
import inspect
import os
import warnings
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, hotswap, save_and_load
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .balance.results import find_recorder
from .card import write_card
from .config import LoRAMoEConfig
from .loading import check_load_result, mark_loaded, unchanged_on_failure
from .model import LoRAMoEModel
from .names import without_adapters
from .peft_api import SELECT_STATE_DICT, select_state_dict


PEFT_TYPE = "LORAMOE"
PATCHED = "_patched_by_loramoe"  # an attribute of PeftModel, which outlives a second import of this package


def register() -> None:
    """Register `LoRAMoEConfig` and `LoRAMoEModel` under ``PeftType.LORAMOE``.

    Calling it again, reloading this package or importing it twice changes nothing. If the installed PEFT brings a
    tuner of its own under that name, importing this package is taken as the wish to use this one: it takes the name
    over and says so in a warning.
    """
    peft_type = _peft_type_member()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is not None and not known.__module__.startswith("peft_loramoe."):
        warnings.warn(
            f"PEFT already knows a tuner '{PEFT_TYPE}' ({known.__module__}.{known.__qualname__}); importing "
            "peft_loramoe replaces it in this process. Do not import peft_loramoe to use the other one.",
            stacklevel=2,
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = LoRAMoEConfig
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = LoRAMoEModel
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = LoRAMoEModel.prefix
    if not hasattr(PeftModel, PATCHED):
        _keep_model_card()
        _load_all_or_nothing()
        _select_tensors_exactly()
        setattr(PeftModel, PATCHED, True)


def _peft_type_member() -> PeftType:
    """Return ``PeftType.LORAMOE``, adding it to the enumeration if it is not there."""
    if PEFT_TYPE in PeftType.__members__:
        return PeftType[PEFT_TYPE]
    # PEFT offers no way to register a type out of tree, and an Enum none to grow: do what EnumType does for a member.
    member: Any = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, PEFT_TYPE, member)  # before the maps: afterwards Enum refuses to set the attribute
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    member.__reduce_ex__ = _reduce  # a pickle imports this package, or says that it is missing
    return member


def _reduce(protocol: int) -> tuple[Any, ...]:
    return _peft_type_member, ()


def _select_tensors_exactly() -> None:
    """Save all tensors of a LoRAMoE adapter, whatever other adapters are called.

    PEFT leaves out every name that ends with or contains that of another adapter: an adapter named "A" would cost
    every other adapter its parameter `A`.
    """
    default = select_state_dict
    prefixes = [prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix != LoRAMoEModel.prefix]

    @functools.wraps(default)
    def select(state_dict: dict[str, Any], unwanted_adapter_names: list[str]) -> dict[str, Any]:
        return without_adapters(state_dict, unwanted_adapter_names, prefixes, default)

    setattr(save_and_load, SELECT_STATE_DICT, select)


def _keep_model_card() -> None:
    """Let the model card of LoRAMoE adapters survive; models without one behave as before.

    `Trainer.push_to_hub` and `PeftModel.push_to_hub` replace the README.md that `save_pretrained` wrote, and PEFT has
    no hook for what a tuner has to say there: without `import peft_loramoe` a reader of the card could not load the
    adapter.
    """
    update, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    def loramoe_configs(model: PeftModel) -> list[LoRAMoEConfig]:
        return [config for config in model.peft_config.values() if isinstance(config, LoRAMoEConfig)]

    @functools.wraps(update)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        update(self, output_dir)
        for config in loramoe_configs(self)[:1]:
            write_card(os.path.join(output_dir, "README.md"), config.to_dict())

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if loramoe_configs(self):
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    setattr(PeftModel, "_upload_modified_files", _upload_modified_files)


def _load_all_or_nothing() -> None:
    """Make a LoRAMoE adapter that cannot be loaded an error that leaves the model as it was; other adapters load as
    before.

    PEFT and transformers attach an adapter before they read its weights and do not take it off again. A file without
    any of its tensors is a warning in PEFT, and absent tensors are a line in the log of transformers 5: both go on
    with random experts.
    """

    def checked(load: Any) -> Any:
        signature = inspect.signature(load)

        @functools.wraps(load)
        def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(self, *args, **kwargs).arguments
            source = given.get("model_id") or given.get("peft_model_id") or ""
            adapter = given.get("adapter_name") or "default"
            with unchanged_on_failure(self):
                mark_loaded(self, adapter, False)
                try:
                    result = load(self, *args, **kwargs)
                except SafetensorError as error:
                    if find_recorder(self) is None:
                        raise  # an adapter of another method
                    raise RuntimeError(
                        f"adapter_model.safetensors of '{source}' cannot be read ({error}): the file is incomplete or "
                        "damaged. Download it again, or save the adapter again."
                    ) from error
                check_load_result(self, adapter, result)
            return result

        return load_adapter

    from_pretrained, check = PeftModel.from_pretrained.__func__, hotswap.check_hotswap_configs_compatible

    @functools.wraps(from_pretrained)
    def checked_from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        with unchanged_on_failure(model):
            return from_pretrained(cls, model, *args, **kwargs)

    @functools.wraps(check)
    def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
        if isinstance(config0, LoRAMoEConfig) or isinstance(config1, LoRAMoEConfig):
            raise ValueError(
                "LoRAMoE adapters cannot be hot-swapped. Load the other adapter beside this one with "
                "model.load_adapter(folder, adapter_name='other'), switch with model.set_adapter('other'), and remove "
                "this one with model.delete_adapter."
            )
        check(config0, config1)

    PeftModel.load_adapter = checked(PeftModel.load_adapter)
    setattr(PeftModel, "from_pretrained", classmethod(checked_from_pretrained))
    PeftAdapterMixin.load_adapter = checked(PeftAdapterMixin.load_adapter)
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible
