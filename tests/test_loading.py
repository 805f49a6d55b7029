"""Loading adapters in every way that PEFT and transformers offer, and every way in which that must fail."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, pipeline
from transformers import __version__ as transformers_version

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss
from tiny import labelled, loramoe, tiny_llama, tiny_tokenizer, token_batch


V5 = int(transformers_version.split(".")[0]) >= 5
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, two LoRAMoE adapters and a LoRA adapter on disk."""
    root = tmp_path_factory.mktemp("folders")
    tiny_llama().save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    loramoe(base).save_pretrained(root / "adapter")
    loramoe(AutoModelForCausalLM.from_pretrained(root / "base"), seed=5).save_pretrained(root / "other")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(root / "lora")
    return root


def logits(model, **batch):
    with torch.no_grad():
        return model.eval()(**(batch or token_batch())).logits


@pytest.fixture(scope="module")
def expected(folders):
    return logits(loramoe())


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def transformers_load(folder, model=None, **options):
    model = tiny_llama() if model is None else model
    model.load_adapter(str(folder), **options)
    return model


def renamed(folder, **options):
    model = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="another name", **options)
    assert list(model.peft_config) == ["another name"] and model.active_adapters == ["another name"]
    return model


def as_second_adapter(folder, **options):
    model = PeftModel.from_pretrained(tiny_llama(), folder.parent / "other")
    model.load_adapter(folder, adapter_name="second", **options)
    model.set_adapter("second")
    return model


def over_an_adapter_of_that_name(folder):
    model = loramoe(seed=5)
    model.load_adapter(folder, adapter_name="default")
    return model


LOADS = {
    "transformers from_pretrained": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "transformers load_adapter, renamed": lambda folder: transformers_load(folder, adapter_name="another name"),
    "transformers load_adapter, low_cpu_mem_usage": lambda folder: transformers_load(folder, low_cpu_mem_usage=True),
    "transformers load_adapter, trainable": lambda folder: transformers_load(folder, is_trainable=True),
    "AutoPeftModel, renamed": lambda folder: AutoPeftModelForCausalLM.from_pretrained(
        folder, adapter_name="another name"
    ),
    "renamed": renamed,
    "renamed, low_cpu_mem_usage": lambda folder: renamed(folder, low_cpu_mem_usage=True),
    "second": as_second_adapter,
    "second, low_cpu_mem_usage": lambda folder: as_second_adapter(folder, low_cpu_mem_usage=True),
    "over another": over_an_adapter_of_that_name,
    "with a config": lambda folder: PeftModel.from_pretrained(
        tiny_llama(), folder, config=PeftConfig.from_pretrained(folder)
    ),
    "revision": lambda folder: PeftModel.from_pretrained(tiny_llama(), folder, revision="main"),
    "ephemeral_gpu_offload": lambda folder: PeftModel.from_pretrained(
        tiny_llama(), folder, ephemeral_gpu_offload=True
    ),
    "trainable": lambda folder: PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True),
}


@pytest.mark.parametrize("load", LOADS)
def test_every_way_of_loading_gives_identical_logits(load, folders, expected):
    model = LOADS[load](folders / "adapter")
    assert torch.equal(logits(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "loramoe_experts" in name}
    # PEFT's set_adapter makes what it activates trainable
    assert bool(trained) == ("trainable" in load or "second" in load or load == "over another")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "loramoe_experts" not in name)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "load", ["PeftModel", "load_adapter", "transformers from_pretrained", "transformers load_adapter"]
)
def test_an_adapter_in_a_subfolder(load, folders, expected):
    if load == "PeftModel":
        model = PeftModel.from_pretrained(tiny_llama(), folders, subfolder="adapter")
    elif load == "load_adapter":
        model = PeftModel.from_pretrained(tiny_llama(), folders / "other")
        model.load_adapter(folders, adapter_name="second", subfolder="adapter")
        model.set_adapter("second")
    elif not V5:
        pytest.skip("transformers 4 looks for local adapters in the folder itself only, whatever their tuner")
    elif load == "transformers load_adapter":
        model = transformers_load(folders, adapter_kwargs={"subfolder": "adapter"})
    else:
        model = AutoModelForCausalLM.from_pretrained(folders, adapter_kwargs={"subfolder": "adapter"})
    assert torch.equal(logits(model), expected)


