"""Vision-language models: whose the tokens are when images are spread unevenly over the rows of a batch."""

import warnings

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss, balance_terms, layer_routing
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


def build(name):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**MODELS[name]))
    for key, parameter in model.named_parameters():
        if key.endswith("mm_input_projection_weight"):  # Gemma 3's is zero: images would have no effect
            nn.init.normal_(parameter, std=0.1)
    return model


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoRAMoEConfig(**{"r": 2, "num_experts": 4, "init_weights": False, **options}))


def adapted(model):
    return {module.name for module in model.modules() if isinstance(module, LoRAMoELinear)}


def in_text(names):
    return {name for name in names if "language_model" in name or "text_model" in name}


def image_batch(name, images, pad="right", extra=0):
    """Row i has images[i] images and 3 + i further tokens; `extra` more columns of padding."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, number in enumerate(images):
        words = torch.randint(3, 40, (3 + i,), generator=generator).tolist()
        rows.append(words[:1] + number * [START, *PER_IMAGE * [IMAGE], END] + words[1:])
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if pad == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    labels = ids.masked_fill((mask == 0) | (ids >= END), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if not sum(images):
        return batch
    if name.startswith("qwen"):
        batch["pixel_values"] = torch.randn(sum(images) * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * sum(images))
        if V5:
            batch["mm_token_type_ids"] = (ids == IMAGE).int()
        return batch
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    if name == "smolvlm":  # (rows, images, ...), images of zeros where a row has fewer
        batch["pixel_values"] = torch.zeros(len(images), max(images), 3, 16, 16)
        for i, of_row in enumerate(pixels.split(images)):
            batch["pixel_values"][i, : len(of_row)] = of_row
        return batch
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        batch["image_sizes"] = torch.tensor([[16, 16]] * sum(images))
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
