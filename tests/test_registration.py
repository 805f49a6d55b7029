import copy
import importlib
import json
import pickle
import pickletools
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


WRAPPED_BY_ANOTHER_LIBRARY = """
import functools, sys
from pathlib import Path
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

def wrapped(method):
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        return method(*args, **kwargs)
    return wrapper

for name in ("create_or_update_model_card", "_upload_modified_files", "load_adapter"):
    setattr(PeftModel, name, wrapped(getattr(PeftModel, name)))

import peft_loramoe
base = nn.Sequential(nn.Linear(4, 4))
get_peft_model(base, peft_loramoe.LoRAMoEConfig(target_modules=["0"])).save_pretrained(sys.argv[1])
save_file({}, Path(sys.argv[1], "adapter_model.safetensors"))
PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), sys.argv[1])
"""


@pytest.mark.slow
def test_incomplete_files_are_refused_where_another_library_wrapped_pefts_methods_before(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WRAPPED_BY_ANOTHER_LIBRARY, str(tmp_path)], capture_output=True, text=True
    )
    assert "RuntimeError: The checkpoint does not fit the LoRAMoE layers" in result.stderr


# PEFT itself imports bitsandbytes where it is installed.
IMPORTED = """
import json, sys, peft, peft.mapping, transformers.loss.loss_utils
mappings = lambda: [dict(value) for value in vars(peft.mapping).values() if isinstance(value, dict) and value]
before, modules = mappings(), set(sys.modules)
import peft_loramoe
pairs = list(zip(before, mappings()))
print(json.dumps({
    "changed": [key for old, new in pairs for key in old if old[key] is not new[key]],
    "added": sorted({key for old, new in pairs for key in set(new) - set(old)}),
    "optional": sorted({"bitsandbytes", "triton", "matplotlib", "trl", "datasets"} & (set(sys.modules) - modules)),
}))
"""


@pytest.fixture(scope="module")
def imported():
    """What the import of the package does to a process in which PEFT was imported."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_rest_of_the_registry_is_untouched(imported):
    assert (imported["changed"], imported["added"]) == ([], ["LORAMOE"])


def test_a_tuner_of_that_name_in_peft_is_replaced_with_a_warning(monkeypatch):
    foreign = type("LoRAMoEModel", (), {"__module__": "peft.tuners.loramoe"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType("LORAMOE"), foreign)
    with pytest.warns(UserWarning, match="PEFT already knows a tuner 'LORAMOE'"):
        registration.register()
    assert registered()[1] is LoRAMoEModel


@pytest.mark.slow
def test_importing_the_package_imports_no_optional_dependency(imported):
    assert imported["optional"] == []


PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_of_the_bare_type_imports_nothing_else(protocol):
    data = pickle.dumps({"type": PeftType("LORAMOE")}, protocol)
    names = [argument.split()[0] for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    assert [name for name in names if "." in name] == ["peft_loramoe.registration"]


@pytest.mark.slow
def test_a_pickle_of_the_bare_type_imports_the_package():
    pickles = [pickle.dumps({"type": PeftType("LORAMOE")}, protocol) for protocol in PROTOCOLS]
    script = (
        f"import pickle, sys\nmembers = [pickle.loads(data)['type'] for data in {pickles!r}]\n"
        "assert 'peft_loramoe' in sys.modules and set(members) == {'LORAMOE'}, members"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_copies_of_the_bare_type_are_the_type():
    assert copy.deepcopy(PeftType("LORAMOE")) is copy.copy(PeftType("LORAMOE")) is PeftType("LORAMOE")


def test_a_pickle_of_the_bare_type_says_which_package_is_missing():
    script = (
        f"import pickle, sys\nsys.modules['peft_loramoe'] = None\npickle.loads({pickle.dumps(PeftType('LORAMOE'))!r})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode and "peft_loramoe" in result.stderr.splitlines()[-1]
