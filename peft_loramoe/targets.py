"""Which modules an adapter goes to.

The feed-forward linears of known architectures, sparse feed-forward blocks, and what counts as a linear layer or a
block.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from .streams import MEDIA, streams_of


_GATED = ("gate_proj", "up_proj", "down_proj")
_FC = ("fc1", "fc2")
_C_FC = ("mlp.c_fc", "mlp.c_proj")
_4H = ("dense_h_to_4h", "dense_4h_to_h")
_T5 = ("wi", "wi_0", "wi_1", "wo")
# The attention's output projection is called output.dense as well, hence EXCLUDED.
_BERT = ("intermediate.dense", "output.dense")
EXCLUDED: dict[tuple[str, ...], str] = {_BERT: "attention.output.dense"}

# Feed-forward linears (what the paper adapts) by transformers' `model_type`.
FEED_FORWARD = {
    **dict.fromkeys(
        ("cohere", "gemma", "gemma2", "gemma3", "gemma3_text", "granite", "llama", "mistral", "ministral"), _GATED
    ),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3", "stablelm"), _GATED),
    # the language models of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Llama 3.2 Vision
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "mllama_text_model"), _GATED),
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


# Modules of a backbone's own experts, beside the router that sends each of them some of the tokens.
ROUTED_EXPERTS = re.compile(r"(?P<block>|.*\.)experts(\.(expert_)?\d+(\..*)?)?")
ROUTERS = ("gate", "router")
# Names that feed-forward linears have in one model or another.
FEED_FORWARD_NAMES = {"gate_up_proj", "w1", "w2", "w3"} | {
    target.rpartition(".")[2] for targets in FEED_FORWARD.values() for target in targets
}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Feed-forward blocks of these linears, which no other kind of block has, need no entry in the table.
UNMISTAKABLE = (_GATED, ("gate_up_proj", "down_proj"), ("w1", "w2", "w3"))
# Linears whose weights the fused kernels of a Mamba mixer read without calling them (dt_proj: on every path).
FUSED_IN_MAMBA = ("conv1d", "dt_proj", "out_proj", "x_proj")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, dense or quantised, whose output an adapter can add to."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or is_router(module):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return any(hasattr(module, name) for name in QUANTIZED_WEIGHTS)


def is_router(module: nn.Module) -> bool:
    """Whether the module is a backbone's router that is made of a linear layer, but returns its choice of experts."""
    return isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")


def is_routed_expert(model: nn.Module, name: str) -> bool:
    """Whether the module of that name is, or belongs to, the routed experts of the backbone's own mixture."""
    match = ROUTED_EXPERTS.fullmatch(name)
    if match is not None and any(hasattr(model.get_submodule(match["block"][:-1]), router) for router in ROUTERS):
        return True
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    return is_sparse_block(module) and _is_divided(parent)


def routed_experts(model: nn.Module) -> str:
    """Names of the modules that hold a backbone's routed experts, with * for indices; empty if it has none."""
    names = (
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] == "experts" and is_routed_expert(model, name)
    )
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))


def is_sparse_block(module: nn.Module) -> bool:
    """Whether the module is a backbone's own mixture of experts: a router and the experts that it sends tokens to.

    A whole layer, attention included, is none, also where its router and experts are its own children (Gemma 4).
    """
    children = dict(module.named_children())
    if any(ATTENTION.search(name) for name in children):
        return False
    return any(router in children for router in ROUTERS) and any(
        name == "experts" or type(child).__name__.endswith("Experts") for name, child in children.items()
    )


def sparse_blocks(model: nn.Module) -> list[str]:
    """Names of the sparse feed-forward blocks of a model that read every token, in its order."""
    names = [name.removesuffix(".base_layer") for name, module in model.named_modules() if is_sparse_block(module)]
    attention = {name for name in names if name.rpartition(".")[2] == "experts"}  # JetMoE's
    divided = set(divided_blocks(model))
    return [name for name in names if name not in attention and name.rpartition(".")[0] not in divided]


