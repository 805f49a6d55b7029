"""Vision-language models: whose the tokens are when images are spread unevenly over the rows of a batch."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss, balance_terms, layer_routing
from peft_loramoe.layer import LoRAMoELayer
from tiny import VOCAB, capture


V5 = int(transformers.__version__.split(".")[0]) >= 5
IMAGE, VIDEO, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4
PER_IMAGE = 4  # placeholder tokens of an image, in every model here
TYPES = [0, 1, -1]

TEXT = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
QWEN_VISION = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
QWEN = dict(text_config={**TEXT, "rope_scaling": MROPE, "rope_parameters": MROPE}, image_token_id=IMAGE,
            video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)  # fmt: skip
QWEN_25_VISION = {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 16,
                  "fullatt_block_indexes": [1]}  # fmt: skip
QWEN_3_VISION = {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24,
                 "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
MODELS = {
    "llava": dict(
        text_config=LLAMA, vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=IMAGE
    ),
    "qwen2_vl": {**QWEN, "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}},
    "qwen2_5_vl": {**QWEN, "vision_config": QWEN_25_VISION},
    "qwen3_vl": {**QWEN, "vision_config": QWEN_3_VISION},
    "gemma3": dict(
        text_config=TEXT, vision_config={**VISION, "vision_use_head": False}, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=PER_IMAGE,
    ),
    "internvl": dict(
        text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE, image_seq_length=PER_IMAGE,
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
    ),
    "smolvlm": dict(
        text_config=LLAMA, vision_config={**VISION, "patch_size": 4}, image_token_id=IMAGE, scale_factor=2
    ),
    "mistral3": dict(  # its images are read by Pixtral, whose linears have the text model's names
        text_config={"model_type": "mistral", **TEXT}, image_token_index=IMAGE, spatial_merge_size=1,
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
    ),
}  # fmt: skip
GATED = ("gate_proj", "up_proj", "down_proj")


class Other(NamedTuple):
    """A further model: its configuration, and what is adapted by default in its two layers.

    Attributes:
        options: of its configuration.
        adapted: names of linears and blocks, by the name of the module in both layers, or in layer 0 and in layer 1.
        per_image: placeholder tokens of an image.
    """

    options: dict
    adapted: tuple[dict[str, tuple[str, ...]], ...] = ({"mlp": GATED},)
    per_image: int = PER_IMAGE


MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
BLOCK = ({"": ("mlp",)},)
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
PLACEHOLDER = dict(image_token_id=IMAGE, image_token_index=IMAGE)
BOUNDS = dict(image_start_token_id=START, image_end_token_id=END)
GLM_VISION = {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "image_size": 16}
GLM_MOE = {
    **MOE,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
OTHERS = {
    "llava_next": Other(
        dict(text_config=LLAMA, vision_config=CLIP, image_grid_pinpoints=[[16, 16]], **PLACEHOLDER), per_image=10
    ),
    "llava_onevision": Other(
        dict(text_config={"model_type": "qwen2", **TEXT}, vision_config=SIGLIP, image_grid_pinpoints=[[16, 16]], **PLACEHOLDER),
        per_image=10,
    ),
    "paligemma": Other(
        dict(text_config={"model_type": "gemma", **TEXT}, vision_config={**SIGLIP, "projection_dim": 16},
             projection_dim=16, **PLACEHOLDER)
    ),
    "idefics2": Other(
        dict(text_config={"model_type": "mistral", **TEXT}, vision_config={**VISION, "patch_size": 4}, image_token_id=IMAGE,
             perceiver_config=dict(hidden_size=16, resampler_n_latents=PER_IMAGE, resampler_depth=1, resampler_n_heads=2,
                                   resampler_head_dim=8, num_key_value_heads=1))
    ),
    "llama4": Other(
        dict(text_config={**TEXT, **MOE, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2,
                          "attention_chunk_size": 64},
             vision_config={**VISION, "vision_output_dim": 16, "intermediate_size": 16, "projector_input_dim": 16,
                            "projector_output_dim": 16, "pixel_shuffle_ratio": 1.0, "rope_theta": 10000}, **PLACEHOLDER),
        ({"feed_forward": GATED}, {"": ("feed_forward",)}),
    ),
    "cohere2_vision": Other(
        dict(text_config={"model_type": "cohere2", **TEXT}, vision_config={**SIGLIP, "patch_size": 4},
             downsample_factor=2, alignment_intermediate_size=16, **PLACEHOLDER)
    ),
    "qwen3_vl_moe": Other({**QWEN, "text_config": {**QWEN["text_config"], **MOE}, "vision_config": QWEN_3_VISION}, BLOCK),
    "glm4v": Other({**QWEN, **BOUNDS, "vision_config": GLM_VISION}, ({"mlp": ("gate_up_proj", "down_proj")},)),
    "glm4v_moe": Other(
        {**QWEN, **BOUNDS, "text_config": {**QWEN["text_config"], **GLM_MOE, "head_dim": 16}, "vision_config": GLM_VISION},
        ({"mlp": GATED}, {"": ("mlp",)}),
    ),
    "lfm2_vl": Other(
        dict(text_config={"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
             vision_config={"model_type": "siglip2_vision_model", **VISION, "patch_size": 4, "num_patches": 16,
                            "vision_use_head": False},
             downsample_factor=2, projector_hidden_size=16, **PLACEHOLDER),
        ({"feed_forward": ("w1", "w2", "w3")},),
    ),
}  # fmt: skip
if V5:
    LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                  layer_types=["linear_attention", "full_attention"],
                  rope_parameters={**MROPE, "partial_rotary_factor": 1.0})  # fmt: skip
    OTHERS |= {
        "qwen3_5": Other({**QWEN, "text_config": {**TEXT, **LINEAR}, "vision_config": {
            key: value for key, value in QWEN_3_VISION.items() if key != "deepstack_visual_indexes"}}),
        "gemma4": Other(  # experts beside the dense block of each layer
            dict(text_config={**TEXT, "global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
                              "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12},
                 vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
                                "position_embedding_size": 64},
                 image_token_id=IMAGE, audio_config=None, boi_token_id=START, eoi_token_id=END, video_token_id=VIDEO)
        ),
        "aria": Other(
            dict(text_config={**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
                 vision_config={"model_type": "idefics3_vision", **VISION}, projector_patch_to_query_dict={4: PER_IMAGE},
                 **PLACEHOLDER),
            BLOCK,
        ),
        "qwen2_5_omni_thinker": Other(
            {**QWEN, "vision_config": QWEN_25_VISION, "image_token_index": IMAGE, "audio_token_index": END - 1,
             "audio_token_id": END - 1, "video_token_index": VIDEO,
             "audio_config": dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8,
                                  output_dim=16, max_source_positions=20)}
        ),
        "ernie4_5_vl_moe": Other(  # divides its tokens among experts for text and for images
            {**QWEN, **BOUNDS,
             "text_config": {**TEXT, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [12, 12],
                             "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": MROPE},
             "vision_config": dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, hidden_size=16,
                                   intermediate_size=24)},
            ({"mlp": GATED}, {"mlp.shared_experts": GATED}),
        ),
    }  # fmt: skip


def build(name):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**copy.deepcopy(MODELS[name] if name in MODELS else OTHERS[name].options))
    model = AutoModelForImageTextToText.from_config(config)
    for key, parameter in model.named_parameters():
        # Gemma 3's projection is zero, so that images would have no effect; others keep what was in the memory.
        if key.endswith("mm_input_projection_weight") or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.1)
    return model


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoRAMoEConfig(**{"r": 2, "num_experts": 4, "init_weights": False, **options}))


def adapted(model):
    return {module.name for module in model.modules() if isinstance(module, LoRAMoELinear)}


def in_text(names):
    return {name for name in names if "language_model" in name or "text_model" in name}


def image_batch(name, images, pad="right", extra=0, per_image=PER_IMAGE):
    """Row i has images[i] images and 3 + i further tokens; `extra` more columns of padding."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, number in enumerate(images):
        words = torch.randint(3, 40, (3 + i,), generator=generator).tolist()
        rows.append(words[:1] + number * [START, *per_image * [IMAGE], END] + words[1:])
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if pad == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    labels = ids.masked_fill((mask == 0) | (ids >= END), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if not sum(images):
        return batch
    if name.startswith(("qwen", "glm")):
        batch["pixel_values"] = torch.randn(sum(images) * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * sum(images))
        if V5 and name != "qwen2_5_omni_thinker":
            batch["mm_token_type_ids"] = (ids == IMAGE).int()
        return batch
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    if name in ("smolvlm", "idefics2"):  # (rows, images, ...), images of zeros where a row has fewer
        batch["pixel_values"] = torch.zeros(len(images), max(images), 3, 16, 16)
        for i, of_row in enumerate(pixels.split(images)):
            batch["pixel_values"][i, : len(of_row)] = of_row
        return batch
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        batch["image_sizes"] = torch.tensor([[16, 16]] * sum(images))
    if name == "paligemma":
        batch["token_type_ids"] = (labels != -100).long()
    if name.startswith("llava_"):  # a small copy and one tile
        return {
            **batch,
            "pixel_values": pixels[:, None].repeat(1, 2, 1, 1, 1),
            "image_sizes": torch.tensor([[16, 16]] * sum(images)),
        }
    if name == "ernie4_5_vl_moe":
        patches = torch.randn(sum(images) * 16, 3 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]] * sum(images))
        return {**batch, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    if name == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(sum(images), -1, -1)
        patches = torch.rand(sum(images), 16, 3 * 4 * 4, generator=generator)
        return {
            **batch,
            "pixel_values": patches,
            "image_position_ids": places,
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    if name == "lfm2_vl":
        patches, sizes = (
            torch.rand(sum(images), 16, 3 * 4 * 4, generator=generator),
            torch.tensor([[4, 4]] * sum(images)),
        )
        return {
            **batch,
            "pixel_values": patches,
            "spatial_shapes": sizes,
            "pixel_attention_mask": torch.ones(sum(images), 16).long(),
        }
    return {**batch, "pixel_values": pixels}


def expected_term(probabilities, mask, types, delta, group_of_expert):
    """The default term of one layer, sample by sample and expert by expert."""
    Z = []
    for row, real, task_type in zip(probabilities, mask.bool(), types):
        Q = row[real].mean(0)
        target = torch.tensor(
            [1.0 if task_type < 0 else 1 + delta if g == task_type else 1 - delta for g in group_of_expert]
        )
        Z.append(Q / (target / target.mean()))
    Z = torch.stack(Z)
    return Z.var() / (Z.mean() ** 2 + 1e-10)


IMAGES = {"all in the first row": [2, 0], "unequal": [2, 1, 0], "one for each row": [1, 1], "text only": [0, 0]}


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("name", MODELS)
def test_image_tokens_belong_to_the_row_of_their_placeholders(name, images, pad):
    model = adapt(build(name), target_modules="all-linear").train()
    batch, types = image_batch(name, images, pad), TYPES[: len(images)]
    seen = capture(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batch, task_types=types).loss.backward()
    left_out = [w for w in caught if "leaves out the" in str(w.message) and "read images or sound" in str(w.message)]
    assert len(left_out) == (sum(images) > 0)
    terms = balance_terms(model)["default"]
    assert terms.keys() == in_text(adapted(model))
    config = model.peft_config["default"]
    groups = config.groups_of().of_experts
    for layer, term in terms.items():
        expected = expected_term(seen[layer], batch["attention_mask"], types, config.balance_delta, groups)
        torch.testing.assert_close(term, expected)
    for record in layer_routing(model):
        assert record.token_counts.tolist() == batch["attention_mask"].sum(1).tolist()
        assert record.task_types.tolist() == types
    gradients = {key: p.grad for key, p in model.named_parameters() if "loramoe_experts" in key}
    without = {key for key, g in gradients.items() if g is None or not g.any()}
    if sum(images):  # the loss trains the other layers; CLIP's last one is not used
        assert not in_text(without) and len(without) < len(gradients) / 4
    else:
        assert not in_text(without)


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_the_term(name):
    model = adapt(build(name), target_modules="all-linear").eval()
    terms = []
    with torch.no_grad():
        for pad, extra in (("right", 0), ("right", 3), ("left", 2)):
            model(**image_batch(name, [2, 0], pad, extra), task_types=[0, 1])
            terms.append(balance_loss(model))
    torch.testing.assert_close(terms[1], terms[0])
    torch.testing.assert_close(terms[2], terms[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_generating_with_images(name):
    model = adapt(build(name), target_modules="all-linear").eval()
    batch = image_batch(name, [2, 0], "left")
    del batch["labels"]
    texts = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert texts.shape[1] == batch["input_ids"].shape[1] + 3
    record = layer_routing(model)[0]  # of the last step, which read one token of each row
    assert record.token_counts.tolist() == [1, 1]


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_with_images(name):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(build(name), target_modules="all-linear").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**image_batch(name, [2, 0]), task_types=[0, 1]).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_are_the_feed_forward_linears_of_the_text_model(name):
    model = adapt(build(name))
    names = adapted(model)
    assert names == in_text(names) and len(names) == 6
    assert {layer.rpartition(".")[2] for layer in names} == set(GATED)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The balance term leaves out")
        model.train()(**image_batch(name, [2, 0]), task_types=[0, 1]).loss.backward()
    assert all(p.grad.any() for key, p in model.named_parameters() if "loramoe_experts" in key)


@pytest.mark.parametrize("name", OTHERS)
def test_the_defaults_of_other_models_train_with_images(name):
    other = OTHERS[name]
    model = adapt(build(name)).train()
    names = {
        f"layers.{layer}.{f'{module}.{last}'.removeprefix('.')}"
        for layer in (0, 1)
        for module, lasts in other.adapted[layer % len(other.adapted)].items()
        for last in lasts
    }
    found = {module.name for module in model.modules() if isinstance(module, LoRAMoELayer)}
    assert {name[name.rindex("layers.") :] for name in found} == names and found == in_text(found)
    batch = image_batch(name, [2, 1, 0], per_image=other.per_image)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The balance term leaves out")
        model(**batch, task_types=TYPES).loss.backward()
    assert balance_terms(model)["default"].keys() == found
    for record in layer_routing(model):
        assert record.token_counts.tolist() == batch["attention_mask"].sum(1).tolist()
    assert all(p.grad.any() for key, p in model.named_parameters() if "loramoe_experts" in key)


@pytest.mark.skipif(not V5, reason="transformers 4 has no such model")
def test_blocks_that_divide_their_tokens_are_refused():
    with pytest.raises(ValueError, match=r"layers\.1\.mlp' is no linear layer .* nor a block of them with one input"):
        adapt(build("ernie4_5_vl_moe"), target_modules=["mlp"])
    with pytest.raises(
        ValueError, match=r"text_moe' is one of the backbone's routed experts, which cannot be adapted"
    ):
        adapt(build("ernie4_5_vl_moe"), target_modules=["text_moe"])


def test_a_tower_whose_patches_are_as_many_as_the_texts_tokens_counts_for_no_row():
    model = adapt(build("llava"), target_modules=["fc1", "fc2", "q_proj"])
    batch = image_batch("llava", [1, 1])
    width = batch["input_ids"].shape[1]
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 2
    model(**batch, task_types=[0, 1])
    records = layer_routing(model)
    assert {record.layer for record in records} == in_text(adapted(model)) and len(records) == 2
    assert all(record.probabilities.shape[:2] == (2, width) for record in records)


def test_adapters_for_each_sample_reach_the_text_but_not_towers():
    model = adapt(build("llava"), target_modules=["gate_proj"]).eval()
    batch = image_batch("llava", [2, 0], "left")
    with torch.no_grad():
        default = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        mixed = model(**batch, adapter_names=["__base__", "default"]).logits
        torch.testing.assert_close(mixed, torch.stack([base[0], default[1]]))
        tower = adapt(build("llava"), target_modules=["fc1", "linear_1"]).eval()
        same = tower(**batch, adapter_names=["default", "default"]).logits
        torch.testing.assert_close(same, tower(**batch).logits)
        with pytest.raises(ValueError, match="which samples the .* tokens of layer 'model.vision_tower"):
            tower(**batch, adapter_names=["__base__", "default"])


def test_packed_rows_with_positions_in_images():
    model = adapt(build("qwen2_vl"), target_modules=["up_proj"])
    ids = torch.arange(3, 11)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for given in (positions.expand(3, 1, 8), torch.stack([positions] * 4), positions):
        model(input_ids=ids, position_ids=given, task_types=[1])
        assert [n for n in layer_routing(model)[0].token_counts.tolist() if n] == [4, 4]


def test_a_tower_on_its_own_reads_an_image_for_each_row():
    tower = build("llava").model.vision_tower
    model = adapt(tower, target_modules=["fc1"])
    model(pixel_values=torch.randn(2, 3, 16, 16), task_types=[0, 1])
    assert layer_routing(model)[0].token_counts.tolist() == [5, 5]
