"""Which part of a batch each layer of a model reads: its text, the decoder's text, images or sound.

The structure of the model says so. Sizes do not: the patches of two images may be as many as the tokens of two rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


# `input_ids` or `inputs_embeds`, with `attention_mask` and `position_ids`
TEXT = "text"
# `decoder_input_ids`, or `labels` shifted by one
DECODER = "decoder"
# what the encoder of an encoder-decoder returned, or `encoder_hidden_states`
ENCODED = "encoded"
# images or sound that the whole model is about, one for each row of the batch
SIGNAL = "signal"
# images or sound of a model that compares row i of them with row i of the texts
PAIRED = "paired"
# images or sound that become tokens of the text: how many belong to which row differs from model to model
MEDIA = "media"
# tokens in another order than (batch, seq), or none of the batch's
OTHER = "other"

# Linears of a decoder that read the encoder's tokens.
CROSS_ATTENTION_INPUT = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention).*\.(k|v|k_proj|v_proj|key|value)$"
)
# Layers that read (seq, batch), latents or global tokens, by `model_type`.
OTHER_ORDER = {
    "fsmt": re.compile(r".*coder\.layers\..*"),
    "led": re.compile(r".*\.(query|key|value)(_global)?"),
    "longformer": re.compile(r".*\.(query|key|value)(_global)?"),
    "pegasus_x": re.compile(r".*encoder\.layers\.\d+\.self_attn\..*"),
    "perceiver": re.compile(r".*"),
    "xlnet": re.compile(r".*\.ff\..*"),
}
# Linears that read positions or distances instead of tokens.
POSITIONS = re.compile(
    r"(.*\.)?(\w*pos_proj|\w*pos_sine_proj|pos_q_proj|pos_key_proj|pos_query_proj|pos_trans|linear_pos|relative_k_proj"
    r"|rel_pos(_[xy])?_bias|gru_rel_pos_linear|continuous_position_bias_mlp\.\d+)"
)
# The same where DeBERTa projects its distances with the linears that project its tokens (`share_att_key`).
SHARED_POSITIONS = re.compile(r".*\.(query_proj|key_proj)")
PLACEHOLDER = re.compile(r"(image|video|audio|speech)_token_(id|index)")


@dataclass(frozen=True)
class Streams:
    """What the layers of one model read.

    Attributes:
        kinds: TEXT, DECODER, ENCODED, SIGNAL, PAIRED, MEDIA or OTHER, by the name of the layer inside the model.
        repeated: names of the modules inside an `nn.ModuleList`, such as the blocks of a transformer.
        is_encoder_decoder: whether the model has an encoder and a decoder.
        encoder: what its encoder reads, TEXT or SIGNAL.
        labels_are_read: whether its decoder is given `labels` where it is given no tokens.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    is_encoder_decoder: bool = False
    encoder: str = TEXT
    labels_are_read: bool = False

    def kind(self, layer: str) -> str:
        """What the layer of that name reads; TEXT where the model does not tell."""
        return self.kinds.get(layer, TEXT)


def streams_of(model: nn.Module) -> Streams:
    """Read from a model's structure what each of its layers reads.

    Modules of transformers keep the configuration of the part that they belong to: the nearest one above a layer says
    whether it is in the language model.

    Args:
        model: the base model, of any kind; a model that is not transformers' has layers of TEXT only.

    Example:
        >>> streams = streams_of(tiny_model().get_base_model())
        >>> streams.kind("model.layers.0.mlp.up_proj"), "model.layers.0.mlp.up_proj" in streams.repeated
        ('text', True)
    """
    modules = dict(model.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    repeated = frozenset(name for name in modules if name.startswith(lists)) if lists else frozenset()
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(config, PretrainedConfig):
        return Streams(repeated=repeated)
    types = _model_types(modules)
    head = model.get_output_embeddings()
    own = TEXT if model.main_input_name in ("input_ids", "inputs_embeds") else SIGNAL
    is_encoder_decoder, encoder, parts = bool(getattr(config, "is_encoder_decoder", False)), own, {}
    if is_encoder_decoder:
        parts, encoder = _encoder_and_decoder(model, modules)
        own = DECODER
    text = _text_among_others(config, types, own)
    shares_positions = getattr(config, "relative_attention", False) and getattr(config, "share_att_key", False)
    kinds = {}
    for name, module in modules.items():
        if name in parts or module is head:
            kind = parts.get(name, TEXT if text and not is_encoder_decoder else own)
        elif text and (types[name] != text or (text == config.model_type and name not in repeated)):
            kind = PAIRED if _is_dual_encoder(model, config) else MEDIA
        elif is_encoder_decoder:
            kind = DECODER if "decoder" in name or "encoder" not in name else encoder
        else:
            kind = TEXT if text else own
        if kind in (TEXT, DECODER) and CROSS_ATTENTION_INPUT.search(name):
            kind = MEDIA if text and not is_encoder_decoder else ENCODED
        others = [POSITIONS, OTHER_ORDER.get(types[name] or ""), SHARED_POSITIONS if shares_positions else None]
        is_other = kind != MEDIA and any(pattern is not None and pattern.fullmatch(name) for pattern in others)
        kinds[name] = OTHER if is_other else kind
    labels_are_read = is_encoder_decoder and model.can_generate()
    return Streams(kinds, repeated, is_encoder_decoder, encoder, labels_are_read)


def _model_types(modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """`model_type` of the nearest configuration at or above each module."""
    types: dict[str, str | None] = {}
    for name, module in modules.items():  # parents come first
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        types[name] = model_type or types.get(name.rpartition(".")[0])
    return types


def _encoder_and_decoder(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> tuple[dict[str, str], str]:
    """What the modules inside of the encoder and the decoder read, by name, and what the encoder reads."""
    owner: Any = model if hasattr(model, "get_encoder") else model.base_model  # transformers 4: classifiers have none
    if not hasattr(owner, "get_encoder"):
        return {}, TEXT
    encoder, decoder = owner.get_encoder(), owner.get_decoder()
    signal = getattr(encoder, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds")
    kinds: dict[str, str] = {}
    for part, other, kind in ((encoder, decoder, SIGNAL if signal else TEXT), (decoder, encoder, DECODER)):
        names = [name for name, module in modules.items() if module is part]
        if names and not any(module is other for module in part.modules()):
            kinds.update({name: kind for name in modules if name.startswith(f"{names[0]}.")})
    return kinds, SIGNAL if signal else TEXT


def _text_among_others(config: PretrainedConfig, types: Mapping[str, str | None], own: str) -> str | None:
    """`model_type` of the language model inside a model that has parts for images or sound too; None for others."""
    try:
        text = config.get_text_config()
    except ValueError:  # several parts for text
        return None
    # An encoder-decoder of two models keeps their configurations as `encoder` and `decoder`.
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    others = [part for part in parts.values() if part is not text and part.model_type]
    if getattr(config, "is_encoder_decoder", False):
        others = [part for part in others if all(part is not parts.get(name) for name in ("encoder", "decoder"))]
    if not others or (text is config and own == SIGNAL):
        return None
    return text.model_type if text.model_type in types.values() else None


def _is_dual_encoder(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Whether the model compares texts with images or sounds, row by row, instead of reading them together."""
    return hasattr(model, "get_text_features") and not any(PLACEHOLDER.fullmatch(name) for name in vars(config))
