"""Plain LoRAs as experts: what they compute before and after, what is refused, and experts that stay frozen."""

import copy
import json
import warnings

import pytest
import torch
from damaged_adapters import convert_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear
from peft_loramoe.interop import upcycle
from tiny import labelled, loramoe, tiny_llama, token_batch


TARGETS = ["q_proj", "down_proj"]
MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
# Different in everything that experts can make up for.
OPTIONS = {
    "first": {"r": 2, "lora_alpha": 7},
    "second": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "third": {
        "r": 3,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 9},
    },
}


def lora(seed, model=None, **options):
    torch.manual_seed(seed)
    config = {"target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(tiny_llama() if model is None else model, LoraConfig(**config)).eval()


def saved(folder, seed=1, **options):
    lora(seed, **options).save_pretrained(folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    return [saved(tmp_path / name, seed, **options) for seed, (name, options) in enumerate(OPTIONS.items())]


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def loaded(folder, model=None, **options):
    return PeftModel.from_pretrained(tiny_llama() if model is None else model, folder, **options).eval()


def experts_of(model, adapter="default"):
    return [module.loramoe_experts[adapter] for module in model.modules() if isinstance(module, LoRAMoELinear)]


def weights_of_expert(folder, module, expert, num_experts):
    """The product B A of one expert, whose scaling is one."""
    config = LoRAMoEConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.loramoe_experts.{name}"] for name in "AB")
    r = A.shape[0] // num_experts
    assert (
        config.scaling(config.rank_pattern.get(module, config.r), config.alpha_pattern.get(module, config.lora_alpha))
        == 1
    )
    return B[:, expert * r : (expert + 1) * r] @ A[expert * r : (expert + 1) * r]


@pytest.mark.parametrize("expert", range(3))
def test_with_a_one_hot_router_each_expert_is_its_lora(tmp_path, sources, expert):
    upcycle(sources, tmp_path / "moe")
    model, single = loaded(tmp_path / "moe"), loaded(sources[expert])
    for name in MODULES:
        layer, expected = model.base_model.model.get_submodule(name), single.base_model.model.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        x[:, 0] = 1
        with torch.no_grad():
            layer.loramoe_experts["default"].router[expert, 0] = 1e4  # the first channel decides
            assert (expected(x) - layer.base_layer(x)).norm() > 0.1 * expected(x).norm()
            torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=1e-6)


def test_the_weight_of_each_expert_is_that_of_its_lora(tmp_path, sources):
    upcycle(sources, tmp_path / "moe")
    for expert, source in enumerate(sources):
        model = loaded(source)
        for module in MODULES:
            expected = model.base_model.model.get_submodule(module).get_delta_weight("default")
            torch.testing.assert_close(
                weights_of_expert(tmp_path / "moe", module, expert, 3), expected, rtol=1e-6, atol=1e-6
            )


def test_the_start_is_the_mean_of_the_loras(tmp_path, sources):
    upcycle(sources, tmp_path / "moe")
    mean = tiny_llama().eval()
    with torch.no_grad():
        for source in sources:
            layers = loaded(source).base_model.model
            for module in MODULES:
                mean.get_submodule(module).weight += layers.get_submodule(module).get_delta_weight("default") / 3
    torch.testing.assert_close(logits(loaded(tmp_path / "moe")), logits(mean), rtol=1e-5, atol=1e-6)


def test_filled_up_ranks_can_learn(tmp_path, sources):
    upcycle(sources, tmp_path / "moe", balance_loss_weight=0.0)
    model = loaded(tmp_path / "moe", is_trainable=True).train()
    model(**labelled(token_batch())).loss.backward()
    first = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj").loramoe_experts["default"]
    assert first.r == 6 and torch.all(first.B[:, 2:6] == 0)  # the first LoRA has rank 2, the third 6
    assert torch.all(first.B.grad[:, 2:6].abs().sum(0) > 0)


def test_adapters_on_a_loaded_model(tmp_path, sources):
    model = loaded(sources[0], adapter_name="one")
    model.load_adapter(sources[1], adapter_name="two")
    upcycle(["one", "two"], tmp_path / "from model", model=model)
    torch.manual_seed(0)
    upcycle(sources[:2], tmp_path / "from folders")
    for expert in range(2):
        for module in MODULES:
            found, expected = (
                weights_of_expert(tmp_path / f"from {kind}", module, expert, 2) for kind in ("model", "folders")
            )
            assert torch.equal(found, expected)


@pytest.mark.parametrize("method, num_experts", [("replicate", 4), ("split", 2), ("split", 3), ("split", 5)])
@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 6}])
def test_one_lora_starts_as_it_was(tmp_path, method, num_experts, rank_pattern):
    source = saved(tmp_path / "lora", r=5, lora_alpha=7, rank_pattern=rank_pattern)
    config = upcycle(source, tmp_path / "moe", num_experts=num_experts, method=method)
    assert config.num_experts == num_experts
    torch.testing.assert_close(logits(loaded(tmp_path / "moe")), logits(loaded(source)), rtol=1e-5, atol=1e-6)