def test_a_loaded_adapter_balances(folders):
    batch = labelled(token_batch())
    losses = [
        model.train()(**batch, task_types=[0, 1, -1]).loss
        for model in (
            loramoe(),
            *(LOADS[load](folders / "adapter") for load in ("renamed", "transformers from_pretrained")),
        )
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("load", ["PeftModel", "PeftModel, not cast", "transformers", "transformers from_pretrained"])
def test_an_adapter_trained_on_float32_on_a_half_precision_backbone(load, dtype, folders, expected):
    if load.startswith("PeftModel"):
        cast = load == "PeftModel"
        model = PeftModel.from_pretrained(tiny_llama().to(dtype), folders / "adapter", autocast_adapter_dtype=cast)
    elif load == "transformers":
        model = transformers_load(folders / "adapter", tiny_llama().to(dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(folders / "adapter", torch_dtype=dtype)
    saved = load_file(folders / "adapter" / WEIGHTS)
    loaded = {name: p for name, p in model.named_parameters() if "loramoe_experts" in name}
    assert len(loaded) == len(saved)
    for name, parameter in loaded.items():
        key = "base_model.model." + name.removeprefix("base_model.model.").replace(".default", "")
        assert parameter.dtype == (torch.float32 if load == "PeftModel" else dtype)
        assert torch.equal(parameter, saved[key].to(parameter.dtype))
    output = logits(model)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    model.train()(**labelled(token_batch()), task_types=[0, 1, -1])
    assert balance_loss(model).dtype == torch.float32


def test_an_adapter_trained_on_bfloat16_on_a_float32_backbone(folders, tmp_path):
    half = loramoe(tiny_llama().to(torch.bfloat16))
    half.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(half).float(), atol=0.05, rtol=0.05)


# pipeline


@pytest.mark.parametrize("model", ["PeftModel", "folder", "transformers load_adapter"])
def test_pipelines_generate_with_the_adapter(model, folders):
    tokenizer = tiny_tokenizer()
    if model == "PeftModel":
        model = PeftModel.from_pretrained(tiny_llama(), folders / "adapter")
    elif model == "folder":
        model = str(folders / "adapter")
    else:
        model = transformers_load(folders / "adapter")
    options = dict(max_new_tokens=5, do_sample=False)
    prompts = [[5, 9, 3], [7, 8]]
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    answers = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)(
        texts, return_tensors=True, **options
    )
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt])
        alone = loramoe().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        assert answer[0]["generated_token_ids"][-5:] == alone[len(prompt) :]
        base = tiny_llama().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        assert base != alone


# damaged folders


def edit_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def edit_config(folder, **options):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def first_key(state):
    return min(state)


UNREADABLE = "adapter_model.safetensors of '.*' cannot be read .* is incomplete or damaged. Download it again"
UNFIT = "does not fit the LoRAMoE layers"
# what is done to the folder, the error's type and message
DAMAGES = {
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), RuntimeError, UNREADABLE
    ),
    "header cut": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]), RuntimeError, UNREADABLE
    ),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 9), RuntimeError, UNREADABLE),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), RuntimeError, UNREADABLE),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), (OSError, ValueError), None),
    "a tensor missing": (
        lambda folder: edit_weights(folder, lambda s: s.pop(first_key(s))), RuntimeError, f"(?s){UNFIT}.*missing: .*down_proj"
    ),
    "a layer missing": (
        lambda folder: edit_weights(folder, lambda s: [s.pop(k) for k in list(s) if "layers.1.mlp.up_proj" in k]),
        RuntimeError, rf"(?s){UNFIT}.*missing: .*layers\.1\.mlp\.up_proj",
    ),
    "a layer too many": (
        lambda folder: edit_weights(folder, lambda s: s.update({first_key(s).replace("layers.0", "layers.7"): torch.ones(2)})),
        RuntimeError, rf"(?s){UNFIT}.*unexpected: .*layers\.7",
    ),
    "a shape": (
        lambda folder: edit_weights(folder, lambda s: s.update({first_key(s): torch.ones(2, 2)})),
        RuntimeError, f"{UNFIT}|You set `ignore_mismatched_sizes` to `False`",  # transformers 5 puts the names into its log
    ),
    "r": (lambda folder: edit_config(folder, r=5), RuntimeError, f"{UNFIT}|You set `ignore_mismatched_sizes` to `False`"),
    "no LoRAMoE tensor": (
        lambda folder: save_file({"weight": torch.ones(1)}, folder / WEIGHTS), RuntimeError, f"(?s){UNFIT}.*missing: "
    ),
    "weights of a LoRA": (
        lambda folder: shutil.copy(folder.parent / "lora" / WEIGHTS, folder), RuntimeError, f"(?s){UNFIT}.*missing: "
    ),
    "no config": (lambda folder: (folder / CONFIG).unlink(), (OSError, ValueError), None),
    "half a config": (
        lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORAMOE", '), json.JSONDecodeError, "property name"
    ),
    "a bad option": (lambda folder: edit_config(folder, num_experts=1), ValueError, "num_experts=1 must be at least 2"),
    "an option of the future": (
        lambda folder: edit_config(folder, balance_formula="entropy"), ValueError, "balance_formula='entropy' is not one of"
    ),
    "another base model": (
        lambda folder: edit_config(folder, target_modules=["fc1"]), (ValueError, RuntimeError),
        rf"Target modules {{'fc1'}} not found|{UNFIT}"
    ),
}  # fmt: skip
FAILING_LOADS = {
    "PeftModel": lambda folder, model: PeftModel.from_pretrained(model, str(folder)),
    "low_cpu_mem_usage": lambda folder, model: PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True),
    "load_adapter": lambda folder, model: model.load_adapter(str(folder), adapter_name="second"),
    "transformers load_adapter": lambda folder, model: model.load_adapter(str(folder)),
    "transformers from_pretrained": lambda folder, model: AutoModelForCausalLM.from_pretrained(str(folder)),
}


