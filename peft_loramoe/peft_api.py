"""Every name that this package takes from PEFT's undocumented interface, in one place.

When a new PEFT moves one of them, this import is what fails, and `tests/test_peft_api.py` says which.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import _get_in_out_features as get_in_out_features
from peft.utils import resolve_quantization_backend, save_and_load
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn


__all__ = [
    "PEFT_AT_LEAST_0_21",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "get_in_out_features",
    "get_pattern_key",
    "quantization_backend_of",
    "select_state_dict",
]

# PEFT 0.20 saves the biases of a few methods of its own only, and freezes adapters of other methods.
PEFT_AT_LEAST_0_21 = hasattr(BaseTuner, "_get_learnable_bias_state_dict")

# Selects an adapter's tensors for saving; `registration` replaces it.
SELECT_STATE_DICT = "_filter_state_dict_for_adapter_name"
select_state_dict = getattr(save_and_load, SELECT_STATE_DICT)


def quantization_backend_of(layer: nn.Module) -> Any:
    """What PEFT's status of a model says of a quantised base layer; None for others, or if PEFT cannot tell."""
    try:
        return resolve_quantization_backend(layer, get_apply_tensor_subclass=lambda: None)
    except ImportError:  # PEFT 0.20 imports names that newer versions of torchao do not have
        return None


# Methods of BaseTuner that `LoRAMoEModel` overrides or that PEFT is relied on to call.
BASE_TUNER_HOOKS = (
    "_add_modules_to_save_to_tie",
    "_add_targets_to_tie",
    "_check_merge_allowed",
    "_check_new_adapter_config",
    "_create_and_replace",
    *(("_get_adapter_state_dict", "_remove_adapter_name_from_key") if PEFT_AT_LEAST_0_21 else ()),
    "_prepare_adapter_config",
    "_replace_module",
    "_unload_and_optionally_merge",
)
