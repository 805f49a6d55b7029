"""What a base model does that would make the gradients of its adapters wrong, and how that is prevented."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


logger = logging.getLogger(__name__)

# transformers wraps the function once more where it offloads activations.
CHECKPOINT_MODULES = (checkpoint.__module__, "transformers.modeling_utils")


class UnpackedWeights:
    """Keeps bitsandbytes' 4-bit linears of a model from repacking their weights for inference.

    On CPUs with AVX512-BF16 a `Linear4bit` repacks its weight when it is first evaluated. From then on it uses an
    operator without a gradient, in training too: everything below it, adapted or not, would be trained wrongly.
    Weights that are packed already are unpacked; their scales stay as packing rounded them, to bfloat16.

    Args:
        model: the base model, adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[Any] = [
            module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)
        ]
        for module in self._kept:
            module.support_avx512bf16_for_cpu = False
        for module in model.modules():
            weight = module._parameters.get("weight")
            state = getattr(weight, "quant_state", None)
            if weight is not None and getattr(state, "packing_format_for_cpu", False):
                _unpack(weight, state)

    def remove(self) -> None:
        """Allow it again, for the layers for which it was allowed."""
        for module in self._kept:
            module.support_avx512bf16_for_cpu = True
        self._kept = []


def _unpack(weight: nn.Parameter, state: Any) -> None:
    """Undo bitsandbytes' packing of a weight in place."""
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
    except ImportError as error:
        raise ImportError(
            "The base model's 4-bit weights are packed for inference, which passes no gradient on, and the installed "
            "bitsandbytes cannot unpack them. Load the base model anew and attach the adapter before the first "
            "evaluation."
        ) from error
    absmax = state.absmax.T.reshape(-1).float()
    weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    # bitsandbytes quantises nested scales anew and leaves plain ones transposed.
    state.absmax, state.nested, state.offset, state.state2 = absmax, False, None, None


class _HasConfigs(Protocol):
    @property
    def configs(self) -> Mapping[str, Any]:
        """The adapters' configurations."""
        ...


class NonReentrantCheckpointing:
    """A forward pre-hook of the base model that makes its gradient checkpointing non-reentrant in training.

    Inside reentrant checkpoints layers run without a graph, so that the balance term would have no gradient. The
    functions that transformers keeps in its modules are replaced; the gradients are the same.

    Args:
        recorder: has the adapters' configurations; where none has a balance term, nothing is changed.
    """

    def __init__(self, recorder: _HasConfigs) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Look for reentrant checkpoints before a training pass of `module`, and replace them."""
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if not any(config.balance_loss_weight > 0 for config in self.recorder.configs.values()):
            return
        reentrant: list[Any] = [
            m for m in _modules(module) if _is_reentrant(m.__dict__.get("_gradient_checkpointing_func"))
        ]
        if not reentrant or any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            return  # ZeRO-3 gathers parameters anew in the backward pass, which non-reentrant checkpoints refuse
        for m in reentrant:  # a partial's own keywords give way to the new one
            m._gradient_checkpointing_func = functools.partial(m._gradient_checkpointing_func, use_reentrant=False)
        logger.warning(
            "Gradient checkpointing was reentrant, which leaves the balance term without a gradient; it is "
            "non-reentrant now, "
            'with the same gradients. Pass gradient_checkpointing_kwargs={"use_reentrant": False} to ask for that '
            "yourself."
        )


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """As `module.modules()`, without the names, which take most of its time; a shared module may come twice."""
    stack: list[nn.Module | None] = [module]
    while stack:
        if (current := stack.pop()) is not None:
            yield current
            stack += current._modules.values()


def _is_reentrant(function: Any) -> bool:
    """Whether a module's checkpointing function is reentrant and can be told not to be."""
    is_partial = isinstance(function, functools.partial)
    keywords = function.keywords if is_partial else {}
    known = getattr(function.func if is_partial else function, "__module__", None) in CHECKPOINT_MODULES
    if not known and "use_reentrant" not in keywords:
        return False
    return keywords.get("use_reentrant") is not False  # torch's default is True, with a warning


def passes_gradient(x: Tensor, output: Tensor) -> bool:
    """Whether the gradient of a layer's output reaches its input.

    Args:
        x: the layer's input, which requires a gradient.
        output: what the layer made of it.

    Returns:
        False if `output` has no graph, the graph has an operator for which torch knows no gradient (it would pass on
        none, with a warning only), or the graph does not lead to `x`.
    """
    if not output.requires_grad:
        return False
    target = torch.autograd.graph.get_gradient_edge(x).node
    seen, nodes = set(), [torch.autograd.graph.get_gradient_edge(output).node]
    reached = False
    while nodes:
        node = nodes.pop()
        if node is target:
            reached = True
        elif node not in seen:
            if "NotImplemented" in node.name():
                return False
            seen.add(node)
            nodes += [following for following, _ in node.next_functions if following is not None]
        if len(seen) > 1000:
            return True  # more than a linear layer: not judged
    return reached
