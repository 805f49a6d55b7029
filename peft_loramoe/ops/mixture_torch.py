"""The mixture's arithmetic in torch: three small matrix products each way, on any device.

One LoRA of rank E*r whose rank channels are gated in blocks of r. Tokens are rows, T of them; C = E*r.

`forward` and `backward` keep little for the backward pass, and that is what counts for a large input. For a small one,
dispatching operations counts: `mixture_of_small` leaves the gradient to autograd, whose C++ takes less time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .router import project, router_probabilities, select_gates, select_gates_backward, softmax_backward


# Rank channels up to which `_grad_B` takes the other form: 1.4 times as fast at C = 24, 0.8 times at 256 (two cores,
# bfloat16).
NARROW_RANK = 64
# Products with narrow matrices of a multiple of as many rows are up to twice as fast on a CPU (32 rows against 24).
CPU_ROW_MULTIPLE = 16
# Up to so many tokens, or entries of x and the output together, an input is small: `mixture_of_small` takes 0.75 (one
# token) to 0.9 of the other way's time (two cores, 576 -> 1536, bfloat16), and keeps up to eight bytes more for each
# entry of x and each rank channel.
SMALL_TOKENS = 16
SMALL_ENTRIES = 2**17
# Entries of A and B up to which `mixture_of_small` casts them. It keeps the copies, and was slower than the other way
# from about 2**20 entries on.
SMALL_WEIGHTS = 2**18


class MixtureOptions(NamedTuple):
    """Scaling, routing and dropout of a layer.

    Attributes:
        experts: router outputs that have parameters, ascending; the others are null experts.
        scaling: factor on the experts' sum (lora_alpha / r).
        temperature: the router's logits are divided by it.
        dropout: probability of dropping an entry of the experts' input; has no effect where no mask is given. All
            experts see the same dropped input, the router the full one.
        top_k: router outputs that each token uses; None for all.
        router_dtype: dtype of the router's logits.
        balance_detach: the gradient of the returned probabilities reaches the router, but not x.
    """

    experts: tuple[int, ...]
    scaling: float = 1.0
    temperature: float = 1.0
    dropout: float = 0.0
    top_k: int | None = None
    router_dtype: torch.dtype = torch.float32
    balance_detach: bool = False

    def factor(self, keep: Tensor | None) -> float:
        """The factor on the experts' sum, with what makes up for dropped entries where there is a mask."""
        return self.scaling if keep is None else self.scaling / (1 - drop_probability(self.dropout))


class Inputs(NamedTuple):
    """The tensors that a mixture is computed from.

    Attributes:
        x: shape (T, in_features).
        A: shape (C, in_features).
        B: shape (out_features, C).
        router: shape (N, in_features).
        keep: dropout's mask, or None.
        base: output of the base layer, shape (T, out_features), to which the mixture is added, out of place; or None.
        weight: weight of the base layer, where it is computed here, shape (out_features, in_features); or None.
        bias: its bias, or None.
    """

    x: Tensor
    A: Tensor
    B: Tensor
    router: Tensor
    keep: Tensor | None
    base: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def saved(self, probabilities: Tensor, hidden: Tensor) -> "Saved":
        """What the backward pass needs, with what `forward` returned."""
        return Saved(self.x, self.A, self.B, self.router, self.keep, self.weight, probabilities, hidden)


class Saved(NamedTuple):
    """What the backward pass reads: inputs as in `Inputs`, probabilities and hidden as `forward` returns them."""

    x: Tensor
    A: Tensor
    B: Tensor
    router: Tensor
    keep: Tensor | None
    weight: Tensor | None
    probabilities: Tensor
    hidden: Tensor


def drop_probability(dropout: float) -> float:
    """The probability with which masks drop an entry.

    That asked for, in (0, 1), rounded to 16 binary digits, never 0 or 1.
    """
    return min(max(round(dropout * 2**16), 1), 2**16 - 1) / 2**16


def dropout_mask(x: Tensor, dropout: float) -> Tensor:
    """What dropout keeps of x, shape of x, boolean."""
    # Four entries from each 64 random bits: on a CPU three times as fast as a random float for each, as in torch.rand.
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    return words.view(torch.int16)[: x.numel()].view(x.shape) >= int(drop_probability(dropout) * 2**16) - 2**15