@pytest.fixture
def damaged(folders, request):
    folder = folders / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / "adapter", folder)
    DAMAGES[request.param][0](folder)
    return request.param, folder


@pytest.mark.parametrize("load", FAILING_LOADS)
@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_a_damaged_adapter_is_an_error(damaged, load):
    damage, folder = damaged
    _, error, message = DAMAGES[damage]
    if damage == "no config" and load == "transformers from_pretrained":
        error, message = ValueError, "Unrecognized model"  # it is not an adapter, then
    model = loramoe(seed=5) if load == "load_adapter" else tiny_llama()
    with pytest.raises(error, match=message):
        FAILING_LOADS[load](folder, model)


@pytest.mark.parametrize("load", ["PeftModel", "low_cpu_mem_usage", "load_adapter", "transformers load_adapter"])
@pytest.mark.parametrize(
    "damaged", ["truncated", "a layer missing", "no weights", "r", "weights of a LoRA"], indirect=True
)
def test_a_failed_load_leaves_the_model_as_it_was(damaged, load, folders, expected):
    model = loramoe(seed=5) if load == "load_adapter" else tiny_llama()
    before, output = snapshot(model), logits(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(Exception):  # noqa: B017
        FAILING_LOADS[load](damaged[1], model)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert list(getattr(model, "peft_config", ())) == (["default"] if load == "load_adapter" else [])
    assert torch.equal(logits(model), output)
    # and it is fit for another try
    if load == "load_adapter":
        model.load_adapter(folders / "adapter", adapter_name="second")
        model.set_adapter("second")
    else:
        FAILING_LOADS[load](folders / "adapter", model)
        assert sum(isinstance(module, LoRAMoELinear) for module in model.modules()) == 6
    assert torch.equal(logits(model), expected)


def test_a_failed_load_leaves_saved_modules_and_the_first_adapter_as_they_were(folders, tmp_path):
    loramoe(modules_to_save=["lm_head"], trainable_token_indices=[3]).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.pop(next(k for k in state if "router" in k)))
    model = loramoe(seed=5)
    before, output = snapshot(model), logits(model)
    with pytest.raises(RuntimeError, match=UNFIT):
        model.load_adapter(tmp_path, adapter_name="second")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), output)


# several adapters


def transformers_peft(folder, model, name):
    """transformers' own method, on a model of its."""
    model = tiny_llama() if model is None else model
    model.load_adapter(str(folder), adapter_name=name)
    return model


def peft(folder, model, name):
    if model is None:
        return PeftModel.from_pretrained(tiny_llama(), folder, adapter_name=name)
    model.load_adapter(folder, adapter_name=name)
    return model


def peft_after_a_new_adapter(folder, model, name):
    """The first adapter is a new one, of which no file knows."""
    if model is None:
        model = get_peft_model(tiny_llama(), LoRAMoEConfig(r=2, task_type="CAUSAL_LM"), adapter_name="new")
    return peft(folder, model, name)


