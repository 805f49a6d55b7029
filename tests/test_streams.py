"""What the layers of other architectures read, where sizes alone would mislead."""

import copy

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import LoRAMoEConfig, balance_loss, layer_routing
from peft_loramoe.streams import DECODER, ENCODED, MEDIA, OTHER, PAIRED, SIGNAL, TEXT, streams_of
from tiny import VOCAB, token_batch


SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
BERT = {**SMALL, "max_position_embeddings": 32}
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
CLIP = dict(text_config=BERT, vision_config=VISION, projection_dim=8)
SEQ2SEQ = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
               encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10,
           "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
WAV2VEC = {**SMALL, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
           "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
           "apply_spec_augment": False}  # fmt: skip
XLNET = dict(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=24)
LONGFORMER = {**BERT, "attention_window": 4}
TROCR = dict(
    encoder={"model_type": "vit", **VISION},
    decoder={"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
    decoder_start_token_id=1, pad_token_id=0,
)  # fmt: skip
TYPES = [0, 1, -1]
PADDED = [7, 6, 5]  # real tokens of token_batch()


def build(model_type, options, auto_class="AutoModel"):
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_config(CONFIG_MAPPING[model_type](**copy.deepcopy(options)))


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoRAMoEConfig(**{"r": 2, "num_experts": 4, "init_weights": False, **options}))


def counts(model):
    return {record.layer: record.token_counts.tolist() for record in layer_routing(model)}


@pytest.mark.parametrize(
    ("model_type", "options", "auto_class", "layer", "kind"),
    [
        ("llama", SMALL, "AutoModelForCausalLM", "model.layers.0.mlp.up_proj", TEXT),
        ("llama", SMALL, "AutoModelForCausalLM", "lm_head", TEXT),
        ("vit", VISION, "AutoModelForImageClassification", "classifier", SIGNAL),
        ("clip", CLIP, "AutoModel", "text_model.encoder.layers.0.mlp.fc1", TEXT),
        ("clip", CLIP, "AutoModel", "visual_projection", PAIRED),
        ("clip", CLIP, "AutoModelForImageClassification", "classifier", SIGNAL),
        ("bart", SEQ2SEQ, "AutoModelForSeq2SeqLM", "model.encoder.layers.0.fc1", TEXT),
        ("bart", SEQ2SEQ, "AutoModelForSeq2SeqLM", "model.decoder.layers.0.fc1", DECODER),
        ("bart", SEQ2SEQ, "AutoModelForSeq2SeqLM", "model.decoder.layers.0.encoder_attn.k_proj", ENCODED),
        ("bart", SEQ2SEQ, "AutoModelForSeq2SeqLM", "model.decoder.layers.0.encoder_attn.q_proj", DECODER),
        ("bart", SEQ2SEQ, "AutoModelForSeq2SeqLM", "lm_head", DECODER),
        ("whisper", WHISPER, "AutoModelForSpeechSeq2Seq", "model.encoder.layers.0.fc1", SIGNAL),
        ("whisper", WHISPER, "AutoModelForSpeechSeq2Seq", "model.decoder.layers.0.fc1", DECODER),
        ("vision-encoder-decoder", TROCR, "AutoModelForImageTextToText", "enc_to_dec_proj", None),
        ("vision-encoder-decoder", TROCR, "AutoModelForImageTextToText", "decoder.cls.predictions.decoder", DECODER),
        ("wav2vec2", WAV2VEC, "AutoModelForCTC", "wav2vec2.encoder.layers.0.feed_forward.output_dense", SIGNAL),
        ("xlnet", XLNET, "AutoModelForSequenceClassification", "transformer.layer.0.ff.layer_1", OTHER),
        ("longformer", LONGFORMER, "AutoModel", "encoder.layer.0.attention.self.query", OTHER),
        ("longformer", LONGFORMER, "AutoModel", "encoder.layer.0.intermediate.dense", TEXT),
    ],
)  # fmt: skip
def test_what_a_layer_reads(model_type, options, auto_class, layer, kind):
    model = build(model_type, options, auto_class)
    names = dict(model.named_modules())
    if kind is None:
        assert layer not in names
        kind, layer = SIGNAL, next(name for name in names if name.startswith("encoder.") and name.endswith("dense"))
    assert layer in names
    assert streams_of(model).kind(layer) == kind


def test_nothing_is_known_of_other_models():
    streams = streams_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])))
    assert streams.kind("0") == TEXT and streams.repeated == {"1.0"}


def test_padding_of_the_texts_is_none_of_the_images_that_they_are_compared_with():
    model = adapt(build("clip", CLIP), target_modules=["fc1"])
    batch = {**token_batch(width=5), "pixel_values": torch.randn(3, 3, 16, 16)}  # five patches for each image
    model(**batch, task_types=TYPES)
    found = counts(model)
    assert found["text_model.encoder.layers.0.mlp.fc1"] == [5, 4, 3]
    assert found[next(name for name in found if name.startswith("vision_model"))] == [5, 5, 5]
    batch["pixel_values"] = batch["pixel_values"][:2]  # not one for each text
    model(**batch, task_types=TYPES)
    with pytest.raises(ValueError, match=r"which of the 3 rows of the batch the \(2, 5\) tokens of layer 'vision"):
        balance_loss(model)


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_labels_that_are_classes_are_no_tokens(where):
    options = {**SEQ2SEQ, "num_labels": 7, "problem_type": "multi_label_classification"}
    model = adapt(build("bart", options, "AutoModelForSequenceClassification"), target_modules=["fc1"])
    batch = token_batch(width=7)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 2, 3)
    batch["input_ids"][range(3), [6, 5, 4]] = 2  # where the classifier looks
    model(**batch, labels=torch.ones(3, 7), task_types=TYPES)
    assert counts(model)[f"model.{where}.layers.0.fc1"] == PADDED