def forward(inputs: Inputs, options: MixtureOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities and what the backward pass needs besides its inputs.

    Returns:
        Output, shape (T, out_features), dtype of `base` or else of x; probabilities, shape (T, N), float32 or float64;
        hidden, shape (T, C), dtype of x.
    """
    x, A, B, router, keep, base, weight, bias = inputs
    dtype = x.dtype
    hidden, logits = _project(x, A, router, keep, options)
    probabilities = router_probabilities(logits, options.temperature)
    gated = hidden * _channel_gates(probabilities, hidden, keep, options)
    expand = _cast(B, dtype).t()
    if weight is not None:
        output = F.linear(x, weight, bias).addmm_(gated, expand)
    elif base is None:
        output = gated @ expand
    elif base.dtype == dtype:
        output = torch.addmm(base, gated, expand)
    else:
        output = (gated @ expand).to(base.dtype) + base  # in this order: contiguous whatever the base layer returned
    return output, probabilities, hidden


def is_small(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether `mixture_of_small` is to compute the mixture; shapes as in `Inputs`.

    Compiled, it never is: the limit would be one more graph, or an error where the number of tokens depends on data.
    """
    if torch.compiler.is_compiling():
        return False
    tokens, in_features = x.shape
    if tokens > SMALL_TOKENS and tokens * (in_features + B.shape[0]) > SMALL_ENTRIES:
        return False
    return A.dtype == _dtype_of_small(x, A) or A.numel() + B.numel() <= SMALL_WEIGHTS


def mixture_of_small(inputs: Inputs, options: MixtureOptions) -> tuple[Tensor, Tensor]:
    """Output and probabilities, as of `forward`, in as few operations as can be, differentiated by autograd.

    Weights are cast to no narrower dtype: casting a small x costs less.
    """
    x, A, B, router, keep, base, weight, bias = inputs
    dtype = _dtype_of_small(x, A)
    cast = _cast(x, dtype)
    hidden = F.linear(_drop(cast, keep), _cast(A, dtype))
    logits_dtype = _logits_dtype(x, options)
    read, router = _cast(cast, logits_dtype), _cast(router, logits_dtype)
    probabilities = router_probabilities(F.linear(read, router), options.temperature)
    gates = select_gates(probabilities, options.experts, options.top_k)
    blocks = hidden.view(*gates.shape, hidden.shape[1] // gates.shape[1])
    gated = _cast((blocks * gates.unsqueeze(-1)).view(hidden.shape), dtype)
    if options.balance_detach and torch.is_grad_enabled():  # the gradient of these reaches the router only
        probabilities = router_probabilities(F.linear(read.detach(), router), options.temperature)

    B, factor = _cast(B, dtype), options.factor(keep)
    if weight is not None:
        output = F.linear(x, weight, bias)
        if output.dtype == dtype:
            return output.addmm_(gated, B.t(), alpha=factor), probabilities
        return output.add_(F.linear(gated, B), alpha=factor), probabilities
    if base is None:
        return _cast(F.linear(gated, B) * factor, x.dtype), probabilities
    if base.dtype == dtype:
        return torch.addmm(base, gated, B.t(), alpha=factor), probabilities
    output = torch.add(base.contiguous(), F.linear(gated, B), alpha=factor)
    return _cast(output, base.dtype), probabilities


def backward(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    saved: Saved,
    options: MixtureOptions,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A, B and the router; None for those that `needs` (in this order) says are not wanted.

    `grad_output` has the shape of the output, `grad_probabilities` that of the probabilities (None: nobody used them).
    """
    x, A, B, router, keep, weight, probabilities, hidden = saved
    dtype = x.dtype
    needs_x, needs_A, needs_B, needs_router = needs
    grad_output = _cast(grad_output, dtype)
    gates = _channel_gates(probabilities, hidden, keep, options)
    grad_gated = grad_output @ _cast(B, dtype)
    grad_B = _grad_B(grad_output, hidden * gates) if needs_B else None
    if not (needs_x or needs_A or needs_router):
        return None, None, None if grad_B is None else _cast(grad_B, B.dtype), None

    grad_hidden = grad_gated * gates
    num_experts = len(options.experts)
    by_expert = (grad_gated * hidden).view(x.shape[0], num_experts, hidden.shape[1] // num_experts)
    grad_gates = by_expert.sum(-1, dtype=probabilities.dtype) * options.factor(keep)
    grad_selected = select_gates_backward(grad_gates, probabilities, options.experts, options.top_k)
    grad_all = grad_selected if grad_probabilities is None else grad_selected + grad_probabilities
    to_router = _cast(softmax_backward(grad_all, probabilities, options.temperature), dtype)
    to_x = to_router
    if options.balance_detach and grad_probabilities is not None:
        to_x = _cast(softmax_backward(grad_selected, probabilities, options.temperature), dtype)

    grad_x = grad_A = grad_router = None
    if keep is None and to_x is to_router and all(needs):  # the usual case: experts and router read the same x
        to_both, both = torch.cat([grad_hidden, to_x], 1), torch.cat([_cast(A, dtype), _cast(router, dtype)])
        grad_x = to_both @ both if weight is None else (grad_output @ weight).addmm_(to_both, both)
        rows = (to_both.t() @ x).split([len(A), len(router)])
        grad_A, grad_router = (grad.to(tensor.dtype, copy=True) for grad, tensor in zip(rows, (A, router)))
    else:
        if needs_x:
            through_router = (to_x, _cast(router, dtype))
            grad_x = torch.mm(*through_router) if weight is None else (grad_output @ weight).addmm_(*through_router)
            if keep is None:
                grad_x.addmm_(grad_hidden, _cast(A, dtype))
            else:
                grad_x.add_(_drop(grad_hidden @ _cast(A, dtype), keep))
        if needs_A:
            grad_A = grad_hidden.t() @ _drop(x, keep)
        if needs_router:
            grad_router = to_router.t() @ x
    return (
        _cast_gradient(grad_x, x),
        _cast_gradient(grad_A, A),
        _cast_gradient(grad_B, B),
        _cast_gradient(grad_router, router),
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a cast that does nothing still takes a microsecond


def _cast_gradient(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if gradient is None else _cast(gradient, parameter.dtype)


def _dtype_of_small(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype in which `mixture_of_small` computes."""
    dtype = x.dtype if x.dtype == A.dtype else torch.promote_types(x.dtype, A.dtype)
    if x.is_cpu and dtype.itemsize < 4:  # where products of few rows of float32 are faster, up to five times
        return torch.float32
    return dtype


def _drop(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.view(torch.int8)  # on a CPU four times as fast as by a boolean


def _logits_dtype(x: Tensor, options: MixtureOptions) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else options.router_dtype


def _project(
    x: Tensor, A: Tensor, router: Tensor, keep: Tensor | None, options: MixtureOptions
) -> tuple[Tensor, Tensor]:
    """The rank channels, in the dtype of x, and the logits: one product if both are of the same x and dtype."""
    dtype = _logits_dtype(x, options)
    together = keep is None and x.dtype == dtype
    rows = [_cast(A, x.dtype), _cast(router, dtype)] if together else [_cast(A, x.dtype)]
    if x.is_cpu and (missing := -sum(map(len, rows)) % CPU_ROW_MULTIPLE):
        rows.append(A.new_zeros(missing, A.shape[1], dtype=x.dtype))
    channels = _drop(x, keep) @ (torch.cat(rows) if len(rows) > 1 else rows[0]).t()
    logits = channels[:, len(A) : len(A) + len(router)] if together else project(x, router, dtype)
    return channels[:, : len(A)].contiguous(), logits


def _grad_B(grad_output: Tensor, gated: Tensor) -> Tensor:
    if gated.shape[1] <= NARROW_RANK and gated.dtype.itemsize == 2:
        return (gated.t() @ grad_output).t().contiguous()
    return grad_output.t() @ gated


def _channel_gates(probabilities: Tensor, hidden: Tensor, keep: Tensor | None, options: MixtureOptions) -> Tensor:
    """The factor on each rank channel, its expert's gate included: shape and dtype of `hidden`, (T, C)."""
    gates = (select_gates(probabilities, options.experts, options.top_k) * options.factor(keep)).to(hidden.dtype)
    # Copied out: a product of whole rows is on a CPU three times as fast as one that broadcasts over r columns.
    return gates.unsqueeze(-1).expand(-1, -1, hidden.shape[1] // gates.shape[1]).reshape(hidden.shape)