def transformers_after_a_new_adapter(folder, model, name):
    if model is None:
        model = tiny_llama()
        model.add_adapter(LoRAMoEConfig(r=2), adapter_name="new")
    return transformers_peft(folder, model, name)


METHODS = [transformers_peft, peft, peft_after_a_new_adapter, transformers_after_a_new_adapter]
SEVERAL = [("default", "second"), ("a", "ab", "abc"), ("abc", "ab", "a"), ("a", "A"), ("x_default", "default", "default_x"),
           ("loramoe", "moe", "loramoe_experts"), ("router", "A", "B"), ("mlp", "layers", "model")]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize("names", SEVERAL, ids="-".join)
@pytest.mark.parametrize("load", METHODS)
def test_several_adapters_are_loaded_one_after_the_other(load, names, folders):
    sources = {name: folders / ("adapter", "other")[i % 2] for i, name in enumerate(names)}
    outputs = {name: logits(PeftModel.from_pretrained(tiny_llama(), folder)) for name, folder in sources.items()}
    model = None
    for name, folder in sources.items():
        model = load(folder, model, name)
    for name in (*names, *reversed(names)):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs[name]), name


@pytest.mark.parametrize("load", METHODS)
@pytest.mark.parametrize("names", [("a", "ab"), ("ab", "a"), ("default", "second")], ids="-".join)
@pytest.mark.parametrize("damaged", ["a tensor missing", "a layer missing", "a layer too many", "r"], indirect=True)
def test_a_damaged_further_adapter_is_an_error(damaged, names, load, folders):
    first, second = names
    model = load(folders / "other", None, first)
    model.set_adapter(first)
    expected = logits(model)
    with pytest.raises(RuntimeError, match=f"{UNFIT}|You set `ignore_mismatched_sizes` to `False`"):
        load(damaged[1], model, second)
    assert second not in model.peft_config and torch.equal(logits(model), expected)
    model = load(folders / "adapter", model, second)


@pytest.mark.skipif(not V5, reason="transformers 4 loads no saved modules")
def test_saved_modules_of_several_adapters(tmp_path):
    for seed, name in enumerate(("a", "ab")):
        model = loramoe(seed=seed, modules_to_save=["lm_head"])
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
        model.save_pretrained(tmp_path / name)
    outputs = {name: logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)) for name in ("a", "ab")}
    model = None
    for name in outputs:
        model = transformers_peft(tmp_path / name, model, name)
    for name in (*outputs, "a"):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs[name])


# versions and tuners


@pytest.mark.parametrize(
    "load", ["renamed", "second", "transformers from_pretrained", "transformers load_adapter, renamed"]
)
def test_options_of_a_future_version_are_ignored_with_a_warning(load, folders, expected, tmp_path):
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    shutil.copytree(folders / "other", tmp_path / "other")
    edit_config(tmp_path / "adapter", expert_choice=True, balance_schedule=[0, 1])
    with pytest.warns(
        UserWarning, match=r"\['balance_schedule', 'expert_choice'\] for class LoRAMoEConfig, these are ignored"
    ):
        model = LOADS[load](tmp_path / "adapter")
    assert torch.equal(logits(model), expected)


def test_a_config_of_a_newer_version_says_which_package_to_upgrade(folders, tmp_path):
    shutil.copytree(folders / "adapter", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, peft_loramoe_version="99.0")
    with pytest.warns(UserWarning, match=r"written by peft_loramoe 99\.0, newer .* Upgrade peft_loramoe"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_config_of_this_version_loads_without_a_warning(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(folders / "adapter")
    assert isinstance(config, LoRAMoEConfig)


def test_a_lora_adapter_stays_a_lora_adapter(folders):
    assert isinstance(PeftConfig.from_pretrained(folders / "lora"), LoraConfig)
    assert isinstance(LoRAMoEConfig.from_pretrained(folders / "lora"), LoraConfig)  # as PEFT's own configs do
    outputs = []
    for load in (
        lambda folder: PeftModel.from_pretrained(tiny_llama(), folder),
        transformers_load,
        AutoModelForCausalLM.from_pretrained,
    ):
        model = load(folders / "lora")
        assert any(type(module).__module__.startswith("peft.tuners.lora") for module in model.modules())
        assert not any(isinstance(module, LoRAMoELinear) for module in model.modules())
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], logits(tiny_llama()))


