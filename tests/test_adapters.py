"""Several adapters on one model, of this method and beside a plain LoRA."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from peft_loramoe import LoRAMoEConfig, balance_terms
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from tiny import labelled, loramoe, tiny_llama, token_batch


def two_adapters(model=None, **options):
    model = loramoe(model, **options)
    torch.manual_seed(7)
    model.add_adapter("second", LoRAMoEConfig(**{"r": 3, "num_experts": 4, "init_weights": False, **options}))
    return model


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


def test_status_of_layers_and_model():
    model = two_adapters()
    status = get_model_status(model)
    assert status.peft_types == {"default": "LORAMOE", "second": "LORAMOE"}
    assert (status.active_adapters, status.available_adapters) == (["default"], ["default", "second"])
    assert (status.adapter_model_type, status.num_adapter_layers, status.enabled) == ("LoRAMoEModel", 6, True)
    assert (status.merged_adapters, status.requires_grad) == ([], {"default": True, "second": False})
    layer = get_layer_status(model)[0]
    assert layer.module_type == "loramoe.LoRAMoELinear" and layer.devices == {"default": ["cpu"], "second": ["cpu"]}


def test_switching_moves_the_gradient():
    model = two_adapters()
    model.set_adapter("second")
    model(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".second." in name), name


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_an_adapter_for_each_sample(num_beams):
    model = two_adapters().eval()
    batch = token_batch(width=4)
    batch = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    options = dict(max_new_tokens=4, num_beams=num_beams, do_sample=False, eos_token_id=None)
    expected = [model.generate(**batch, **options)[0]]
    model.set_adapter("second")
    expected.append(model.generate(**batch, **options)[1])
    with model.disable_adapter():
        expected.append(model.generate(**batch, **options)[2])
    mixed = model.generate(**batch, **options, adapter_names=["default", "second", "__base__"])
    assert torch.equal(mixed, torch.stack(expected))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_encoder_decoders_generate_with_an_adapter_for_each_sample(num_beams):
    model = two_adapters(tiny_t5(), task_type="SEQ_2_SEQ_LM").eval()
    batch = token_batch()
    options = dict(max_new_tokens=4, min_new_tokens=4, num_beams=num_beams, do_sample=False)
    expected = [model.generate(**batch, **options)[0]]
    model.set_adapter("second")
    expected.append(model.generate(**batch, **options)[1])
    with model.disable_adapter():
        expected.append(model.generate(**batch, **options)[2])
    mixed = model.generate(**batch, **options, adapter_names=["default", "second", "__base__"])
    assert torch.equal(mixed, torch.stack(expected))


def test_deleting_the_active_adapter_activates_another():
    model = two_adapters()
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    model(**labelled(token_batch()), task_types=[0, 1, 1])
    assert list(balance_terms(model)) == ["second"]


@pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="PEFT before 0.21 would freeze the LoRA")
def test_a_plain_lora_on_other_modules_works_beside_it():
    base = tiny_llama()
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, base, adapter_name="lora")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(LoRAMoEConfig(r=2, init_weights=False), base, adapter_name="moe")
    base.train()(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
    trained = {name for name, p in base.named_parameters() if p.grad is not None}
    assert all("lora_" in name or "loramoe_" in name for name in trained)
    assert sum(".lora." in name for name in trained) == 4 and sum(".moe." in name for name in trained) == 18
    assert len(get_peft_model_state_dict(base, adapter_name="moe")) == 18


def test_a_plain_lora_beside_it_is_refused_where_peft_would_freeze_it(monkeypatch):
    monkeypatch.setattr("peft_loramoe.model.PEFT_AT_LEAST_0_21", False)
    base = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama(), adapter_name="lora")
    with pytest.raises(ValueError, match=r"already has adapters of LORA, and PEFT before 0\.21 would freeze them"):
        inject_adapter_in_model(LoRAMoEConfig(), base, adapter_name="moe")


def test_one_peft_model_holds_adapters_of_one_method():
    with pytest.raises(ValueError, match="[Cc]annot combine adapters with different peft types"):
        loramoe().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


@pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="bias is refused with PEFT before 0.21")
def test_only_one_adapter_may_train_biases():
    model = loramoe(bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", LoRAMoEConfig(bias="all"))


def test_tied_embeddings_stay_tied():
    model = loramoe(tiny_llama(tie_word_embeddings=True), trainable_token_indices=[3])
    base = model.base_model.model
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name).add_(1.0)
    assert torch.equal(base.lm_head.weight, base.get_input_embeddings().weight)
    assert not torch.equal(base.lm_head.weight, tiny_llama(tie_word_embeddings=True).lm_head.weight)


def test_mixed_models_are_refused():
    with pytest.raises(ValueError, match="LORAMOE"):
        get_peft_model(tiny_llama(), LoRAMoEConfig(), mixed=True)


def test_the_adapter_may_be_named_like_its_tensors(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoRAMoEConfig(r=2, init_weights=False), adapter_name="router")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "router", adapter_name="A")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**token_batch()).logits, model.eval()(**token_batch()).logits)


def test_adapters_for_each_sample_of_a_model_that_flattens_the_batch():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    config.word_embed_proj_dim = 16
    model = two_adapters(OPTForCausalLM(config)).eval()
    batch = token_batch()
    with torch.no_grad():
        default = model(**batch).logits
        model.set_adapter("second")
        second = model(**batch).logits
        mixed = model(**batch, adapter_names=["second", "default", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack([second[0], default[1], second[2]]))


KINDS = {
    "plain": dict(),
    "other_linears": dict(target_modules=["q_proj", "up_proj"]),
    "null_group": dict(null_groups=[0]),
    "top_k": dict(num_experts=4, top_k=1, r=3),
    "frozen": dict(freeze_experts=True, use_rslora=True),
}


def model_of_all_kinds():
    model = tiny_llama()
    for i, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(i)
        config = LoRAMoEConfig(**{"r": 2, "init_weights": False, "task_type": "CAUSAL_LM", **options})
        if i == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def test_adapters_of_all_kinds_are_switched_mixed_in_a_batch_and_deleted():
    model, names = model_of_all_kinds(), [*KINDS, "__base__"]
    batch = {key: value[:1].expand(len(names), -1) for key, value in token_batch().items()}
    alone = {}
    with torch.no_grad():
        for name in KINDS:
            model.set_adapter(name)
            alone[name] = model(**batch).logits[0]
        with model.disable_adapter():
            alone["__base__"] = model(**batch).logits[0]
        torch.testing.assert_close(model(**batch, adapter_names=names).logits, torch.stack(list(alone.values())))
        assert len({round(logits.sum().item(), 3) for logits in alone.values()}) == len(names)
        assert torch.equal(alone["__base__"], tiny_llama().eval()(**batch).logits[0])
        for name in list(KINDS)[:-1]:
            model.delete_adapter(name)
        model.set_adapter("frozen")
        torch.testing.assert_close(model(**batch).logits[0], alone["frozen"])
    left = {
        name.split(".loramoe_experts.")[1].split(".")[0] for name, _ in model.named_parameters() if "loramoe" in name
    }
    assert (left, list(model.peft_config)) == ({"frozen"}, ["frozen"])
