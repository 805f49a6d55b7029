"""Which modules an adapter goes to: the feed-forward linears of known architectures, and what counts as a linear layer."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


_GATED = ("gate_proj", "up_proj", "down_proj")
_FC = ("fc1", "fc2")
_C_FC = ("mlp.c_fc", "mlp.c_proj")
_4H = ("dense_h_to_4h", "dense_4h_to_h")
_T5 = ("wi", "wi_0", "wi_1", "wo")
# The attention's output projection is called output.dense as well, hence EXCLUDED.
_BERT = ("intermediate.dense", "output.dense")
EXCLUDED = {_BERT: "attention.output.dense"}

# Feed-forward linears (what the paper adapts) by transformers' `model_type`.
FEED_FORWARD = {
    **dict.fromkeys(("cohere", "gemma", "gemma2", "gemma3", "gemma3_text", "granite", "llama", "mistral", "ministral"), _GATED),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3", "stablelm"), _GATED),
    **dict.fromkeys(("glm", "glm4", "phi3"), ("gate_up_proj", "down_proj")),
    **dict.fromkeys(("bart", "clip", "m2m_100", "marian", "mbart", "opt", "pegasus", "phi", "siglip", "whisper"), _FC),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo", "starcoder2"), _C_FC),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _4H),
    **dict.fromkeys(("codegen", "gptj"), ("fc_in", "fc_out")),
    **dict.fromkeys(("mt5", "t5", "umt5"), _T5),
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "electra", "ernie", "roberta", "xlm-roberta"), _BERT),
    **dict.fromkeys(("deit", "vit"), (*_BERT, *_FC)),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
    "modernbert": ("mlp.Wi", "mlp.Wo"),
}
EXCLUDED[FEED_FORWARD["vit"]] = EXCLUDED[_BERT]

# Attributes by which linear layers of quantisation libraries that do not derive from nn.Linear are known.
QUANTIZED_WEIGHTS = ("qweight", "W_q", "codebooks", "weight_scales")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, dense or quantised, whose output an adapter can add to."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return any(hasattr(module, name) for name in QUANTIZED_WEIGHTS)


def default_targets(
    model: nn.Module, model_config: dict[str, Any], exclude_modules: Any
) -> tuple[set[str], set[str] | str | None]:
    """Feed-forward linears of a known architecture.

    Args:
        model: the base model, for the list of candidates in the error.
        model_config: its configuration as a dictionary.
        exclude_modules: the user's `exclude_modules`.

    Returns:
        `target_modules`, and `exclude_modules` extended where a target's name also fits an attention layer.

    Raises:
        ValueError: the architecture is not in the table; the message lists the model's linear layers.
    """
    text_config = model_config.get("text_config")
    types = [model_config.get("model_type"), text_config.get("model_type") if isinstance(text_config, dict) else None]
    targets = next((FEED_FORWARD[name] for name in types if name in FEED_FORWARD), None)
    if targets is None:
        linears = (name for name, module in model.named_modules() if is_linear(module))
        candidates = sorted({re.sub(r"^(.*\.)?\d+\.", "", name) for name in linears})
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: there is no default for model_type "
            f"'{model_config.get('model_type')}'. Linear layers of this model: {', '.join(candidates) or 'none'}."
        )
    if (also := EXCLUDED.get(targets)) is None:
        return set(targets), exclude_modules
    if isinstance(exclude_modules, str):
        return set(targets), rf"({exclude_modules})|(.*\.)?{re.escape(also)}"
    return set(targets), {*(exclude_modules or ()), also}