def test_replicas_grow_apart(tmp_path):
    source = saved(tmp_path / "lora", r=2)
    upcycle(source, tmp_path / "moe", num_experts=2, balance_loss_weight=0.0)
    model = loaded(tmp_path / "moe", is_trainable=True).train()
    model(**labelled(token_batch())).loss.backward()
    for experts in experts_of(model):
        first, second = experts.B.grad.chunk(2, dim=1)
        assert (first - second).norm() > 1e-3 * first.norm()


def test_split_beside_null_experts_starts_as_it_was(tmp_path):
    source = saved(tmp_path / "lora", r=4)
    options = {"expert_groups": [3, 2], "null_groups": [0], "task_type_names": ["knowledge", "tasks"]}
    config = upcycle(source, tmp_path / "moe", num_experts=2, method="split", **options)
    assert (config.num_experts, config.expert_groups) == (5, [3, 2])
    torch.testing.assert_close(logits(loaded(tmp_path / "moe")), logits(loaded(source)), rtol=1e-5, atol=1e-6)


def test_conv1d_layers(tmp_path):
    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))

    source = tmp_path / "lora"
    lora(1, base(), target_modules=["c_fc"], fan_in_fan_out=True).save_pretrained(source)
    upcycle(source, tmp_path / "moe", num_experts=2, method="split")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "moe", base())), logits(loaded(source, base())), rtol=1e-5, atol=1e-6
    )


def test_options_that_the_sources_agree_on_are_taken_over(tmp_path):
    common = {"lora_dropout": 0.1, "layers_to_transform": [1]}
    sources = [saved(tmp_path / str(seed), seed, **common) for seed in range(2)]
    config = upcycle(sources, tmp_path / "moe", balance_delta=0.3)
    assert (config.lora_dropout, config.layers_to_transform, config.target_modules) == (0.1, [1], set(TARGETS))
    assert (config.task_type, config.balance_delta, config.expert_groups) == ("CAUSAL_LM", 0.3, [2])
    assert len(experts_of(loaded(tmp_path / "moe"))) == 2


