import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import RouterTrace, router_trace
from peft_loramoe.experts import LoRAExperts
from tiny import loramoe, tiny_llama, tiny_tokenizer


TEXT, IDS = "w5 w9 w5 w63", [5, 9, 5, 63]


def trace(model, text=TEXT, **arguments):
    return router_trace(model, tiny_tokenizer(), text, **arguments)


def two_adapters():
    model = loramoe()
    torch.manual_seed(5)
    model.add_adapter("other", LoRAMoEConfig(r=1, num_experts=3, expert_groups=[1, 2], init_weights=False))
    return model


def test_a_trace_has_the_probabilities_of_every_token():
    model, seen = loramoe(), {}
    found = trace(model)
    for name, module in model.named_modules():
        if isinstance(module, LoRAExperts):
            layer = name.removeprefix("base_model.model.").removesuffix(".loramoe_experts.default")
            module.register_forward_hook(
                lambda m, args, output, layer=layer: seen.__setitem__(layer, output[1][0].tolist())
            )
    with torch.no_grad():
        model.eval()(torch.tensor([IDS]))
    assert found.layers == seen and list(found.layers) == list(seen) and len(seen) == 6
    assert found.adapter == "default" and found.text == TEXT
    assert found.expert_groups == {layer: [3, 3] for layer in seen}


def test_tokens_are_what_the_tokenizer_makes_of_each():
    found = trace(loramoe())
    assert found.token_ids == IDS and found.tokens == ["w5", "w9", "w5", "w63"]


def test_a_trace_carries_the_names_and_groups_of_its_adapter():
    names = ["facts", "tasks", "rest"]
    options = dict(num_experts=4, expert_groups=[1, 2, 1], null_groups=[2], task_type_names=names)
    found = trace(loramoe(**options, num_experts_pattern={"down_proj": [2, 1, 1]}))
    assert found.task_type_names == names and found.null_groups == [2]
    assert found.expert_groups["model.layers.0.mlp.up_proj"] == [1, 2, 1]
    assert found.expert_groups["model.layers.0.mlp.down_proj"] == [2, 1, 1]


def test_records_list_every_weight():
    probabilities = {"up_proj": [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], "down_proj": [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]}
    groups = {"up_proj": [1, 2], "down_proj": [2, 1]}
    found = RouterTrace("default", "a b", ["a", "b"], [4, 5], probabilities, groups, None, [1])
    expected = [
        dict(layer=layer, position=position, token=token, expert=n, group=group, null=group == 1, weight=weights[n])
        for layer, of_experts in (("up_proj", (0, 1, 1)), ("down_proj", (0, 0, 1)))
        for position, (token, weights) in enumerate(zip("ab", probabilities[layer]))
        for n, group in enumerate(of_experts)
    ]
    assert found.records() == expected


def test_a_trace_can_be_saved(tmp_path):
    found = trace(loramoe())
    found.save(tmp_path / "trace.json")
    assert RouterTrace.load(tmp_path / "trace.json") == found


def test_dropout_is_off_and_the_mode_is_restored():
    model = loramoe(lora_dropout=0.5).train()
    assert trace(model) == trace(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_one_of_several_active_adapters_is_chosen_by_name():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    found = trace(model, adapter_name="other")
    assert found.adapter == "other" and set(map(tuple, found.expert_groups.values())) == {(1, 2)}


def test_the_active_adapter_is_the_default():
    model = two_adapters()
    model.set_adapter("other")
    assert trace(model).adapter == "other"


def test_each_use_of_a_layer_has_its_own_entry():
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    found = trace(loramoe(AlbertModel(config), target_modules=["ffn"], task_type=None))
    name = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    assert list(found.layers) == list(found.expert_groups) == [name, f"{name}#2", f"{name}#3"]
    assert found.layers[name] != found.layers[f"{name}#2"]


def bert(**options):
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    return loramoe(BertForSequenceClassification(config), task_type="SEQ_CLS", **options)


def test_layers_that_read_no_tokens_are_left_out():
    model = bert(target_modules=["intermediate.dense", "pooler.dense"])
    assert list(trace(model).layers) == ["bert.encoder.layer.0.intermediate.dense"]


def test_a_pooler_is_left_out_of_a_trace_of_one_token():
    model = bert(target_modules=["intermediate.dense", "pooler.dense"])
    assert list(trace(model, text="w5").layers) == ["bert.encoder.layer.0.intermediate.dense"]


def test_a_text_that_begins_with_bos_gets_no_second_one():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "w2"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    model = loramoe()
    assert (
        router_trace(model, tokenizer, "w5 w9").token_ids
        == router_trace(model, tokenizer, "w2 w5 w9").token_ids
        == [2, 5, 9]
    )


def test_a_model_none_of_whose_layers_reads_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"No adapted layer processes the text's 4 tokens one by one.*bert\.pooler\.dense"
    ):
        trace(bert(target_modules=["pooler.dense"]))


def test_several_active_adapters_are_refused_without_a_name():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="The adapters default, other are active; choose one with adapter"):
        trace(model)


@pytest.mark.parametrize("adapter", ["other", "missing", ""])
def test_an_adapter_that_is_not_active_is_refused(adapter):
    with pytest.raises(
        ValueError, match=rf"adapter_name='{adapter}' is not active .default is.*set_adapter\('{adapter}'\)"
    ):
        trace(two_adapters(), adapter_name=adapter)


def test_disabled_adapters_are_refused():
    model = loramoe()
    with pytest.raises(ValueError, match="No router ran: keep a LoRAMoE adapter enabled"), model.disable_adapter():
        trace(model)


def test_models_without_routers_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        trace(tiny_llama())


def test_encoder_decoders_are_refused():
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    model = loramoe(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(
        ValueError,
        match=r"encoder-decoders such as PeftModelForSeq2SeqLM; .* read peft_loramoe\.layer_routing\(model\)",
    ):
        trace(model)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="text='' has no tokens"):
        trace(loramoe(), text="")


def test_several_texts_are_refused():
    with pytest.raises(TypeError, match=r"text must be one string, not a list: \['w5', 'w9'\]"):
        trace(loramoe(), text=["w5", "w9"])


def test_probabilities_that_are_not_finite_are_refused():
    model = loramoe()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.loramoe_experts["default"].router.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"adapter 'default' in layer 'model\.layers\.0\.mlp\.down_proj' are not finite"
    ):
        trace(model)