def divided_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that divide their tokens among several sparse ones, as Ernie 4.5 VL does by modality."""
    return [name for name, module in model.named_modules() if _is_divided(module)]


def _is_divided(module: nn.Module) -> bool:
    return sum(map(is_sparse_block, module.children())) > 1


def is_block(module: nn.Module) -> bool:
    """Whether a mixture can be put beside the module: it computes something with linear layers, from one input."""
    if type(module).forward is nn.Module.forward:
        return False  # a container
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if _is_divided(module):
        return False  # it also reads which tokens go where
    return len(required) == 1 and (is_sparse_block(module) or any(map(is_linear, module.modules())))


def block_features(model: nn.Module, name: str) -> int:
    """Size of what a block reads and returns: `hidden_size` of the nearest configuration at or above it.

    Raises:
        ValueError: there is none.
    """
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
    raise ValueError(
        f"Target module '{name}' is a block, and no configuration says how large its input is: give the model a "
        "`config` with `hidden_size`, or target the linear layers inside the block."
    )


def around_routed_experts(model: nn.Module) -> str:
    """Why routed experts cannot be adapted, and what to target in their place, for error messages."""
    blocks = sorted({name.rpartition(".")[2] for name in sparse_blocks(model)})
    instead = (
        f"Target the block around them, {' or '.join(map(repr, blocks))}: a mixture beside it. " if blocks else ""
    )
    return (
        "cannot be adapted: each sees only the tokens that the backbone's router sends it, so no balance term can be "
        f"computed there. {instead}Linear layers that can be adapted: {candidates(model)}."
    )


def is_bypassed(parent: nn.Module, name: str) -> bool:
    """Whether `parent` is a Mamba mixer, whose kernels read the weight of its linear `name` and never call it."""
    return name in FUSED_IN_MAMBA and all(hasattr(parent, attribute) for attribute in ("A_log", "D", "conv1d"))


def candidates(model: nn.Module) -> str:
    """The linear layers that can be adapted, by the last part of their names, for error messages."""
    names = set()
    for key, module in model.named_modules():
        name = key.removesuffix(".base_layer")
        parent, _, last = name.rpartition(".")
        if (
            is_linear(module)
            and not is_routed_expert(model, name)
            and not is_bypassed(model.get_submodule(parent), last)
        ):
            names.add(re.sub(r"^(.*\.)?\d+\.", "", name))
    return ", ".join(sorted(names)) or "none"


def check_names(model: nn.Module, target_modules: Any) -> None:
    """Refuse names of feed-forward linears that the backbone's experts keep as parameters: PEFT would pass over them.

    Raises:
        ValueError: a listed name is one of a feed-forward linear and fits no module, but the backbone has routed
            experts.
    """
    if isinstance(target_modules, str) or not (experts := routed_experts(model)):
        return
    modules = [f".{name}" for name, _ in model.named_modules()]
    absent = [name for name in target_modules if name.rpartition(".")[2] in FEED_FORWARD_NAMES]
    if absent := sorted(name for name in absent if not any(module.endswith(f".{name}") for module in modules)):
        raise ValueError(
            f"target_modules contains {', '.join(absent)}, but the feed-forward layers of this model are routed "
            f"experts ({experts}), which {around_routed_experts(model)}"
        )


def default_targets(
    model: nn.Module, model_config: dict[str, Any], exclude_modules: Any, mapping: Mapping[str, Any] = FEED_FORWARD
) -> tuple[set[str] | str, set[str] | str | None]:
    """Feed-forward linears of a known architecture, or the sparse blocks of a mixture-of-experts backbone.

    Beside sparse blocks, the linears of dense feed-forward blocks are adapted. Those inside of a sparse block, as of a
    shared expert, are not: the mixture beside the block covers them. Of other architectures, the feed-forward linears
    are adapted if every layer of the text has `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and
    `down_proj`.

    Args:
        model: the base model.
        model_config: its configuration as a dictionary.
        exclude_modules: the user's `exclude_modules`.
        mapping: targets by model type, those of `FEED_FORWARD` or a user's (a list, set or string, as PEFT takes
            them).

    Returns:
        `target_modules`, and `exclude_modules` extended where a target's name also fits an attention layer or a layer
        of another modality's encoder.

    Raises:
        ValueError: there is no default for the architecture; the message lists the model's linear layers.
    """
    text_config = model_config.get("text_config")
    types = [model_config.get("model_type"), text_config.get("model_type") if isinstance(text_config, dict) else None]
    name = next((name for name in types if name in mapping), None)
    targets = None if name is None else mapping[name]
    if isinstance(targets, str):  # an expression for whole names, or "all-linear"
        return targets, exclude_modules
    if targets is None and (sparse := _sparse_targets(model)):
        return sparse, exclude_modules
    if targets is None:
        targets = _unmistakable_targets(model)
    if targets is None:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: there is no default for model_type "
            f"'{model_config.get('model_type')}'. Linear layers of this model: {candidates(model)}."
        )
    excluded = EXCLUDED.get(targets) if isinstance(targets, tuple) else None
    also = [] if excluded is None else [rf"(.*\.)?{re.escape(excluded)}"]
    also += [rf"(.*\.)?{re.escape(part)}\..*" for part in _parts_for_media(model)]
    # PEFT warns about exclusions that exclude nothing.
    names = [
        name for name, _ in model.named_modules() if f".{name}".endswith(tuple(f".{target}" for target in targets))
    ]
    also = [pattern for pattern in also if any(re.fullmatch(pattern, name) for name in names)]
    if targets in UNMISTAKABLE:  # attention may have a gate_proj, too
        ends = sorted({".".join(name.split(".")[-2:]) for name in names})
        also += [rf"(.*\.)?{re.escape(end)}" for end in ends if ATTENTION.search(end)]
    if not also:
        return set(targets), exclude_modules
    if isinstance(exclude_modules, str):
        also.append(exclude_modules)
    else:
        also += [rf"(.*\.)?{re.escape(name)}" for name in sorted(exclude_modules or ())]
    return set(targets), "|".join(f"({pattern})" for pattern in also)


def _sparse_targets(model: nn.Module) -> set[str]:
    """The sparse blocks of a model's text, and the feed-forward linears beside them and in other layers."""
    streams = streams_of(model)
    sparse = [name for name in sparse_blocks(model) if streams.kind(name) != MEDIA]
    divided = [name for name in divided_blocks(model) if streams.kind(name) != MEDIA]
    places = {_layer_and_path(model, name) for name in (*sparse, *divided)}
    lists, blocks = {layer.rpartition(".")[0] for layer, _ in places}, {path for _, path in places}
    # Beside the blocks among which it divides its tokens, such a block has shared experts that read them all.
    shared = {_layer_and_path(model, name) for name in divided}
    linears = set()
    for layer, path, name in _feed_forward_linears(model):
        block = path.rpartition(".")[0]
        # In a block like the sparse one or directly in the layer: not in a shared expert, nor in a part of a norm.
        in_block = block in blocks or "." not in block or (layer, block.rpartition(".")[0]) in shared
        if in_block and layer.rpartition(".")[0] in lists and (layer, block) not in places:
            linears.add(name)
    if any(not any(name.startswith(f"{block}.") for name in linears) for block in divided):
        return set()
    last = {name.rpartition(".")[2] for name in sparse}
    names = [name.removesuffix(".base_layer") for name, _ in model.named_modules()]
    if not linears and all(name in sparse for name in names if name.rpartition(".")[2] in last):
        return last
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # the model may be loaded without its head
    return {name.removeprefix(prefix) for name in (*sparse, *linears)}


def _unmistakable_targets(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the feed-forward linears of an architecture outside the table, if every layer of its text has them."""
    found, layers = defaultdict(set), defaultdict(set)
    for layer, path, name in _feed_forward_linears(model):
        if path.count(".") != 1:
            return None
        layers[layer.rpartition(".")[0]].add(layer)
        found[layer].add(name.rpartition(".")[2])
    if any(len(cast("nn.ModuleList", model.get_submodule(name))) != len(of_list) for name, of_list in layers.items()):
        return None
    return next((names for names in UNMISTAKABLE if found and all(of == set(names) for of in found.values())), None)


def _feed_forward_linears(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Linears of a model's text that have a feed-forward linear's name: their layer, path inside it, whole name."""
    streams = streams_of(model)
    for key, module in model.named_modules():
        name = key.removesuffix(".base_layer")
        if not is_linear(module) or streams.kind(name) == MEDIA or name.rpartition(".")[2] not in FEED_FORWARD_NAMES:
            continue
        layer, path = _layer_and_path(model, name)
        if layer and not ATTENTION.search(path):
            yield layer, path, name


def _layer_and_path(model: nn.Module, name: str) -> tuple[str, str]:
    """The layer that a module is in, an item of the outermost list, and its path there without further indices."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1]), ".".join(part for part in parts[end + 1 :] if not part.isdigit())
    return "", name


def _parts_for_media(model: nn.Module) -> list[str]:
    """Names of the parts of a model that read images or sound beside its text, such as `vision_tower`."""
    streams = streams_of(model)
    media = {name: streams.kind(name) == MEDIA for name, module in model.named_modules() if is_linear(module)}
    text = [name for name, is_media in media.items() if not is_media]
    parts = set()
    for name in (name for name, is_media in media.items() if is_media):
        pieces = name.split(".")
        above = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
        # The largest part around the layer that has no layer of the text.
        part = next(part for part in above if not any(other.startswith(f"{part}.") for other in text))
        parts.add(part.rpartition(".")[2])
    return sorted(parts)