def test_the_same_modules_by_other_names(tmp_path):
    sources = [saved(tmp_path / "one", 1), saved(tmp_path / "two", 2, target_modules=r".*\.(q_proj|down_proj)")]
    assert upcycle(sources, tmp_path / "moe").target_modules == set(MODULES)
    assert len(experts_of(loaded(tmp_path / "moe"))) == 4


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora=True, which experts cannot represent"),
        ({"lora_bias": True}, "lora_bias=True, which experts cannot represent"),
        ({"bias": "all"}, "bias='all', which experts cannot represent"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which experts cannot represent"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\], which experts cannot represent"),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights='olora', with which PEFT changes the weights of the base model",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            r"has tensors that experts cannot represent: .*embed_tokens\.lora_embed",
        ),
        (
            {"target_modules": ["q_proj", "o_proj"]},
            r"different target modules.*only '.*good' has .*down_proj.*bad' has .*o_proj",
        ),
        ({"layers_to_transform": [0]}, r"different target modules.*layers\.1\.mlp\.down_proj.*bad' has none"),
        ({"task_type": None}, r"The LoRAs differ in task_type: .*\. Choose one with task_type=\.\.\."),
        ({"lora_dropout": 0.2}, r"The LoRAs differ in lora_dropout"),
    ],
)
def test_loras_that_experts_cannot_represent(tmp_path, options, message):
    good = saved(tmp_path / "good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad = saved(tmp_path / "bad", **options)
    with pytest.raises(ValueError, match=message):
        upcycle([good, bad], tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_base_models_of_another_size(tmp_path):
    good = saved(tmp_path / "good")
    lora(1, tiny_llama(intermediate_size=40)).save_pretrained(tmp_path / "bad")
    with pytest.raises(
        ValueError, match=r"different base models: '.*down_proj' has .* sizes \(48, 32\) .* and \(40, 32\)"
    ):
        upcycle([good, tmp_path / "bad"], tmp_path / "moe")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_loras_become_experts_or_are_refused_in_our_words(data, tmp_path_factory):
    lora = saved(tmp_path_factory.mktemp("whole"))
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    source = tmp_path_factory.mktemp("damaged")
    convert_damaged(config, tensors, data, source, lambda source, output: upcycle(source, output, num_experts=2))


def test_adapters_of_another_method(tmp_path):
    loramoe().save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="'.*bad' is not a plain LoRA: it has peft_type='LORAMOE'"):
        upcycle(tmp_path / "bad", tmp_path / "moe", num_experts=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, key: t.pop(key), r"needs A and B of the same rank for '.*q_proj', but has \{'B': \(32, 8\)\}"),
        (
            lambda t, key: t.update({key: torch.ones(3, 32)}),
            r"same rank for '.*q_proj', but has \{'A': \(3, 32\)",
        ),
        (
            lambda t, key: t.update({key: torch.ones(3, 32), key.replace("_A", "_B"): torch.ones(32, 3)}),
            r"has tensors of rank 3 for '.*q_proj', but its configuration says r=8",
        ),
        (lambda t, key: t.clear(), "has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_together(tmp_path, change, message):
    path = saved(tmp_path / "lora") / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        upcycle(path.parent, tmp_path / "moe", num_experts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "One source needs num_experts"),
        ({"num_experts": 1}, ValueError, "num_experts=1 must be an integer, at least 2"),
        (
            {"num_experts": 9, "method": "split"},
            ValueError,
            r"LoRA of '.*' has rank 8 and cannot be split into 9 experts",
        ),
        ({"num_experts": 2, "method": "clone"}, ValueError, "method='clone' is not one of 'replicate', 'split'"),
        ({"num_experts": 2, "router_init": "zeros"}, ValueError, "experts that stay identical"),
        (
            {"num_experts": 2, "method": "split", "router_init": "normal"},
            ValueError,
            "do not set router_init or top_k",
        ),
        ({"num_experts": 2, "method": "split", "top_k": 1}, ValueError, "do not set router_init or top_k"),
        (
            {"num_experts": 2, "expert_groups": [1, 2], "null_groups": [0]},
            ValueError,
            "with null_groups does not start as the",
        ),
        (
            {"num_experts": 4, "expert_groups": [1, 2]},
            ValueError,
            r"expert_groups=\[1, 2\] .* has 3 LoRA experts, not 4",
        ),
        ({"num_experts": 2, "r": 4}, TypeError, "r cannot be set; the sources determine it"),
        ({"num_experts": 2, "lora_rank": 4}, TypeError, "lora_rank is not an option of LoRAMoEConfig"),
        ({"num_experts": 2, "balance_delta": 2}, ValueError, r"balance_delta=2 must be in \[0, 1\)"),
    ],
)
def test_options_that_do_not_fit_together(tmp_path, options, error, message):
    source = saved(tmp_path / "lora")
    with pytest.raises(error, match=message):
        upcycle(source, tmp_path / "moe", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_numbers_of_sources(tmp_path, sources):
    with pytest.raises(ValueError, match="sources is empty"):
        upcycle([], tmp_path / "moe")
    with pytest.raises(ValueError, match="num_experts=2, but there are 3 sources"):
        upcycle(sources, tmp_path / "moe", num_experts=2)


def test_several_sources_are_not_split(tmp_path, sources):
    with pytest.raises(
        ValueError, match="method='split' has no effect with 3 sources.*leave it out, or give one source"
    ):
        upcycle(sources, tmp_path / "moe", method="split")


def test_models_without_the_adapter(tmp_path):
    with pytest.raises(ValueError, match="The model has no adapter 'other'; it has 'default'"):
        upcycle("other", tmp_path / "moe", model=lora(1), num_experts=2)
    with pytest.raises(TypeError, match="model must be a PeftModel, not LlamaForCausalLM"):
        upcycle("other", tmp_path / "moe", model=tiny_llama(), num_experts=2)


def test_existing_output(tmp_path):
    source = saved(tmp_path / "lora")
    with pytest.raises(FileExistsError, match="exists already"):
        upcycle(source, source, num_experts=2)


# freeze_experts


def trainable(model):
    """Names of the trainable tensors of each adapter, without the layers' names."""
    return {tuple(name.split(".")[-2:]) for name, p in model.named_parameters() if p.requires_grad}


ROUTERS = {("default", "router")}


def test_only_the_routers_move(tmp_path, sources):
    upcycle(sources, tmp_path / "moe", freeze_experts=True, expert_groups=[1, 2])
    model = loaded(tmp_path / "moe", is_trainable=True).train()
    assert trainable(model) == ROUTERS
    before = copy.deepcopy(get_peft_model_state_dict(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(**labelled(token_batch()), task_types=[0, 1, 1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, before[key]) == (not key.endswith(".router")), key


def test_frozen_from_the_start_and_after_saving(tmp_path):
    model = loramoe(freeze_experts=True)
    assert trainable(model) == ROUTERS
    model.save_pretrained(tmp_path)
    assert trainable(loaded(tmp_path)) == set()
    again = loaded(tmp_path, is_trainable=True)
    assert trainable(again) == ROUTERS and again.peft_config["default"].freeze_experts


def test_frozen_through_switching_and_disabling():
    model = loramoe(freeze_experts=True)
    model.add_adapter("free", LoRAMoEConfig(r=2))
    free = {("free", name) for name in ("A", "B", "router")}
    assert trainable(model) == ROUTERS
    model.set_adapter("free")
    assert trainable(model) == free
    model.base_model.set_adapter(["default", "free"])
    assert trainable(model) == ROUTERS | free
    model.set_adapter("default")
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == ROUTERS
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad("default")
    assert trainable(model) == ROUTERS
    model.set_requires_grad("default", requires_grad=False)
    assert trainable(model) == set()


def test_a_frozen_adapter_beside_another_one(tmp_path):
    loramoe(freeze_experts=True).save_pretrained(tmp_path)
    model = loramoe()
    model.load_adapter(tmp_path, adapter_name="frozen", is_trainable=True)
    model.set_adapter("frozen")
    assert trainable(model) == {("frozen", "router")}
    model.delete_adapter("default")
    assert trainable(model) == {("frozen", "router")}


def test_frozen_with_native_loading_and_copies(tmp_path):
    loramoe(freeze_experts=True).save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(str(tmp_path), adapter_name="default", is_trainable=True)
    model.set_adapter("default")
    assert trainable(model) == ROUTERS
    twin = copy.deepcopy(model)
    twin.set_adapter("default")
    assert trainable(twin) == ROUTERS
