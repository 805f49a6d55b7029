import copy
import importlib
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_loramoe
from peft_loramoe import LoRAMoEConfig, LoRAMoEModel, registration


def registered():
    return [mapping[PeftType("LORAMOE")] for mapping in (
        PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    )]  # fmt: skip


def test_the_tuner_is_registered():
    assert registered() == [LoRAMoEConfig, LoRAMoEModel, "loramoe_"]


def test_the_member_is_a_full_member_of_the_enumeration():
    member = PeftType("LORAMOE")
    assert member is PeftType.LORAMOE is PeftType["LORAMOE"]
    assert member == "LORAMOE" and isinstance(member, str)
    assert member in list(PeftType) and member in PeftType and "LORAMOE" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == "<PeftType.LORAMOE: 'LORAMOE'>"


def test_registering_again_and_reloading_change_nothing():
    before, members = registered(), list(PeftType)
    registration.register()
    importlib.reload(peft_loramoe)
    assert registered() == before
    assert list(PeftType) == members


@pytest.mark.slow
def test_the_rest_of_the_registry_is_untouched():
    script = (
        "import peft, peft.mapping as m; before = [dict(x) for x in vars(m).values() if isinstance(x, dict) and "
        "x]\nimport peft_loramoe; after = [dict(x) for x in vars(m).values() if isinstance(x, dict) and x]\nextra = "
        "[set(b) - set(a) for a, b in zip(before, after)]\nchanged = [k for a, b in zip(before, after) for k in a if "
        "a[k] is not b[k]]\nassert not changed and all(e <= {'LORAMOE'} for e in extra), (changed, extra)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_tuner_of_that_name_in_peft_is_replaced_with_a_warning(monkeypatch):
    foreign = type("LoRAMoEModel", (), {"__module__": "peft.tuners.loramoe"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType("LORAMOE"), foreign)
    with pytest.warns(UserWarning, match="PEFT already knows a tuner 'LORAMOE'"):
        registration.register()
    assert registered()[1] is LoRAMoEModel


@pytest.mark.slow
def test_importing_the_package_imports_no_optional_dependency():
    script = (
        "import sys, peft, transformers.loss.loss_utils\nbefore = set(sys.modules)  # PEFT itself imports "
        "bitsandbytes where it is installed\nimport peft_loramoe\nloaded = {'bitsandbytes', 'triton', 'matplotlib', "
        "'trl', 'datasets'} & (set(sys.modules) - before)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_a_pickle_of_the_bare_type_imports_the_package():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        script = (
            "import pickle, sys\nmember = "
            f"pickle.loads({pickle.dumps({'type': PeftType('LORAMOE')}, protocol)!r})['type']\nassert 'peft_loramoe' "
            "in sys.modules and member == 'LORAMOE', member"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
    assert copy.deepcopy(PeftType("LORAMOE")) is copy.copy(PeftType("LORAMOE")) is PeftType("LORAMOE")


def test_a_pickle_of_the_bare_type_says_which_package_is_missing():
    script = (
        f"import pickle, sys\nsys.modules['peft_loramoe'] = None\npickle.loads({pickle.dumps(PeftType('LORAMOE'))!r})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode and "peft_loramoe" in result.stderr.splitlines()[-1]
