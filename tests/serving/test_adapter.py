import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_loramoe.serving.adapter import num_parts, part_scales, read_layers, split
from tiny import loramoe


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER = "model.layers.0.mlp.down_proj"
OPTIONS = {
    "default": {},
    "null experts": {"num_experts": 6, "expert_groups": [2, 4], "null_groups": [0]},
    "top_k": {"num_experts": 4, "top_k": 2},
    "temperature": {"router_temperature": 0.3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"down_proj": 5},
        "num_experts_pattern": {"down_proj": [1, 4]},
    },
}


def saved(folder, **options):
    loramoe(**options).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_sum_to_a_float32(dtype):
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 40)
    parts = split(weight, dtype)
    total = sum(scale * part.double() for scale, part in zip(part_scales(dtype), parts))
    assert {part.dtype for part in parts} == {dtype}
    torch.testing.assert_close(total, weight.double(), rtol=2**-22, atol=0)


def test_float32_slots_take_one_row_for_each_router_output():
    assert [num_parts(dtype) for dtype in DTYPES] == [1, 3, 3]


def test_slots_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"lora_dtype=torch.float64 is not one of torch.float32"):
        num_parts(torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_formula_of_a_layer_is_that_of_peft(options, tmp_path):
    model = loramoe(**options).eval()
    model.save_pretrained(tmp_path)
    layer = model.get_submodule(f"base_model.model.{LAYER}")
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1))
    added = layer(x) - layer.get_base_layer()(x)
    wanted = read_layers(tmp_path)[LAYER].reference(x, torch.float32)
    torch.testing.assert_close(added.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_holds_the_experts_before_the_router(dtype, tmp_path):
    layer = read_layers(saved(tmp_path, **OPTIONS["null experts"]))[LAYER]
    a, b, rank = layer.lora_a(dtype), layer.lora_b(dtype), layer.layout.rank(dtype)
    assert (layer.layout.channels, a.shape[0], b.shape[1]) == (8, rank, rank)
    assert torch.equal(a[:8], layer.A.to(dtype)) and torch.equal(b[:, :8], layer.B.to(dtype))
    assert not b[:, 8:].any()


def test_every_adapted_linear_is_read(tmp_path):
    assert len(read_layers(saved(tmp_path, target_modules=["q_proj", "down_proj"]))) == 4


def test_rounding_turns_a_close_choice_of_top_k(tmp_path):
    layer = read_layers(saved(tmp_path, num_experts=4, top_k=1))[LAYER]
    layer.router[:] = torch.eye(4, layer.router.shape[1])
    x = torch.zeros(2, layer.router.shape[1])
    x[:, :4] = torch.tensor([[3.0, 1, 0, 0], [3.0, 3.000001, 0, 0]])
    assert layer.is_certain(x).tolist() == [True, False]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save=\['lm_head'\]; a LoRA slot has no place for whole modules",
        ),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]; .* trained embeddings"),
        ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16', but slots compute the router's logits in float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_option_that_no_slot_can_hold_is_refused(options, message, tmp_path):
    saved(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        read_layers(tmp_path)


def test_trained_biases_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": "all"}))
    with pytest.raises(ValueError, match="bias='all'; a LoRA slot has no place for trained biases"):
        read_layers(tmp_path)


def test_float64_logits_are_served_in_float32_with_a_warning(tmp_path):
    saved(tmp_path, router_dtype="float64")
    with pytest.warns(UserWarning, match="slots compute the router's logits in float32"):
        read_layers(tmp_path)


def damaged(folder, change):
    saved(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{LAYER}.loramoe_experts.A"
    change(tensors, key)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()}),
            r"A of .* has shape \(11, 48\).*\(12, 48\)",
        ),
        (lambda tensors, key: tensors[key].fill_(float("nan")), "A of .* has NaN or infinity"),
        (lambda tensors, key: tensors.pop(key), "lacks the tensor loramoe_experts.A"),
        (
            lambda tensors, key: tensors.update(other=torch.ones(1)),
            "holds 'other', which no LoRA slot has a place for",
        ),
    ],
    ids=["shape", "nan", "missing", "left over"],
)
@pytest.mark.filterwarnings("ignore:.*has NaN")
def test_damaged_tensors_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_layers(damaged(tmp_path, change))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = saved(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        read_layers(tmp_path)
