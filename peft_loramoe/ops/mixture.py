"""The mixture as a single autograd node, and the choice of its backend.

Saved for the backward pass: x, the dropout mask, the rank channels and the probabilities. Everything else is
recomputed. Small inputs, where that saves nothing worth its time, are left to autograd.

torch.compile traces the torch backend and fuses it with its surroundings. The Triton kernels, and any backend under
torch 2.5, are compiled as one custom operator, `peft_loramoe::mixture`; so is a graph exported for training.

On an H100 or H200 the Triton kernels compute what they support. PEFT_LORAMOE_TRITON=1 turns them on for other CUDA
devices too, and 0 turns them off. They have been measured on an H200 only.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import mixture_torch
from .mixture_torch import Inputs, MixtureOptions, Saved


def find_kernels() -> ModuleType | None:
    """Return the module of the Triton kernels, or None: turned off, torch without CUDA, or no Triton that runs them.

    Raises:
        ValueError: PEFT_LORAMOE_TRITON is neither 0 nor 1.
        ImportError: the kernels are asked for, and Triton is missing or too old.
    """
    choice = os.environ.get("PEFT_LORAMOE_TRITON")
    if choice not in ("0", "1", None):
        raise ValueError(
            f"PEFT_LORAMOE_TRITON={choice!r} must be 1, for the Triton kernels on all CUDA devices that can run them, "
            "or 0, for none; unset, they run on H100 and H200."
        )
    if choice == "0" or torch.version.cuda is None:
        return None
    try:
        from . import mixture_triton  # Triton is optional
    except ImportError:
        if choice == "1":
            raise
        return None
    return mixture_triton


KERNELS = find_kernels()
# Whether torch.compile takes the torch implementation for an operator too: torch 2.5's inductor fails to fuse it.
COMPILE_AS_CUSTOM_OP = torch.__version__ < "2.6"


def select_backend(tensors: Inputs | Saved, options: MixtureOptions) -> ModuleType:
    """Return the module that computes a mixture, `mixture_torch` or the kernels."""
    x, A, B, router, keep, *_ = tensors
    if KERNELS is None or (keep is not None and keep.dtype == torch.bool):  # a mask is read by those who drew it
        return mixture_torch
    return KERNELS if KERNELS.supports(x, A, B, router, options) else mixture_torch


def mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    options: MixtureOptions,
    *,
    dropout: bool,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``base + scaling * sum_i gate_i(x) * B_i A_i drop(x)``; `ops.reference.mixture` has the formula.

    A and B are cast to the dtype of `x`, or to the autocast dtype (they are small, the activations are large); a small
    input is cast to the wider dtype of the two. The router's logits are accurate to their own dtype.

    The gradient has no gradient, except for small inputs: a second backward pass is refused, and so are the transforms
    of `torch.func`. With `weight`, `vmap` over A, B or router is refused for small inputs too.

    Args:
        x: shape (..., in_features).
        A: shape (E*r, in_features), expert i owns rows i*r to (i+1)*r.
        B: shape (out_features, E*r), the same columns.
        router: shape (N, in_features).
        options: scaling, routing and dropout of the layer.
        dropout: whether to drop entries of the experts' input.
        base: output of the base layer, shape (..., out_features); it is not written to.
        weight: weight of the base layer, shape (out_features, in_features), if it is to be computed here. It gets no
            gradient.
        bias: its bias.

    Returns:
        Output, shape (..., out_features), dtype of `base`, or else of `x` (or the autocast dtype); probabilities,
        shape (..., N), float32 or float64.

    Raises:
        RuntimeError: in the backward pass of the gradient (`create_graph=True`), unless `x` is small. Compiled with
            `backend="eager"`, which is for debugging, torch leaves second derivatives out without a word.
    """
    kind = x.device.type
    if _is_autocast(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    leading = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    base = None if base is None else base.reshape(-1, base.shape[-1])
    inputs = Inputs(x, A, B, router, None, base, weight, bias)
    backend = select_backend(inputs, options)
    if dropout and options.dropout > 0:
        inputs = inputs._replace(keep=backend.dropout_mask(x, options.dropout))
    if torch.compiler.is_compiling() and (
        COMPILE_AS_CUSTOM_OP or backend is not mixture_torch or _is_exporting_gradients()
    ):
        output, probabilities, _ = _mixture_op(*inputs, *options)
    elif backend is mixture_torch and mixture_torch.is_small(x, A, B):
        with _no_autocast(kind):
            output, probabilities = mixture_torch.mixture_of_small(inputs, options)
    elif torch.is_grad_enabled():  # not the custom operator, whose dispatch takes as long as ten kernels to launch
        output, probabilities, _ = _Mixture.apply(*inputs, options)
    else:
        with _no_autocast(kind):
            output, probabilities, _ = backend.forward(inputs, options)
    return output.view(*leading, output.shape[1]), probabilities.view(*leading, probabilities.shape[1])


def _forward(inputs: Inputs, options: MixtureOptions) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(inputs.x.device.type):
        return select_backend(inputs, options).forward(inputs, options)


def _backward(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    saved: Saved,
    options: MixtureOptions,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    with _no_autocast(saved.x.device.type):
        backend = select_backend(saved, options)
        return backend.backward(grad_output, grad_probabilities, saved, options, needs)


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else nullcontext()


def _is_exporting_gradients() -> bool:
    # An exported graph forgets the gradient of an autograd function, not that of an operator. torch 2.5, 2.6: not told
    # apart.
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting() and torch.is_grad_enabled()


def _is_autocast(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # autocast does not know meta tensors


# Custom operators take flat arguments; this is the only place where the options are taken apart.
# The schemas are written out because torch before 2.6 does not infer them from annotations like tuple[int, ...].
_OPTIONS = (
    "SymInt[] experts, float scaling, float temperature, float dropout, SymInt? top_k, ScalarType router_dtype, bool "
    "balance_detach"
)
_NUM_INPUTS = len(Inputs._fields)


def _unflattened(arguments: Sequence[Any]) -> tuple[Inputs, MixtureOptions]:
    return Inputs(*arguments[:_NUM_INPUTS]), MixtureOptions(*arguments[_NUM_INPUTS:])


def _flat_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(*_unflattened(arguments))


def _flat_backward(grad_output: Tensor, grad_probabilities: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    saved = Saved(*arguments[: len(Saved._fields)])
    *options, needs = arguments[len(Saved._fields) :]
    gradients = _backward(grad_output, grad_probabilities, saved, MixtureOptions(*options), needs)
    return tuple(saved.x.new_empty(0) if gradient is None else gradient for gradient in gradients)


_mixture_op = torch.library.custom_op(
    "peft_loramoe::mixture",
    _flat_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor router, Tensor? keep, Tensor? base, Tensor? weight, Tensor? bias, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
_mixture_backward_op = torch.library.custom_op(
    "peft_loramoe::mixture_backward",
    _flat_backward,
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_probabilities, Tensor x, Tensor A, Tensor B, Tensor router, "
    f"Tensor? keep, Tensor? weight, Tensor probabilities, Tensor hidden, {_OPTIONS}, bool[] needs) -> (Tensor, "
    "Tensor, Tensor, Tensor)",
)


@_mixture_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (x, A, B, router, _, base, *_), options = _unflattened(arguments)
    tokens = x.shape[0]
    precision = torch.promote_types(torch.promote_types(options.router_dtype, torch.float32), x.dtype)
    output = (x if base is None else base).new_empty(tokens, B.shape[0])
    return output, x.new_empty(tokens, router.shape[0], dtype=precision), x.new_empty(tokens, A.shape[0])


@_mixture_backward_op.register_fake
def _(
    grad_output: Tensor, grad_probabilities: Any, x: Tensor, A: Tensor, B: Tensor, router: Tensor, *rest: Any
) -> tuple[Any, ...]:
    needs = rest[-1]
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip((x, A, B, router), needs))


def _save(ctx: Any, inputs: Inputs, options: MixtureOptions, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, probabilities, hidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(*inputs.saved(probabilities, hidden))
    ctx.options = options


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_probabilities: Tensor | None, backward: Callable[..., Any]
) -> tuple[list[Any], Tensor | None]:
    """Gradients of x, A, B and router, and of the base layer's output."""
    saved = Saved(*ctx.saved_tensors)
    needs = list(ctx.needs_input_grad[:4])
    grad_base = grad_output if ctx.needs_input_grad[5] else None
    if grad_output is None:  # only the probabilities were used
        saved = saved._replace(weight=None)  # the base layer's weight has no part in them
        grad_output = saved.x.new_zeros(()).expand(saved.x.shape[0], saved.B.shape[0])
        needs = [needs[0] and not ctx.options.balance_detach, False, False, needs[3]]
    gradients = backward(grad_output, grad_probabilities, saved, ctx.options, needs)
    return [gradient if needed else None for gradient, needed in zip(gradients, needs)], grad_base


def _backward_by_op(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    saved: Saved,
    options: MixtureOptions,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _mixture_backward_op(grad_output, grad_probabilities, *saved, *options, needs)


class _Mixture(torch.autograd.Function):
    """The mixture without the custom operator's dispatch, open to torch.compile."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # No `setup_context` of its own: torch would inspect the signature at every call.
        *tensors, options = inputs
        tensors = Inputs(*tensors)
        output = _forward(tensors, options)
        _save(ctx, tensors, options, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_probabilities: Tensor | None, _: None) -> tuple[Any, ...]:
        # With grad mode on, the gradient is about to be differentiated, which the operator refuses (so does
        # AOTAutograd).
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gradients, grad_base = _differentiate(
            ctx, grad_output, grad_probabilities, _backward_by_op if twice else _backward
        )
        return (*gradients, None, grad_base, None, None, None)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, *_unflattened(inputs), output)


def _differentiate_op(
    ctx: Any, grad_output: Tensor | None, grad_probabilities: Tensor | None, _: None
) -> tuple[Any, ...]:
    gradients, grad_base = _differentiate(ctx, grad_output, grad_probabilities, _backward_by_op)
    return (*gradients, None, grad_base, *[None] * (2 + len(MixtureOptions._fields)))


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "The gradient of a LoRAMoE mixture was differentiated once more (create_graph=True), which it does not "
        "support. Take second derivatives through ops.reference.mixture, or leave the adapted layers out with "
        "disable_adapter()."
    )


_mixture_op.register_autograd(_differentiate_op, setup_context=_setup_op_context)
_mixture_backward_op.register_autograd(_refuse)
