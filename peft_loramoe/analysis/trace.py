"""Router probabilities for each token of a text."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..balance import LayerRouting, layer_routing
from ..balance.results import configs_of
from ..groups import ExpertGroups
from ..modes import evaluation_mode
from .adapted import adds_special_tokens, on_device_of, require_finite
from .saved import SavedAsJSON


@dataclass(frozen=True)
class RouterTrace(SavedAsJSON):
    """Router probabilities for every token of a text, by layer.

    Attributes:
        adapter: name of the adapter.
        text: the text.
        tokens: the decoded tokens, T strings.
        token_ids: T ids, special tokens included.
        layers: layer name -> router probabilities, T lists of N floats. A layer that the model uses several times has
            an entry per use: `name`, `name#2`, ...
        expert_groups: layer name -> sizes of the expert groups.
        task_type_names: names of the groups, or None.
        null_groups: indices of the null groups.

    Example:
        >>> trace = router_trace(tiny_model(), tiny_tokenizer(), "w3 w4")
        >>> trace.save("trace.json")
        >>> RouterTrace.load("trace.json").tokens
        ['w3', 'w4']
    """

    adapter: str
    text: str
    tokens: list[str]
    token_ids: list[int]
    layers: dict[str, list[list[float]]]
    expert_groups: dict[str, list[int]]
    task_type_names: list[str] | None
    null_groups: list[int]

    def __repr__(self) -> str:
        """How much was traced, without the probabilities."""
        return f"RouterTrace(adapter={self.adapter!r}, {len(self.tokens)} tokens, {len(self.layers)} linears)"

    def records(self) -> list[dict[str, Any]]:
        """The trace as one record per layer, token and expert.

        Returns:
            Records with `layer`, `position` (index of the token), `token`, `expert`, `group`, `null` and `weight`.
        """
        return [
            {
                "layer": layer,
                "position": position,
                "token": token,
                "expert": expert,
                "group": group,
                "null": group in self.null_groups,
                "weight": weight,
            }
            for layer, probabilities in self.layers.items()
            for position, (token, of_token) in enumerate(zip(self.tokens, probabilities))
            for expert, (group, weight) in enumerate(
                zip(ExpertGroups(tuple(self.expert_groups[layer])).of_experts, of_token)
            )
        ]


def router_trace(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, adapter_name: str | None = None
) -> RouterTrace:
    """Run the model over a text and record the router probabilities of each token.

    The model runs in eval mode without gradients and returns to its previous mode. Layers that do not process single
    tokens, such as a classifier's pooler, are left out.

    Args:
        model: the adapted model, possibly wrapped; not an encoder-decoder.
        tokenizer: tokenizer of the model. It adds its special tokens unless the text begins with BOS.
        text: the text, not empty.
        adapter_name: which active adapter; None for the only one.

    Raises:
        TypeError: `text` is not a string.
        ValueError: the model has no LoRAMoE layers or is an encoder-decoder, the adapter is not active or ambiguous,
            the text has no tokens, no layer processes single tokens, or router probabilities are not finite.

    Example:
        >>> trace = router_trace(tiny_model(num_experts=4), tiny_tokenizer(), "w3 w4 w5")
        >>> probabilities = trace.layers["model.layers.0.mlp.up_proj"]
        >>> len(probabilities), len(probabilities[0])
        (3, 4)
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be one string, not a {type(text).__name__}: {text!r}.")
    configs = configs_of(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"router_trace does not support encoder-decoders such as {type(model).__name__}; call the model yourself "
            "and read peft_loramoe.layer_routing(model)."
        )
    token_ids = list(tokenizer(text, add_special_tokens=adds_special_tokens(tokenizer, text))["input_ids"])
    if not token_ids:
        raise ValueError(f"text={text!r} has no tokens.")
    input_ids = torch.tensor([token_ids])
    with evaluation_mode(model):
        model(**on_device_of(model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}))
        used = layer_routing(model)
    adapter = _adapter_that_ran(used, adapter_name)
    layers, expert_groups = _by_layer([layer for layer in used if layer.adapter == adapter], len(token_ids))
    return RouterTrace(
        adapter=adapter,
        text=text,
        tokens=[str(tokenizer.decode([token_id])) for token_id in token_ids],
        token_ids=token_ids,
        layers=layers,
        expert_groups=expert_groups,
        task_type_names=configs[adapter].task_type_names,
        null_groups=list(configs[adapter].null_groups or []),
    )


def _adapter_that_ran(used: list[LayerRouting], adapter_name: str | None) -> str:
    ran = list(dict.fromkeys(layer.adapter for layer in used))
    if not ran:
        raise ValueError("No router ran: keep a LoRAMoE adapter enabled and active.")
    if adapter_name is None and len(ran) > 1:
        raise ValueError(f"The adapters {', '.join(ran)} are active; choose one with adapter_name=...")
    if adapter_name is not None and adapter_name not in ran:
        raise ValueError(
            f"adapter_name='{adapter_name}' is not active ({', '.join(ran)} is); call "
            f"model.set_adapter('{adapter_name}') first."
        )
    return adapter_name or ran[0]


def _by_layer(used: list[LayerRouting], num_tokens: int) -> tuple[dict[str, list[list[float]]], dict[str, list[int]]]:
    """Router probabilities and group sizes of each use of a layer that processes all tokens."""
    uses: Counter[str] = Counter()
    layers, expert_groups = {}, {}
    for layer in used:
        if _reads_tokens(layer.probabilities.shape[:-1], num_tokens):
            probabilities = layer.probabilities.flatten(0, -2)
            require_finite(probabilities, layer.adapter, layer.layer)
            uses[layer.layer] += 1
            name = layer.layer if uses[layer.layer] == 1 else f"{layer.layer}#{uses[layer.layer]}"
            layers[name], expert_groups[name] = probabilities.tolist(), list(layer.groups.sizes)
    if not layers:
        names = ", ".join(dict.fromkeys(layer.layer for layer in used))
        raise ValueError(
            f"No adapted layer processes the text's {num_tokens} tokens one by one; layers that ran: {names}."
        )
    return layers, expert_groups


def _reads_tokens(shape: tuple[int, ...], num_tokens: int) -> bool:
    """Whether an input with these leading dimensions is a row of tokens, flattened or not.

    For a single token, (1,) is ambiguous: a pooler's input has the same shape.
    """
    return math.prod(shape) == num_tokens and num_tokens in shape and (num_tokens > 1 or len(shape) > 1)
