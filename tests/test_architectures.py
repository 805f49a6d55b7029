"""Every architecture of the table: which linears are adapted, a training step, saving and loading, causality."""

import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_loramoe import LoRAMoEConfig, balance_loss, balance_terms, layer_routing
from peft_loramoe.layer import LoRAMoELayer
from tiny import VOCAB, labelled, token_batch


V5 = int(transformers.__version__.split(".")[0]) >= 5
TYPES = torch.tensor([0, 1, -1])
TEXT = [7, 6, 5]  # real tokens of the rows of token_batch()
IMAGE_TOKEN = VOCAB - 1

IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **IDS)
LLAMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
BERT = {**SMALL, "max_position_embeddings": 32}
GPT = dict(n_layer=2, n_head=2, **IDS)
SEQ2SEQ = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_start_token_id=2,
               encoder_attention_heads=2, decoder_attention_heads=2, **IDS)  # fmt: skip
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10,
           "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
LLAVA = dict(text_config={"model_type": "llama", **LLAMA}, vision_config={"model_type": "clip_vision_model", **VISION},
             image_token_index=IMAGE_TOKEN)  # fmt: skip
MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_experts": 4, "num_local_experts": 4}
DEEPSEEK = {**SMALL, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
            "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
MAMBA = dict(hidden_size=16, state_size=4, num_hidden_layers=2, **IDS)

GATED = ("gate_proj", "up_proj", "down_proj")
FC = ("fc1", "fc2")
DENSE = ("dense_h_to_4h", "dense_4h_to_h")
BERT_FC = ("intermediate.dense", "output.dense")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def text():
    return labelled(token_batch())


def sequence_classes():
    return {**token_batch(), "labels": torch.tensor([0, 1, 0])}


def token_classes():
    return {**token_batch(), "labels": token_batch()["input_ids"] % 2}


def answers():
    return {**token_batch(), "labels": torch.tensor([[5, 6, 2, -100], [5, 6, 7, 2], [3, 2, -100, -100]])}


ANSWERS = [3, 4, 2]  # real tokens of the rows of answers()


def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def image_classes():
    return {"pixel_values": pixels(), "labels": torch.tensor([0, 1, 0])}


def images_and_text():
    batch = token_batch(width=11)
    batch["input_ids"][:, 1:5] = IMAGE_TOKEN
    return {**labelled(batch), "pixel_values": pixels()}


def speech():
    features = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "labels": answers()["labels"]}


@dataclass(frozen=True)
class Case:
    """A tiny model of one architecture and what is expected of an adapter on it.

    Attributes:
        auto_class: transformers' class for the task, without its prefix.
        options: of the model's configuration.
        adapted: names of the adapted linears and blocks by the name of the module that holds them, where {} is 0 and 1.
        batch: makes a batch of three samples with labels.
        tokens: real tokens of each sample, by the beginning of the adapted linears' names.
        task_type: PEFT's.
        target_modules: None for the defaults.
        model_type: transformers', where it is not the case's name.
    """

    auto_class: str
    options: dict
    adapted: dict[str, tuple[str, ...]]
    batch: Callable[[], dict] = text
    tokens: tuple[tuple[str, list[int]], ...] = (("", TEXT),)
    task_type: str | None = "CAUSAL_LM"
    target_modules: tuple[str, ...] | None = None
    model_type: str | None = None

    def names(self):
        return {
            f"{parent.format(i)}.{name}" for parent, names in self.adapted.items() for name in names for i in (0, 1)
        }

    def expected_tokens(self, layer):
        return next(counts for start, counts in self.tokens if layer.startswith(start))


def decoder(options, parent, linears, **fields):
    return Case("CausalLM", options, {parent: linears}, **fields)


def moe_attention(model_type):
    return decoder(MOE, "model.layers.{}.self_attn", ATTENTION, target_modules=ATTENTION, model_type=model_type)


def encoder_decoder(options, adapted, batch, encoder, decoder, encoder_tokens=TEXT):
    return dict(options=options, adapted=adapted, batch=batch, tokens=((encoder, encoder_tokens), (decoder, ANSWERS)))


