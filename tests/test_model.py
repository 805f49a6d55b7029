import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from tiny import VOCAB, labelled, loramoe, tiny_llama, token_batch


def logits(model, **batch):
    with torch.no_grad():
        return model.eval()(**(batch or token_batch())).logits


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_fresh_adapter_does_not_change_the_model():
    assert torch.equal(logits(loramoe(init_weights=True)), logits(tiny_llama()))


def test_training_moves_the_adapter_only_and_the_loss_falls():
    model, batch = loramoe(init_weights=True), labelled(token_batch())
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, task_types=[0, 1, 1]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("loramoe_experts" not in name), name


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, "low_cpu_mem_usage", "AutoPeftModel", "transformers"])
def test_a_saved_adapter_gives_identical_logits_when_loaded(load, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = loramoe(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_dropout=0.1)
    model.save_pretrained(tmp_path / "adapter")
    if load == "AutoPeftModel":
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    elif load == "transformers":
        loaded = tiny_llama()
        loaded.load_adapter(str(tmp_path / "adapter"))
    elif load == "low_cpu_mem_usage":
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
    else:
        loaded = load(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_an_adapter_saved_by_transformers_loads_in_peft(tmp_path):
    model = tiny_llama()
    model.add_adapter(LoRAMoEConfig(r=2, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_the_checkpoint_holds_three_tensors_for_each_linear(tmp_path):
    loramoe(null_groups=[0], num_experts_pattern={"down_proj": [1, 4]}).save_pretrained(tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    layer = "base_model.model.model.layers.0.mlp"
    assert len(shapes) == 18
    assert shapes[f"{layer}.up_proj.loramoe_experts.A"] == (6, 32)
    assert shapes[f"{layer}.up_proj.loramoe_experts.B"] == (48, 6)
    assert shapes[f"{layer}.up_proj.loramoe_experts.router"] == (6, 32)
    assert shapes[f"{layer}.down_proj.loramoe_experts.A"] == (8, 48)
    assert shapes[f"{layer}.down_proj.loramoe_experts.router"] == (5, 48)


def test_a_state_dict_round_trip_through_peft():
    model = loramoe()
    state = get_peft_model_state_dict(model)
    other = loramoe(seed=9)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop(next(k for k in s if k.endswith("router"))), "missing: .*gate_proj|missing: .*router"),
        (lambda s: [s.pop(k) for k in list(s) if "layers.1.mlp.up_proj" in k], r"missing: .*layers\.1\.mlp\.up_proj"),
        (
            lambda s: s.update({next(iter(s)).replace("layers.0", "layers.7"): torch.ones(1)}),
            r"unexpected: .*layers\.7",
        ),
        (
            lambda s: s.update({next(iter(s)): torch.ones(2, 2)}),
            r"size mismatch for .*: \(2, 2\) in the checkpoint, \(12,",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(spoil, message, tmp_path):
    loramoe().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with pytest.raises(RuntimeError, match=f"(?s)does not fit the LoRAMoE layers.*{message}"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    loramoe().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Check that the base model is the one it was trained on"):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=64), tmp_path)


def test_a_second_adapter_can_be_added_switched_loaded_and_deleted(tmp_path):
    model = loramoe()
    first = logits(model)
    torch.manual_seed(7)
    model.add_adapter("second", LoRAMoEConfig(r=3, num_experts=4, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.load_adapter(tmp_path / "second", adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), second)


def test_adapters_for_each_sample_of_a_batch():
    model, batch = loramoe(), token_batch()
    torch.manual_seed(7)
    model.add_adapter("second", LoRAMoEConfig(r=3, num_experts=4, init_weights=False))
    default = logits(model, **batch)
    model.set_adapter("second")
    second = logits(model, **batch)
    with model.disable_adapter():
        base = logits(model, **batch)
    mixed = logits(model, **batch, adapter_names=["__base__", "second", "default"])
    torch.testing.assert_close(mixed, torch.stack([base[0], second[1], default[2]]))


def test_adapter_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        loramoe().eval()(**token_batch(), adapter_names=["nobody"] * 3)


def test_adapter_names_are_refused_in_training():
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        loramoe()(**token_batch(), adapter_names=["default"] * 3)


def test_unload_gives_the_base_model_back():
    base = loramoe().unload()
    assert torch.equal(logits(base), logits(tiny_llama()))
    assert not any(isinstance(m, LoRAMoELinear) for m in base.modules())
    assert not base._forward_pre_hooks and not base._forward_hooks and not base._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.merge_adapter(["default"]),
    ],
)
def test_merging_is_refused_and_changes_nothing(merge):
    model = loramoe(modules_to_save=["lm_head"])
    before, expected = snapshot(model), logits(model)
    with pytest.raises(ValueError, match="LoRAMoE adapters cannot be merged"):
        merge(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_a_layer_holds_adapters_of_one_method():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"])).base_model.model
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' already carries a peft.tuners.lora"):
        get_peft_model(model, LoRAMoEConfig(target_modules=["up_proj"]))


def test_bias_is_refused_where_peft_would_not_save_it(monkeypatch):
    monkeypatch.setattr("peft_loramoe.model.PEFT_AT_LEAST_0_21", False)
    with pytest.raises(ValueError, match=r"bias='all' needs peft>=0.21"):
        loramoe(bias="all")


@pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="PEFT before 0.21 does not save biases")
def test_bias_and_saved_modules_are_trained_and_saved(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB))
    model = loramoe(copy.deepcopy(base), bias="loramoe_only", modules_to_save=["ln_f"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("loramoe_experts" in name for name in trained) == 6
    assert sum(name.endswith("base_layer.bias") for name in trained) == 2
    assert sum("modules_to_save" in name for name in trained) == 2
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_trainable_token_indices(tmp_path):
    model = loramoe(trainable_token_indices=[3, 4])
    model(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
    delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert delta.shape == (2, 32) and delta.grad is not None
    with torch.no_grad():
        delta.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_backbones_have_float32_adapters_unless_told_otherwise(dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        config = LoRAMoEConfig(r=2, init_weights=False)
        model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if "loramoe" in name} == {expected}
        output = model(**labelled(token_batch()), task_types=[0, 1, 1])
        assert output.logits.dtype == dtype
        output.loss.backward()
        assert balance_loss(model).dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_later_tokens_and_batch_mates_do_not_leak():
    model, batch = loramoe(), token_batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    full = logits(model, **batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 4:] = 1
    changed["input_ids"][1] = 2
    after = logits(model, **changed)
    torch.testing.assert_close(after[0, :4], full[0, :4])
    torch.testing.assert_close(after[2], full[2])
    assert not torch.allclose(after[0, 4:], full[0, 4:])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_generation_is_the_same_with_and_without_cache_and_in_a_padded_batch(num_beams, top_k):
    model = loramoe(top_k=top_k).eval()
    prompts = [[5, 9, 3], [7, 2, 8, 11, 4]]
    padded = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    options = dict(max_new_tokens=6, num_beams=num_beams, do_sample=False, eos_token_id=None)
    cached, uncached = (
        model.generate(input_ids=padded, attention_mask=(padded != 0).long(), use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    for row, prompt in zip(cached, prompts):
        ids = torch.tensor([prompt])
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(row[5:], alone[0, len(prompt) :])
