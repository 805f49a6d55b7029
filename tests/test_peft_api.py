import peft
import pytest

from peft_loramoe import LoRAMoEModel, peft_api


@pytest.mark.parametrize("name", peft_api.BASE_TUNER_HOOKS)
def test_pefts_base_tuner_still_has_the_method(name):
    assert hasattr(peft_api.BaseTuner, name), (
        f"PEFT {peft.__version__} has no BaseTuner.{name} any more: adapt LoRAMoEModel and peft_api.BASE_TUNER_HOOKS"
    )


def test_every_private_method_that_is_overridden_is_listed():
    overridden = {name for name in vars(LoRAMoEModel) if name.startswith("_") and not name.startswith("__")}
    inherited = {name for name in overridden if hasattr(peft_api.BaseTuner, name)} - {"_abc_impl"}
    assert inherited <= set(peft_api.BASE_TUNER_HOOKS)


@pytest.mark.parametrize(
    "name", ["create_or_update_model_card", "_upload_modified_files", "_enable_peft_forward_hooks"]
)
def test_peft_model_still_has_the_methods_that_this_package_relies_on(name):
    assert hasattr(peft.PeftModel, name), (
        f"PEFT {peft.__version__} has no PeftModel.{name} any more: adapt registration.py"
    )