DENSE_THEN_SPARSE = {"model.layers.0.mlp": GATED, "model.layers.1": ("mlp",)}
BART_LIKE = {"model.encoder.layers.{}": FC, "model.decoder.layers.{}": FC}
CASES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), decoder(LLAMA, "model.layers.{}.mlp", GATED)
    ),
    "phi3": decoder(LLAMA, "model.layers.{}.mlp", ("gate_up_proj", "down_proj")),
    "phi": decoder(SMALL, "model.layers.{}.mlp", FC),
    "gpt2": decoder({**GPT, "n_embd": 16}, "transformer.h.{}.mlp", ("c_fc", "c_proj")),
    "gpt_neox": decoder(SMALL, "gpt_neox.layers.{}.mlp", DENSE),
    "opt": decoder({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers.{}", FC),
    "bloom": decoder({**GPT, "hidden_size": 16}, "transformer.h.{}.mlp", DENSE),
    "falcon": decoder(SMALL, "transformer.h.{}.mlp", DENSE),
    "t5": Case(
        "Seq2SeqLM",
        task_type="SEQ_2_SEQ_LM",
        **encoder_decoder(
            {**IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
            {"encoder.block.{}.layer.1.DenseReluDense": ("wi", "wo"), "decoder.block.{}.layer.2.DenseReluDense": ("wi", "wo")},
            answers, "encoder", "decoder",
        ),
    ),
    "bart": Case(
        "Seq2SeqLM",
        task_type="SEQ_2_SEQ_LM",
        **encoder_decoder(SEQ2SEQ, BART_LIKE, answers, "model.encoder", "model.decoder"),
    ),
    "whisper": Case(
        "SpeechSeq2Seq",
        task_type=None,
        **encoder_decoder(WHISPER, BART_LIKE, speech, "model.encoder", "model.decoder", encoder_tokens=[10, 10, 10]),
    ),
    "bert": Case("MaskedLM", BERT, {"bert.encoder.layer.{}": BERT_FC}, task_type=None),
    "roberta": Case(
        "SequenceClassification", BERT, {"roberta.encoder.layer.{}": BERT_FC}, sequence_classes, task_type="SEQ_CLS"
    ),
    "deberta-v2": Case(
        "TokenClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        {"deberta.encoder.layer.{}": BERT_FC},
        token_classes,
        task_type="TOKEN_CLS",
    ),
    "vit": Case(
        "ImageClassification",
        VISION,
        {"vit.layers.{}.mlp": FC} if V5 else {"vit.encoder.layer.{}": BERT_FC},
        image_classes,
        (("", [5, 5, 5]),),
        task_type=None,
    ),
    "llava": Case(
        "ImageTextToText",
        LLAVA,
        {"model.language_model.layers.{}.mlp": GATED},
        images_and_text,
        (("", [11, 10, 9]),),
        task_type=None,
    ),
    # Sparse blocks
    "mixtral": decoder(MOE, "model.layers.{}", ("mlp" if V5 else "block_sparse_moe",)),
    "qwen2_moe": decoder({**MOE, "shared_expert_intermediate_size": 12}, "model.layers.{}", ("mlp",)),
    "qwen3_moe": Case("CausalLM", {**MOE, "mlp_only_layers": [0]}, DENSE_THEN_SPARSE),
    **dict.fromkeys(("olmoe", "gpt_oss"), decoder(MOE, "model.layers.{}", ("mlp",))),
    "granitemoe": decoder(MOE, "model.layers.{}", ("block_sparse_moe",)),
    "phimoe": decoder(MOE, "model.layers.{}", ("mlp" if V5 else "block_sparse_moe",)),
    **dict.fromkeys(("deepseek_v3", "glm4_moe"), Case("CausalLM", DEEPSEEK, DENSE_THEN_SPARSE)),
    "llama4_text": Case(
        "CausalLM",
        {**MOE, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
        {"model.layers.0.feed_forward": GATED, "model.layers.1": ("feed_forward",)},
    ),
    "longcat_flash": Case(
        "CausalLM",
        {**DEEPSEEK, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12, "moe_topk": 2,
         "zero_expert_num": 1, "head_dim": 4},
        {"model.layers.{}": ("mlp",), "model.layers.{}.mlps.0": GATED, "model.layers.{}.mlps.1": GATED},
    ),
    # Not in the table, but there is no doubt what their linears are.
    "cohere2": decoder(LLAMA, "model.layers.{}.mlp", GATED),
    # No defaults: what can be adapted is named.
    "mamba": decoder(MAMBA, "backbone.layers.{}.mixer", ("in_proj",), target_modules=("in_proj",)),
    "mixtral, attention": moe_attention("mixtral"),
    "qwen3_moe, attention": moe_attention("qwen3_moe"),
    "olmoe, attention": moe_attention("olmoe"),
    "qwen2_moe, shared experts": decoder(
        {**MOE, "shared_expert_intermediate_size": 12},
        "model.layers.{}.mlp.shared_expert",
        GATED,
        target_modules=("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
        model_type="qwen2_moe",
    ),
    "deepseek_v3, shared experts": Case(
        "CausalLM",
        {**DEEPSEEK, "first_k_dense_replace": 0},
        {"model.layers.{}.mlp.shared_experts": GATED, "model.layers.{}.self_attn": ("q_a_proj", "q_b_proj", "o_proj")},
        target_modules=("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj", "q_a_proj",
                        "q_b_proj", "o_proj"),
        model_type="deepseek_v3",
    ),
}  # fmt: skip
if V5:
    MIXERS = ["mamba", "moe", "attention", "mlp"]
    CASES |= {
        "nemotron_h": Case(
            "CausalLM",
            {**MOE, "layers_block_type": MIXERS, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 12,
             "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, "topk_group": 1, "n_group": 1},
            {"model.layers.1": ("mixer",), "model.layers.3.mixer": ("up_proj", "down_proj")},
        ),
        # Router and experts are children of the layer, beside a dense block that reads every token.
        "gemma4_text": decoder(
            {**MOE, "enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 8, "num_kv_shared_layers": 0,
             "hidden_size_per_layer_input": 0},
            "model.layers.{}.mlp",
            GATED,
        ),
        "afmoe": Case("CausalLM", {**MOE, "num_dense_layers": 1}, DENSE_THEN_SPARSE),  # its attention has a gate_proj
    }  # fmt: skip
SEQ2SEQ_CASES = [name for name, case in CASES.items() if case.auto_class in ("Seq2SeqLM", "SpeechSeq2Seq")]
DECODERS = [name for name, case in CASES.items() if case.auto_class in ("CausalLM", "ImageTextToText")] + SEQ2SEQ_CASES


def build(model_type, options, auto_class="CausalLM"):
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{auto_class}").from_config(CONFIG_MAPPING[model_type](**options))


def base_model(name):
    case = CASES[name]
    return build(case.model_type or name, case.options, case.auto_class)


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoRAMoEConfig(**{"r": 2, "num_experts": 4, "init_weights": False, **options}))


def adapted_model(name, **options):
    case = CASES[name]
    targets = list(case.target_modules) if case.target_modules else None
    return adapt(base_model(name), task_type=case.task_type, target_modules=targets, **options)


def adapted(model):
    return {module.name for module in model.modules() if isinstance(module, LoRAMoELayer)}


@pytest.mark.parametrize("name", CASES)
def test_the_feed_forward_layers_are_adapted_and_nothing_else(name):
    assert adapted(adapted_model(name)) == CASES[name].names()


@pytest.mark.parametrize("name", CASES)
def test_a_training_step(name):
    case = CASES[name]
    model, batch = adapted_model(name).train(), case.batch()
    losses = []
    for weight in (0.0, 0.5):
        model.peft_config["default"].balance_loss_weight = weight
        torch.manual_seed(2)  # the same dropout
        losses.append(model(**batch, task_types=TYPES).loss)
    torch.testing.assert_close(losses[1], losses[0] + balance_loss(model))
    terms = balance_terms(model)["default"]
    assert terms.keys() == case.names() and all(term > 0 for term in terms.values())
    for record in layer_routing(model):
        assert record.token_counts.tolist() == case.expected_tokens(record.layer), record.layer
        assert record.task_types.tolist() == TYPES.tolist()
    losses[1].backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if "loramoe_experts" in key}
    assert len(gradients) == 3 * len(case.names())
    assert not [key for key, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    assert not [key for key, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_gives_identical_logits_when_loaded(name, tmp_path):
    model, batch = adapted_model(name).eval(), CASES[name].batch()
    with torch.no_grad():
        logits = model(**batch).logits
        with model.disable_adapter():
            assert not torch.allclose(model(**batch).logits, logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model(name), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, logits)


@pytest.mark.parametrize("name", DECODERS)
def test_later_tokens_change_no_earlier_logits(name):
    model, batch = adapted_model(name).eval(), CASES[name].batch()
    labels = batch.pop("labels")
    if name in SEQ2SEQ_CASES:
        ids, batch["decoder_input_ids"] = "decoder_input_ids", labels.clamp(min=3)
    else:
        ids, batch["attention_mask"] = "input_ids", torch.ones_like(batch["attention_mask"])
    cut = batch[ids].shape[1] - 2
    changed = {**batch, ids: batch[ids].clone()}
    changed[ids][:, cut:] = batch[ids][:, cut:] % 7 + 20
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-6)
    assert not torch.isclose(before[:, cut:], after[:, cut:]).all(-1).any()


@pytest.mark.parametrize("model_type", ["vit", "bert", "llama"])
def test_the_defaults_do_not_make_peft_warn(model_type):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You have passed exclude_modules")
        adapted_model(model_type)


def test_the_defaults_leave_an_image_encoder_with_the_text_models_names_alone():
    pixtral = {**VISION, "model_type": "pixtral", "head_dim": 8}
    options = {**LLAVA, "vision_config": pixtral, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model = adapt(build("llava", options, "ImageTextToText"), exclude_modules=["layers.1.mlp.up_proj"])
    assert adapted(model) == CASES["llava"].names() - {"model.language_model.layers.1.mlp.up_proj"}
    output = model(**images_and_text(), image_sizes=torch.tensor([[16, 16]] * 3), task_types=TYPES)
    assert balance_loss(model) > 0 and output.loss.isfinite()


def test_the_encoders_tokens_are_not_masked_by_labels_of_the_same_length():
    options = {**WHISPER, "max_source_positions": 4}
    model = adapt(build("whisper", options, "SpeechSeq2Seq"))
    batch = speech()
    model(input_features=batch["input_features"][:, :, :8], labels=batch["labels"], task_types=TYPES)
    counts = {record.layer: record.token_counts.tolist() for record in layer_routing(model)}
    assert counts["model.encoder.layers.0.fc1"] == [4, 4, 4]
    assert counts["model.decoder.layers.0.fc1"] == ANSWERS


def test_the_head_of_an_encoder_decoder_sees_the_decoders_tokens():
    model = adapt(base_model("t5"), target_modules=["lm_head"])
    batch = answers()
    batch = {key: value[:, :4] for key, value in batch.items()}
    model(**batch, task_types=TYPES)
    assert layer_routing(model)[0].token_counts.tolist() == ANSWERS


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_a_decoder_that_is_fed_the_encoders_input_counts_no_padding(model_type):
    # without decoder_input_ids and labels of tokens, these models shift input_ids to the right
    options = {**CASES[model_type].options, "eos_token_id": 2}
    model = adapt(build(model_type, options, "SequenceClassification"), task_type="SEQ_CLS")
    batch = sequence_classes()
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 2, 3)
    batch["input_ids"][range(3), [length - 1 for length in TEXT]] = 2  # where the classifier looks
    model(**batch, task_types=TYPES)
    assert len(layer_routing(model)) == 8
    assert [record.token_counts.tolist() for record in layer_routing(model)] == [TEXT] * 8


@pytest.mark.parametrize("name", ["opt", "qwen2_moe, shared experts"])
def test_adapters_for_each_sample_where_the_model_flattens_the_batch(name):
    model, batch = adapted_model(name).eval(), token_batch()
    with torch.no_grad():
        default = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        mixed = model(**batch, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([default[0], base[1], default[2]]))


# Mixture-of-experts backbones

MOES = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), MOE),
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 12},
    "deepseek_v3": DEEPSEEK,
}
WITHOUT_EXPERTS = r".*\.experts\..*"