def test_a_damaged_adapter_of_another_method_fails_as_without_this_package(folders, tmp_path):
    shutil.copytree(folders / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")


@pytest.mark.parametrize(("first", "second"), [("adapter", "lora"), ("lora", "adapter")])
def test_adapters_of_two_tuners_in_one_peft_model_are_refused(first, second, folders):
    model = PeftModel.from_pretrained(tiny_llama(), folders / first)
    before, output = snapshot(model), logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(folders / second, adapter_name="second")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), output)


def test_the_auto_class_of_another_task_is_refused(folders):
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(folders / "adapter")


# names


NAMES = [
    "loramoe_",
    "loramoe_x",
    "my_loramoe_adapter",
    "loramoe",
    "moe",
    "o",
    "A",
    "router",
    "base_layer",
    "loramoe_experts",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
def test_names_that_contain_the_prefix_or_parts_of_the_keys(name, folders, expected, tmp_path):
    base, config = tiny_llama(), LoRAMoEConfig(r=2, init_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)  # as in `loramoe`
    model = get_peft_model(base, config, adapter_name=name)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / name / WEIGHTS).keys() == load_file(folders / "adapter" / WEIGHTS).keys()
    for loaded in (
        PeftModel.from_pretrained(tiny_llama(), tmp_path / name),
        PeftModel.from_pretrained(tiny_llama(), folders / "adapter", adapter_name=name),
        PeftModel.from_pretrained(tiny_llama(), folders / "adapter", adapter_name=name, low_cpu_mem_usage=True),
        transformers_load(tmp_path / name, adapter_name=name),
    ):
        assert torch.equal(logits(loaded), expected)
    model.load_adapter(folders / "other", adapter_name=f"{name}2")
    assert torch.equal(logits(model), expected)
    model.delete_adapter(name)
    assert torch.equal(logits(model), logits(loramoe(seed=5)))


# what the method cannot do


@pytest.mark.parametrize("attach", ["get_peft_model", "from_pretrained", "add_adapter"])
def test_mixed_models_are_refused_by_peft(attach, folders):
    model = tiny_llama()
    if attach == "add_adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), mixed=True)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="'LORAMOE' is not compatible with the `PeftMixedModel`|not supported for mixed models"
    ):
        if attach == "get_peft_model":
            get_peft_model(model, LoRAMoEConfig(), mixed=True)
        elif attach == "from_pretrained":
            PeftMixedModel.from_pretrained(model, folders / "adapter")
        else:
            model.add_adapter("second", LoRAMoEConfig())
    assert_unchanged(model, before)


def refuse(model, error, message, call):
    before, output, configs = snapshot(model), logits(model), dict(model.peft_config)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before)
    assert model.peft_config == configs
    assert torch.equal(logits(model), output)


def two_adapters(folders):
    model = PeftModel.from_pretrained(tiny_llama(), folders / "adapter")
    model.load_adapter(folders / "other", adapter_name="other")
    return model


def up_proj(model):
    return model.get_base_model().model.layers[0].mlp.up_proj


# four spellings are in test_model.py
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(progressbar=True),
        lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default", "other"]),
        lambda model: model.merge_adapter(["other"], safe_merge=True),
        lambda model: model.base_model.merge_adapter(safe_merge=True),
        lambda model: model.base_model.merge_and_unload(),
        lambda model: up_proj(model).merge(),
        lambda model: up_proj(model).merge(safe_merge=True, adapter_names=["other"]),
    ],
)
def test_further_spellings_of_merging(merge, folders):
    refuse(two_adapters(folders), ValueError, "LoRAMoE adapters cannot be merged: .* use unload", merge)


def test_unmerging_changes_nothing(folders):
    model = two_adapters(folders)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("model_of", [lambda model: model, lambda model: model.base_model])
def test_weighted_combinations_are_refused(model_of, folders):
    message = r"cannot be combined into one by weights.* instead, model\.base_model\.set_adapter\(\[\.\.\.\]\)"
    for combination_type in ("linear", "svd", "cat"):
        refuse(
            two_adapters(folders),
            ValueError,
            message,
            lambda model: model_of(model).add_weighted_adapter(
                ["default", "other"],
                [0.5, 0.5],
                "mixture",
                combination_type=combination_type,  # noqa: B023
            ),
        )


def test_what_the_error_advises_instead_of_a_combination_works(folders):
    model = two_adapters(folders)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(model), logits(loramoe()))


