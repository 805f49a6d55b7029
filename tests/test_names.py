"""Adapter names: every tensor is saved and loaded whatever the adapters are called, or the name is refused at once."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.names import check_adapter_name
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from tiny import loramoe, tiny_llama, token_batch


pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
WEIGHTS = "adapter_model.safetensors"
CONFIG = {"r": 2, "init_weights": False, "task_type": "CAUSAL_LM"}
GROUPS = [
    ("a", "A"),
    ("A", "a"),
    ("a", "loramoe_experts"),
    ("loramoe_experts", "A", "B", "router"),
    ("a", "ab", "b", "ba"),
    ("default", "default_2", "a_default"),
    ("mlp", "layers", "model", "base_model"),
    ("up_proj", "0", "1"),
    ("weight", "bias", "modules_to_save", "original_module"),
    ("base_layer", "trainable_tokens_delta", "token_adapter"),
    ("\u00e9", "e", "name with spaces", "a-b_c"),
    ("loramoe_", "loramoe", "lora_A"),
]


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def model_with(names, **options):
    model = tiny_llama(attention_bias=True) if "bias" in options else tiny_llama()
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoRAMoEConfig(**{**CONFIG, **options})
        if seed == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f"modules_to_save.{name}." in key or key.endswith(f"trainable_tokens_delta.{name}"):
                    parameter.normal_()
    return model


def outputs_of(model, names):
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = logits(model)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_adapters_are_saved_and_loaded_whole(names, options, tmp_path):
    if options and not PEFT_AT_LEAST_0_21 and {"loramoe_experts", "weight", "base_layer", "loramoe_"} & {*names}:
        pytest.skip("PEFT 0.20 renames tensors outside of the experts by what their names contain")
    model = model_with(names, **options)
    expected = outputs_of(model, names)
    model.save_pretrained(tmp_path)
    alone = model_with(["default"], **options)
    for name in names:
        folder = tmp_path if name == "default" else tmp_path / name
        assert load_file(folder / WEIGHTS).keys() == get_peft_model_state_dict(alone).keys()
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), expected[name])
    loaded = None
    for name in reversed(names):
        folder = tmp_path if name == "default" else tmp_path / name
        if loaded is None:
            loaded = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name=name)
        else:
            loaded.load_adapter(folder, adapter_name=name)
    found = outputs_of(loaded, names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("names", [("a", "A"), ("layers", "bias", "B"), ("loramoe_experts", "router")], ids="-".join)
def test_adapters_of_transformers_are_saved_whole(names, tmp_path):
    model, expected = tiny_llama(), {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model.add_adapter(LoRAMoEConfig(r=2, init_weights=False), adapter_name=name)
    for name in names:
        model.set_adapter(name)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name)
        fresh = tiny_llama()
        fresh.load_adapter(str(tmp_path / name))
        assert torch.equal(logits(fresh), expected[name])


def test_a_given_state_dict_is_selected_from_too():
    model = model_with(("a", "A"))
    saved = get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="a")
    assert len(saved) == 18


@pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="bias is refused with PEFT before 0.21")
@pytest.mark.parametrize("names", [("a", "bias"), ("bias", "a"), ("base_layer", "mlp")], ids="-".join)
def test_trained_biases_are_saved_whatever_the_names(names, tmp_path):
    model = model_with(names[:1], bias="all")  # PEFT allows one adapter with biases
    model.add_adapter(names[1], LoRAMoEConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    biases = {key for key in load_file(tmp_path / names[0] / WEIGHTS) if key.endswith(".bias")}
    assert len(biases) == 8


def test_models_without_loramoe_are_saved_as_before(tmp_path):
    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert [len(load_file(tmp_path / name / WEIGHTS)) for name in ("a", "b")] == [4, 4]


REFUSED = {
    "": "must be a string that is not empty",
    "a.b": r"contains '\.'",
    ".": r"contains '\.'",
    "a/b": "contains '/'",
    "/tmp": "contains '/'",
    "../a": r"contains '\.', '/'",
    "a\\b": r"contains '\\\\'",
    "nul\0": r"contains '\\x00'",
    "x" * 300: "has 300 bytes; file systems take 255",
    "\u65e5" * 100: "has 300 bytes",
    "\ud800": "no file name can hold",
    "keys": "attribute of torch's ModuleDict",
    "training": "attribute of torch's ModuleDict",
    "__base__": "stands for the base model",
}


@pytest.mark.parametrize(
    "attach", ["get_peft_model", "add_adapter", "transformers", "load_adapter", "from_pretrained"]
)
@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_names_that_cannot_be_saved_are_refused_when_the_adapter_is_attached(name, attach, tmp_path):
    if attach in ("load_adapter", "from_pretrained"):
        loramoe(seed=5).save_pretrained(tmp_path)
    model = tiny_llama() if attach in ("get_peft_model", "transformers", "from_pretrained") else loramoe()
    keys, config = set(model.state_dict()), LoRAMoEConfig(**CONFIG)
    with pytest.raises(ValueError, match=f"adapter_name=.* {REFUSED[name]}.*Take a short name"):
        if attach == "get_peft_model":
            get_peft_model(model, config, adapter_name=name)
        elif attach == "add_adapter":
            model.add_adapter(name, config)
        elif attach == "transformers":
            check_adapter_name(name) if not name else model.add_adapter(config, adapter_name=name)
        elif attach == "from_pretrained":
            PeftModel.from_pretrained(model, tmp_path, adapter_name=name)
        else:
            model.load_adapter(tmp_path, adapter_name=name)
    assert set(model.state_dict()) == keys
    assert list(getattr(model, "peft_config", None) or {}) in ([], ["default"])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_any_name_is_refused_or_saved_whole(names, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-names"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for name in names:
            check_adapter_name(name)
    except ValueError:
        with pytest.raises(ValueError, match="adapter_name="):
            model_with(names)
        return
    model_with(names).save_pretrained(folder)
    for name in names:
        assert len(load_file((folder if name == "default" else folder / name) / WEIGHTS)) == 18