def moe(model_type):
    return build(model_type, MOES[model_type])


@pytest.mark.parametrize("model_type", MOES)
def test_all_linear_adapts_attention_and_shared_experts(model_type):
    model = adapt(moe(model_type), task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=WITHOUT_EXPERTS)
    names = adapted(model)
    attention = {name for name in names if ".self_attn." in name}
    assert len(attention) == (10 if model_type == "deepseek_v3" else 8)
    parts = {name.split(".mlp.")[-1] for name in names - attention}
    shared = {"qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts"}.get(model_type)
    assert {f"{shared}.{name}" for name in GATED if shared} <= parts
    assert not any(".experts." in name or "lm_head" in name for name in names)
    output = model.train()(**text(), task_types=TYPES)
    assert balance_terms(model)["default"].keys() == names
    output.loss.backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "loramoe_experts" in key)


def test_padding_does_not_count_where_the_attention_inserts_a_dimension():
    model = adapt(moe("deepseek_v3"), target_modules=["kv_b_proj"])
    model(**token_batch(), task_types=TYPES)
    assert [record.token_counts.tolist() for record in layer_routing(model)] == [TEXT, TEXT]


@pytest.mark.parametrize("model_type", MOES)
def test_routed_experts_are_refused_and_the_error_says_what_can_be_adapted(model_type):
    with pytest.raises(ValueError) as error:
        adapt(moe(model_type), target_modules=["experts"])
    message = str(error.value)
    assert "cannot be adapted: each sees only the tokens that the backbone's router sends it" in message
    block = "block_sparse_moe" if model_type == "mixtral" and not V5 else "mlp"
    assert f"Target the block around them, '{block}'" in message
    can = message.rpartition("Linear layers that can be adapted: ")[2].partition(". Where")[0].split(", ")
    assert "self_attn.o_proj" in can
    assert {"qwen2_moe": "mlp.shared_expert.up_proj", "deepseek_v3": "mlp.shared_experts.up_proj"}.get(
        model_type, can[0]
    ) in can
    assert not {"w1", "up_proj"} & set(can)


