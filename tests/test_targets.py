import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, LlavaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, LoRAMoEModel
from peft_loramoe.targets import FEED_FORWARD, is_linear
from tiny import tiny_llama


SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
GPT = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
BERT = {**SMALL, "max_position_embeddings": 32}
SEQ2SEQ = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=32,
               encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0)  # fmt: skip
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32)

# model type -> options of a tiny model, adapted linears in all
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (DECODER, 6)),
    "phi": (DECODER, 4),
    "phi3": (DECODER, 4),
    "gpt2": (GPT, 4),
    "gpt_neox": (SMALL, 4),
    "opt": ({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 4),
    "bloom": (dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=32), 4),
    "falcon": (SMALL, 4),
    "bert": (BERT, 4),
    "roberta": (BERT, 4),
    "deberta-v2": ({**BERT, "relative_attention": True, "pos_att_type": ["p2c"]}, 4),
    "t5": (T5, 4),
    "mt5": ({**T5, "feed_forward_proj": "gated-gelu"}, 6),
    "bart": (SEQ2SEQ, 4),
    "vit": ({**SMALL, "image_size": 16, "patch_size": 8}, 4),
}


def build(model_type, options):
    config = CONFIG_MAPPING[model_type](**options)
    torch.manual_seed(0)
    return AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_default_targets_are_the_feed_forward_linears(model_type):
    options, count = ARCHITECTURES[model_type]
    model = get_peft_model(build(model_type, options), LoRAMoEConfig(r=1, num_experts=2))
    names = [name for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)]
    assert len(names) == count, names
    assert not any(word in name.lower() for name in names for word in ("attention", "attn", "pooler")), names


def test_a_vision_language_model_is_known_by_its_text_model():
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **DECODER},
        vision_config={"model_type": "clip_vision_model", **vision},
    )
    model = get_peft_model(AutoModel.from_config(config), LoRAMoEConfig(r=1, num_experts=2))
    names = [name for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)]
    assert len(names) == 6 and all("language_model" in name for name in names)


@pytest.mark.parametrize("exclude", [r".*layer\.0\..*", ["layer.0.intermediate.dense", "layer.0.output.dense"]])
def test_excluded_modules_are_left_out_of_the_defaults_too(exclude):
    model = get_peft_model(build("bert", BERT), LoRAMoEConfig(r=1, num_experts=2, exclude_modules=exclude))
    names = [name for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)]
    assert len(names) == 2 and all("layer.1." in name and "attention" not in name for name in names)


def test_layers_to_transform_applies_to_the_defaults():
    model = get_peft_model(build("bert", BERT), LoRAMoEConfig(r=1, num_experts=2, layers_to_transform=[1]))
    names = [name for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)]
    assert len(names) == 2 and all("layer.1." in name for name in names)


def test_all_linear_leaves_the_output_layer_out():
    model = get_peft_model(tiny_llama(), LoRAMoEConfig(r=1, target_modules="all-linear"))
    names = {name for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)}
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_an_unknown_architecture_gets_a_list_of_candidates():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"Please specify `target_modules`.*model_type 'custom'.*Linear layers.*: 0"):
        get_peft_model(model, LoRAMoEConfig())


@pytest.fixture
def unlisted(monkeypatch):
    """Makes a Llama, which the table does not have, with further modules in its second layer."""
    monkeypatch.delitem(FEED_FORWARD, "llama")

    def build(**modules):
        model = tiny_llama()
        for name, module in modules.items():
            parent, _, last = name.rpartition("__")
            setattr(model.model.layers[1].get_submodule(parent), last, module)
        return model

    return build


def test_an_architecture_outside_the_table_with_gated_blocks_in_every_layer(unlisted):
    base = unlisted(self_attn__gate_proj=nn.Linear(32, 32))
    model = get_peft_model(base, LoRAMoEConfig(r=1, num_experts=2, exclude_modules=["layers.0.mlp.up_proj"]))
    names = {module.name for module in model.modules() if isinstance(module, LoRAMoELinear)}
    expected = {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}
    assert names == expected - {"model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    "modules",
    [{"mlp__fc1": nn.Linear(32, 48)}, {"mlp": nn.Identity()}, {"norm": nn.Sequential(nn.ModuleDict({"w1": nn.Linear(4, 4)}))}],
    ids=["further linears", "a layer without", "elsewhere"],
)  # fmt: skip
def test_an_architecture_outside_the_table_that_leaves_room_for_doubt(modules, unlisted):
    with pytest.raises(ValueError, match="no default for model_type 'llama'"):
        get_peft_model(unlisted(**modules), LoRAMoEConfig())


def test_no_match_is_an_error():
    with pytest.raises(ValueError, match="Target modules {'fc9'} not found in the base model"):
        get_peft_model(tiny_llama(), LoRAMoEConfig(target_modules=["fc9"]))


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm", "layers"])
def test_a_target_that_is_no_linear_layer_is_refused(target):
    with pytest.raises(ValueError, match=f"'model.*{target}' is no linear layer"):
        get_peft_model(tiny_llama(), LoRAMoEConfig(target_modules=[target]))


def test_a_linear_whose_output_nobody_sees_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert not is_linear(model[0].out_proj)
    with pytest.raises(ValueError, match="'0.out_proj' is no linear layer that the model calls"):
        get_peft_model(model, LoRAMoEConfig(target_modules=["out_proj"]))


def test_every_architecture_that_the_issue_names_has_an_entry():
    named = {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
        "falcon",
    }
    assert named | {"bert", "roberta", "t5", "vit"} <= set(FEED_FORWARD)
    assert set(FEED_FORWARD) <= {
        *CONFIG_MAPPING.keys(),
        "ministral",
        "smollm3",
        "olmo3",
        "modernbert",
        "gemma3",
        "mllama_text_model",
    }


@pytest.mark.parametrize("targets", [["up_proj"], {"up_proj"}, ("up_proj",), r".*\.up_proj", "all-linear"], ids=str)
def test_the_table_may_be_extended_as_that_of_other_tuners(targets, monkeypatch):
    for model_type in ("llama", "unknown_to_the_table"):
        monkeypatch.setitem(LoRAMoEModel.target_module_mapping, model_type, targets)
        base = tiny_llama()
        base.config.model_type = model_type
        model = get_peft_model(base, LoRAMoEConfig(r=2))
        found = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)
        }
        assert found == (
            {"up_proj"}
            if targets != "all-linear"
            else {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")}
        )
