"""The mixture as one node of autograd's graph, with a gradient of its own; the one place that picks an implementation.

torch.compile looks into the torch implementation and fuses it with what is around it. It takes the Triton kernels, and with
torch 2.5 everything, for one operator, `peft_loramoe::mixture`; so does torch.export where the graph is to be differentiated.

What it saves for the backward pass: x, dropout's mask, the rank channels and the probabilities. The rest is computed anew.

PEFT_LORAMOE_TRITON=1 in the environment, read at import, turns on the Triton kernels, on CUDA devices where they can be used.
They have not run on a GPU yet, so that is not the default. Everything else is computed by `mixture_torch`.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import mixture_torch
from .mixture_torch import Options


def _find_kernels() -> ModuleType | None:
    if (choice := os.environ.get("PEFT_LORAMOE_TRITON", "0")) not in ("0", "1"):
        raise ValueError(f"PEFT_LORAMOE_TRITON={choice!r} must be 1, for the Triton kernels on CUDA devices, or 0.")
    if choice == "0" or torch.version.cuda is None:
        return None
    from . import mixture_triton  # Triton is optional

    return mixture_triton


KERNELS = _find_kernels()
# Whether torch.compile takes the torch implementation for an operator too: torch 2.5's inductor fails to fuse it.
OPAQUE = torch.__version__ < "2.6"


def _implementation(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    keep: Tensor | None,
    options: Options,
) -> ModuleType:
    if KERNELS is None or (keep is not None and keep.dtype == torch.bool):  # a mask is read by those who drew it
        return mixture_torch
    return KERNELS if KERNELS.supports(x, A, B, router, options) else mixture_torch


def mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    options: Options,
    *,
    dropout: bool,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``base + scaling * sum_i gate_i(x) * B_i A_i drop(x)``; `ops.reference.mixture` has the formula.

    A and B are cast to the dtype of `x`, or to the autocast dtype (they are small, the activations are large); the router's
    logits are accurate to their own dtype. The gradient has no gradient: a second backward pass is refused, and so are the
    transforms of `torch.func`.

    Args:
        x: shape (..., in_features).
        A: shape (E*r, in_features), expert i owns rows i*r to (i+1)*r.
        B: shape (out_features, E*r), the same columns.
        router: shape (N, in_features).
        options: what is fixed for the layer.
        dropout: whether to drop entries of the experts' input.
        base: output of the base layer, shape (..., out_features); it is not written to.
        weight: weight of the base layer, shape (out_features, in_features), if it is to be computed here. It gets no gradient.
        bias: its bias.

    Returns:
        Output, shape (..., out_features), dtype of `base`, or else of `x` (or the autocast dtype); probabilities, shape
        (..., N), float32 or float64.

    Raises:
        RuntimeError: in the backward pass of the gradient (`create_graph=True`). Compiled with `backend="eager"`, which is for
            debugging, torch leaves second derivatives out without a word.
    """
    kind = x.device.type
    if _is_autocast(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    leading = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    base = None if base is None else base.reshape(-1, base.shape[-1])
    implementation = _implementation(x, A, B, router, None, options)
    keep = implementation.dropout_mask(x, options.dropout) if dropout and options.dropout > 0 else None
    inputs = (x, A, B, router, keep, base, weight, bias)
    if torch.compiler.is_compiling() and (OPAQUE or implementation is not mixture_torch or _is_exporting_gradients()):
        output, probabilities, _ = _mixture(*inputs, *options)
    elif torch.is_grad_enabled():  # not the operator, which by itself takes as long as ten kernels to launch
        output, probabilities, _ = _Mixture.apply(*inputs, *options)
    else:
        with _no_autocast(kind):
            output, probabilities, _ = implementation.forward(*inputs, options)
    return output.view(*leading, output.shape[1]), probabilities.view(*leading, probabilities.shape[1])


def _forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    keep: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    temperature: float,
    dropout: float,
    experts: list[int],
    top_k: int | None,
    router_dtype: torch.dtype,
    balance_detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(scaling, temperature, dropout, experts, top_k, router_dtype, balance_detach)
    with _no_autocast(x.device.type):
        implementation = _implementation(x, A, B, router, keep, options)
        output, probabilities, hidden = implementation.forward(x, A, B, router, keep, base, weight, bias, options)
        return output, probabilities, hidden.to(x.dtype)  # the dtype in which it is saved


def _backward(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    keep: Tensor | None,
    weight: Tensor | None,
    probabilities: Tensor,
    hidden: Tensor,
    scaling: float,
    temperature: float,
    dropout: float,
    experts: list[int],
    top_k: int | None,
    router_dtype: torch.dtype,
    balance_detach: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(scaling, temperature, dropout, experts, top_k, router_dtype, balance_detach)
    with _no_autocast(x.device.type):
        gradients = _implementation(x, A, B, router, keep, options).backward(
            grad_output, grad_probabilities, x, A, B, router, keep, weight, probabilities, hidden, options, needs
        )
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _no_autocast(kind: str) -> AbstractContextManager:
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else nullcontext()


def _is_exporting_gradients() -> bool:
    # An exported graph forgets the gradient of an autograd function, not that of an operator. torch 2.5, 2.6: not told apart.
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting() and torch.is_grad_enabled()


def _is_autocast(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # autocast does not know meta tensors


# Schemas written out: torch before 2.6 does not infer them from annotations like list[int].
_OPTIONS = (
    "float scaling, float temperature, float dropout, SymInt[] experts, SymInt? top_k, ScalarType router_dtype, "
    "bool balance_detach"
)
_mixture = torch.library.custom_op(
    "peft_loramoe::mixture",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor router, Tensor? keep, Tensor? base, Tensor? weight, Tensor? bias, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
_mixture_backward = torch.library.custom_op(
    "peft_loramoe::mixture_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_probabilities, Tensor x, Tensor A, Tensor B, Tensor router, Tensor? keep, "
    f"Tensor? weight, Tensor probabilities, Tensor hidden, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_mixture.register_fake
def _(
    x: Tensor, A: Tensor, B: Tensor, router: Tensor, keep: Any, base: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    router_dtype = _[-2]
    tokens = x.shape[0]
    precision = torch.promote_types(torch.promote_types(router_dtype, torch.float32), x.dtype)
    output = (x if base is None else base).new_empty(tokens, B.shape[0])
    return output, x.new_empty(tokens, router.shape[0], dtype=precision), x.new_empty(tokens, A.shape[0])


@_mixture_backward.register_fake
def _(grad_output: Tensor, grad_probabilities: Any, x: Tensor, A: Tensor, B: Tensor, router: Tensor, *rest: Any) -> tuple:
    needs = rest[-1]
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip((x, A, B, router), needs))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, A, B, router, keep, _base, weight, _bias, *options = inputs
    _, probabilities, hidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, A, B, router, keep, weight, probabilities, hidden)
    ctx.options = options


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_probabilities: Tensor | None, _: None, backward: Any = _mixture_backward
) -> tuple:
    x, _, B, *_ = saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grad_base = grad_output if ctx.needs_input_grad[5] else None
    if grad_output is None:  # only the probabilities were used
        saved = (*saved[:5], None, *saved[6:])  # the base layer's weight has no part in them
        grad_output = x.new_zeros(()).expand(x.shape[0], B.shape[0])
        needs = [needs[0] and not Options(*ctx.options).balance_detach, False, False, needs[3]]
    gradients = backward(grad_output, grad_probabilities, *saved, *ctx.options, needs)
    gradients = [gradient if needed else None for gradient, needed in zip(gradients, needs)]
    return (*gradients, None, grad_base, *[None] * (2 + len(ctx.options)))


class _Mixture(torch.autograd.Function):
    """The operator without its dispatch, and open to torch.compile."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Without a `setup_context` of its own, which would have torch inspect the signature at every call.
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        # In grad mode somebody wants to differentiate the gradient, which the operator refuses (as AOTAutograd does itself).
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return _differentiate(ctx, *gradients, backward=_mixture_backward if again else _backward)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "The gradient of a LoRAMoE mixture was differentiated once more (create_graph=True), which it does not support. Take "
        "second derivatives through ops.reference.mixture, or leave the adapted layers out with disable_adapter()."
    )


_mixture.register_autograd(_differentiate, setup_context=_setup_context)
_mixture_backward.register_autograd(_refuse)