# linears in transformers 4, parts of 3-D parameters in transformers 5
@pytest.mark.parametrize("attention", [(), ("q_proj",)])
@pytest.mark.parametrize(
    ("model_type", "experts"), [("mixtral", ("w1", "w2", "w3")), ("qwen3_moe", GATED), ("olmoe", GATED)]
)
def test_naming_routed_experts_is_refused(model_type, experts, attention):
    with pytest.raises(ValueError, match=r"routed experts.* cannot be adapted: .*can be adapted: .*self_attn\.q_proj"):
        adapt(moe(model_type), target_modules=[*experts, *attention])


@pytest.mark.skipif(V5, reason="transformers 5 has no linears in routed experts")
@pytest.mark.parametrize("model_type", MOES)
@pytest.mark.parametrize("balance_loss_weight", [0.1, 0.0])
def test_all_linear_says_how_to_leave_routed_experts_out(model_type, balance_loss_weight):
    with pytest.raises(
        ValueError, match=r"routed experts, which cannot .* set exclude_modules=r'\.\*\\\.experts\\\.\.\*'"
    ):
        adapt(moe(model_type), target_modules="all-linear", balance_loss_weight=balance_loss_weight)


def test_a_router_that_chooses_experts_is_refused():
    with pytest.raises(
        ValueError, match=r"1\.feed_forward\.router' is the backbone's router.*exclude_modules.*can be adapted:"
    ):
        adapt(base_model("llama4_text"), target_modules="all-linear")
    model = adapt(base_model("llama4_text"), target_modules="all-linear", exclude_modules=["router"])
    assert "model.layers.1.self_attn.q_proj" in adapted(model)