def test_frames_of_padded_sound_do_not_count():
    model = adapt(build("wav2vec2", WAV2VEC, "AutoModelForCTC"), target_modules=["output_dense"])
    mask = (torch.arange(100) < torch.tensor([100, 60])[:, None]).long()
    output = model(input_values=torch.randn(2, 100), attention_mask=mask, task_types=[0, 1])
    frames = model.get_base_model()._get_feat_extract_output_lengths(torch.tensor([100, 60])).tolist()
    assert output.logits.shape[1] == frames[0] > frames[1]
    assert all(found == frames for found in counts(model).values())


def test_frames_of_padded_features_do_not_count():
    model = adapt(build("whisper", WHISPER, "AutoModelForSpeechSeq2Seq"))
    mask = (torch.arange(20) < torch.tensor([20, 12])[:, None]).long()
    labels = torch.tensor([[5, 6, 2], [5, 2, -100]])
    model(input_features=torch.randn(2, 8, 20), attention_mask=mask, labels=labels, task_types=[0, 1])
    assert counts(model)["model.encoder.layers.0.fc1"] == [10, 6]
    assert counts(model)["model.decoder.layers.0.fc1"] == [3, 2]


def test_a_decoder_beside_an_encoder_of_images():
    model = adapt(build("vision-encoder-decoder", TROCR, "AutoModelForImageTextToText"),
                  target_modules=["query", "q_proj", "key", "k_proj"])  # fmt: skip
    labels = torch.tensor([[5, 6, 7, 8, 2], [5, 2, -100, -100, -100]])  # as many as an image has patches
    model(pixel_values=torch.randn(2, 3, 16, 16), labels=labels, task_types=[0, 1])
    found = counts(model)
    patches, tokens = [5, 5], [5, 2]
    assert all(found[name] == patches for name in found if name.startswith("encoder"))
    assert found["decoder.bert.encoder.layer.0.attention.self.key"] == tokens
    assert found["decoder.bert.encoder.layer.0.crossattention.self.key"] == patches
    assert found["decoder.bert.encoder.layer.0.crossattention.self.query"] == tokens


def test_a_decoder_that_is_given_hidden_states_of_an_encoder():
    options = {**BERT, "is_decoder": True, "add_cross_attention": True}
    model = adapt(build("bert", options, "AutoModelForCausalLM"), target_modules=["key"])
    states = dict(
        encoder_hidden_states=torch.randn(3, 7, 16), encoder_attention_mask=torch.eye(3, 7).cumsum(-1) * 0 + 1
    )
    states["encoder_attention_mask"][0, 2:] = 0
    model(**token_batch(), **states, task_types=TYPES)
    found = counts(model)
    assert found["bert.encoder.layer.0.attention.self.key"] == PADDED
    assert found["bert.encoder.layer.0.crossattention.self.key"] == [2, 7, 7]


@pytest.mark.parametrize(
    ("model_type", "options", "target"), [("xlnet", XLNET, "layer_1"), ("longformer", LONGFORMER, "query")]
)
def test_tokens_in_another_order_are_refused(model_type, options, target):
    model = adapt(build(model_type, options, "AutoModelForSequenceClassification"), target_modules=[target])
    batch = {name: value[:, :4].repeat(2, 1)[:4] for name, value in token_batch().items()}  # as many rows as tokens
    model(**batch, task_types=[0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"which of the 4 rows of the batch the \(4, 4\) tokens of layer"):
        balance_loss(model)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [{"share_att_key": True}, {"share_att_key": False}], ids=str)
def test_distances_between_tokens_are_no_tokens(rows, options):
    relative = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 2, **options}
    model = adapt(build("deberta-v2", relative), target_modules=["key_proj", "pos_key_proj"])
    # In a batch of one row, the distances' shape may be that of its tokens.
    model(**{name: value[:rows, :4] for name, value in token_batch().items()}, task_types=TYPES[:rows])
    with pytest.raises(ValueError, match=rf"which of the {rows} rows of the batch the .* of layer '.*key_proj'"):
        balance_loss(model)


def test_choices_of_a_row_are_one_sample():
    model = adapt(build("bert", BERT, "AutoModelForMultipleChoice"))
    batch = {name: torch.stack([value, value.flip(0)], 1) for name, value in token_batch().items()}
    model(**batch, labels=torch.tensor([0, 1, 0]), task_types=TYPES)
    assert all(found == [12, 12, 12] for found in counts(model).values())


class Experts(nn.Module):
    """Two linears, each of which gets some of the tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids):
        flat = self.embedding(input_ids).flatten(0, 1)
        return self.parts[0](flat[:2]).sum() + self.parts[1](flat[2:]).sum()


def test_a_part_of_the_tokens_is_not_taken_for_pooled_rows():
    model = adapt(Experts(), target_modules=["parts.0", "parts.1"])
    model(input_ids=torch.ones(2, 4, dtype=torch.long), task_types=[0, 1])
    with pytest.raises(ValueError, match=r"the \(2,\) tokens of layer 'parts.0' belong"):
        balance_loss(model)


def test_media_is_known_without_running_the_model():
    options = dict(text_config={"model_type": "llama", **SMALL},
                   vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=VOCAB - 1)  # fmt: skip
    streams = streams_of(build("llava", options, "AutoModelForImageTextToText"))
    assert streams.kind("model.multi_modal_projector.linear_1") == MEDIA
    assert streams.kind("lm_head") == streams.kind("model.language_model.layers.1.self_attn.q_proj") == TEXT