def test_hot_swapping_is_refused(folders):
    refuse(
        two_adapters(folders),
        ValueError,
        "LoRAMoE adapters cannot be hot-swapped.*model.load_adapter.*model.set_adapter",
        lambda model: hotswap_adapter(model, str(folders / "other"), "default"),
    )


@pytest.mark.skipif(not V5, reason="transformers 4 has no hot-swapping")
def test_hot_swapping_by_transformers_is_refused(folders):
    refuse(
        transformers_load(folders / "adapter", adapter_name="default"),
        ValueError,
        "Hotswapping is currently only supported for LoRA, please set `hotswap=False`",
        lambda model: model.load_adapter(str(folders / "other"), adapter_name="default", hotswap=True),
    )


# without this package

WITHOUT_IMPORT = """
import json, sys
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

adapter, base = sys.argv[1:]
model = lambda: AutoModelForCausalLM.from_pretrained(base)
entry_points = {
    "PeftConfig.from_pretrained": lambda: PeftConfig.from_pretrained(adapter),
    "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(model(), adapter),
    "PeftModel.load_adapter": lambda: get_peft_model(model(), LoraConfig()).load_adapter(adapter, "second"),
    "PeftMixedModel.from_pretrained": lambda: PeftMixedModel.from_pretrained(model(), adapter),
    "AutoPeftModelForCausalLM.from_pretrained": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModelForCausalLM.from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    "model.load_adapter": lambda: model().load_adapter(adapter),
    "pipeline": lambda: pipeline("text-generation", model=adapter),
}
raised = {}
for name, call in entry_points.items():
    try:
        call()
        raised[name] = None
    except Exception as error:
        raised[name] = [type(error).__name__, str(error)]
assert "peft_loramoe" not in sys.modules
print(json.dumps(raised))
"""


@pytest.mark.slow
def test_without_the_import_every_entry_point_stops_with_the_same_error(folders):
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(folders / "adapter"), str(folders / "base")]
    raised = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert len(raised) == 8
    assert raised == {name: ["KeyError", "'LORAMOE'"] for name in raised}


def test_layers_wrapped_for_activation_checkpointing_are_saved_and_loaded():
    model, expected = loramoe(), get_peft_model_state_dict(loramoe())
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    saved = get_peft_model_state_dict(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    model.load_state_dict(model.state_dict())


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.embed_tokens"]], ids=str
)
def test_tied_embeddings_are_trained_tied_and_saved_as_by_lora(modules, tmp_path):
    model = loramoe(tiny_llama(**TIED), modules_to_save=modules, ensure_weight_tying=True)
    base = model.get_base_model()
    embedding, head = (m.modules_to_save["default"].weight for m in (base.model.embed_tokens, base.lm_head))
    assert embedding is head and embedding.requires_grad
    model.train()(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
    torch.optim.SGD([embedding], lr=1.0).step()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    lora = LoraConfig(
        target_modules=["up_proj"], modules_to_save=modules, ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_llama(**TIED), lora).save_pretrained(tmp_path / "lora")
    saved, of_lora = (
        {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if "embed" in key or "head" in key}
        for folder in (tmp_path, tmp_path / "lora")
    )
    assert saved.keys() == of_lora.keys()
    assert all(torch.equal(tensor, embedding) for tensor in saved.values())
    loaded = PeftModel.from_pretrained(tiny_llama(**TIED), tmp_path)
    assert torch.equal(logits(loaded), expected)
    base = loaded.get_base_model()
    assert base.model.embed_tokens.modules_to_save["default"].weight is base.lm_head.modules_to_save["default"].weight


def test_trained_tokens_of_tied_embeddings_stay_tied(tmp_path):
    model = loramoe(tiny_llama(**TIED), trainable_token_indices=[1, 2], ensure_weight_tying=True)
    deltas = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert len(deltas) == 1
    torch.nn.init.normal_(deltas[0])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(**TIED), tmp_path)), expected)


def test_without_ensure_weight_tying_peft_warns():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        loramoe(tiny_llama(**TIED), modules_to_save=["embed_tokens"])


def test_adapters_of_tied_embeddings_cannot_be_tied():
    model = tiny_llama(**TIED)
    with pytest.raises(
        ValueError, match="ensure_weight_tying=True cannot tie the adapters of target_modules=.*modules_to_save"
    ):
        loramoe(model, target_modules=["up_proj", "lm_head"], ensure_weight_tying=True)