def test_a_mixture_without_a_router_is_no_routed_one():
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    model = adapt(block, target_modules=["0", "1"])
    assert adapted(model) == {"experts.0", "experts.1"}


def sparse_architectures():
    """Model types of the installed transformers with a causal language model whose layers have experts."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = f"transformers.models.{model_type_to_module_name(model_type)}"
        spec = importlib.util.find_spec(module)
        sources = Path(spec.origin).parent.glob("modeling_*.py") if spec else ()
        if any(re.search(r"^class \w+Experts\(", source.read_text(), re.MULTILINE) for source in sources):
            yield model_type


def with_few_layers(config):
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "depth"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 4)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            with_few_layers(part)
    return config


@pytest.mark.parametrize("model_type", list(sparse_architectures()))
def test_the_defaults_of_every_sparse_architecture(model_type):
    try:
        config = with_few_layers(CONFIG_MAPPING[model_type]())
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        pytest.skip(f"its default configuration makes no model: {error}")
    experts = {name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")}
    if not experts:
        pytest.skip("its default configuration is dense")
    model = get_peft_model(model, LoRAMoEConfig(r=2, num_experts=2), low_cpu_mem_usage=True)
    names = adapted(model)
    assert not [name for name in names if re.search("attn|attention|router|mamba|norm|vision", name)]
    assert not [
        name for name in names if re.search(r"\.(gate|experts?|shared_experts?|text_moe|vision_moe)(\.|$)", name)
    ]
    outside = [name for name in experts if not any(name.startswith(f"{block}.") for block in names)]
    assert not [name for name in outside if "attention" not in name], (
        "a layer whose experts have no mixture beside them"
    )


# Mamba: kernels take the weights of some linears and never call them

MAMBAS = {
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2},
}
BYPASSED = {"mamba": ["out_proj", "x_proj", "dt_proj", "conv1d"], "mamba2": ["out_proj", "conv1d"]}
BYPASSED["falcon_mamba"] = BYPASSED["mamba"]


@pytest.mark.parametrize(
    ("model_type", "target"), [(m, target) for m, targets in BYPASSED.items() for target in targets]
)
def test_linears_that_mambas_kernels_bypass_are_refused(model_type, target):
    model = build(model_type, MAMBAS[model_type])
    with pytest.raises(
        ValueError,
        match=rf"mixer\.{target}' is incompatible with Mamba-based models: .*can be adapted: .*mixer\.in_proj",
    ):
        adapt(model, target_modules=["in_proj", target])


@pytest.mark.parametrize("model_type", MAMBAS)
def test_all_linear_on_mamba_needs_exclusions(model_type):
    with pytest.raises(ValueError, match="is incompatible with Mamba.* Leave it out with exclude_modules"):
        adapt(build(model_type, MAMBAS[model_type]), target_modules="all-linear")
    exclude = ["out_proj", "x_proj", "dt_proj"]
    model = adapt(build(model_type, MAMBAS[model_type]), target_modules="all-linear", exclude_modules=exclude)
    assert adapted(model) == {f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1)}


def test_mamba_has_no_default_and_the_error_names_what_can_be_adapted():
    with pytest.raises(ValueError, match=r"no default for model_type 'mamba'.*: lm_head, mixer\.in_proj\.$"):
        adapt(base_model("mamba"))


def test_linear_attention_that_calls_its_linears_is_not_taken_for_mamba():
    linear = {f"linear_{part}": 2 if "num" in part else 8
              for part in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
    types = ["linear_attention", "full_attention"]
    options = {**MOE, **linear, "layer_types": types, "shared_expert_intermediate_size": 12}
    model = adapt(build("qwen3_next", options), target_modules=["out_proj", "o_proj"])
    assert adapted(model) == {"model.layers.0.linear_attn.out_proj", "model.layers.1.self_attn.o_proj"}
    model.train()(**text(), task_types=TYPES).loss.backward()
    assert all(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if "loramoe_experts" in key)


REFUSED = {
    "no linear": ("llama", ["q_proj", "input_layernorm"]),
    "inside": ("llama", ["mlp", "up_proj"]),
    "Mamba": ("mamba", ["in_proj", "out_proj"]),
    "routed experts": ("qwen3_moe", ["q_proj", "experts"]),
    "router": ("llama4_text", ["q_proj", "router"]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_target_leaves_the_model_as_it_was(reason):
    name, targets = REFUSED[reason]
    model = base_model(name)
    before = {key: (tensor.clone(), tensor.requires_grad) for key, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError):
        adapt(model, target_modules=targets)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[key], tensor) and after[key].requires_grad == grad for key, (tensor, grad) in before.items()
    )
    assert not adapted(model) and not hasattr(model, "peft_config")
    assert not model._forward_pre_hooks and not model._forward_hooks and not model._load_state_dict_pre_hooks


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model, batch = adapted_model("llama").eval(), token_batch()
    with torch.no_grad():
        logits = model(**batch).logits
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match="no linear layer"):
            model.add_adapter("second", LoRAMoEConfig(target_modules=["up_proj", "q_proj", "norm"]))
        assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
        assert torch.equal(model(**batch).logits, logits)
