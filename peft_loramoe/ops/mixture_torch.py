"""The mixture's arithmetic in torch: three small matrix products each way, on any device.

One LoRA of rank E*r whose rank channels are gated in blocks of r. Tokens are rows, T of them; C = E*r; `keep` is dropout's mask.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import router_logits, router_probabilities, select_gates, select_gates_backward, softmax_backward


class Options(NamedTuple):
    """What is fixed for a layer; see `LoRAExperts`.

    Attributes:
        scaling: factor on the experts' sum.
        temperature: router temperature.
        dropout: probability of dropping an entry of the experts' input; without effect where no mask is given.
        experts: router outputs that have parameters.
        top_k: router outputs that each token uses; None for all.
        router_dtype: dtype of the logits.
        balance_detach: the gradient of the probabilities does not reach x.
    """

    scaling: float
    temperature: float
    dropout: float
    experts: list[int]
    top_k: int | None
    router_dtype: torch.dtype
    balance_detach: bool


def dropout_mask(x: Tensor, dropout: float) -> Tensor:
    """What dropout keeps of x, shape of x, boolean."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    keep: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities and what the backward pass needs besides its inputs.

    Args:
        x: shape (T, in_features).
        A: shape (C, in_features).
        B: shape (out_features, C).
        router: shape (N, in_features).
        keep: dropout's mask, or None.
        base: output of the base layer, shape (T, out_features), to which the mixture is added, out of place; or None.
        weight: weight of the base layer, where it is computed here, shape (out_features, in_features); or None.
        bias: its bias, or None.
        options: what is fixed for the layer.

    Returns:
        Output, shape (T, out_features), dtype of `base` or else of x; probabilities, shape (T, N), float32 or float64; hidden,
        shape (T, C), dtype of x.
    """
    dtype = x.dtype
    probabilities = router_probabilities(router_logits(x, router, _logits_dtype(x, options)), options.temperature)
    hidden = (x if keep is None else x * keep) @ A.to(dtype).t()
    gated = _gate(hidden, _gates(probabilities, keep, options))
    expand = B.to(dtype).t()
    if weight is not None:
        output = F.linear(x, weight, bias).addmm_(gated, expand)
    elif base is None:
        output = gated @ expand
    elif base.dtype == dtype:
        output = torch.addmm(base, gated, expand)
    else:
        output = base + (gated @ expand).to(base.dtype)
    return output, probabilities, hidden


def backward(
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
    options: Options,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A, B and the router; None for those that `needs` (in this order) says are not wanted.

    `grad_output` has the shape of the output, `grad_probabilities` that of the probabilities (None: nobody used them).
    """
    dtype = x.dtype
    needs_x, needs_A, needs_B, needs_router = needs
    grad_output = grad_output.to(dtype)
    gates = _gates(probabilities, keep, options)
    grad_gated = grad_output @ B.to(dtype)
    grad_B = (grad_output.t() @ _gate(hidden, gates)).to(B.dtype) if needs_B else None
    if not (needs_x or needs_A or needs_router):
        return None, None, grad_B, None

    grad_hidden = _gate(grad_gated, gates)
    grad_gates = _by_expert(grad_gated * hidden, gates).sum(-1, dtype=probabilities.dtype)
    grad_gates = grad_gates * _factor(keep, options)
    grad_selected = select_gates_backward(grad_gates, probabilities, options.experts, options.top_k)
    grad_all = grad_selected if grad_probabilities is None else grad_selected + grad_probabilities
    to_router = softmax_backward(grad_all, probabilities, options.temperature).to(dtype)
    to_x = to_router
    if options.balance_detach and grad_probabilities is not None:
        to_x = softmax_backward(grad_selected, probabilities, options.temperature).to(dtype)

    grad_x = grad_A = grad_router = None
    if needs_x:
        through_experts = grad_hidden @ A.to(dtype)
        grad_x = through_experts if keep is None else through_experts.mul_(keep)
        grad_x.addmm_(to_x, router.to(dtype))
        if weight is not None:
            grad_x = torch.addmm(grad_x, grad_output, weight)
    if needs_A:
        grad_A = (grad_hidden.t() @ (x if keep is None else x * keep)).to(A.dtype)
    if needs_router:
        grad_router = (to_router.t() @ x).to(router.dtype)
    return grad_x, grad_A, grad_B, grad_router


def _logits_dtype(x: Tensor, options: Options) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else options.router_dtype


def _factor(keep: Tensor | None, options: Options) -> float:
    """Scaling of the sum, with what makes up for dropped entries."""
    return options.scaling if keep is None else options.scaling / (1 - options.dropout)


def _gates(probabilities: Tensor, keep: Tensor | None, options: Options) -> Tensor:
    return select_gates(probabilities, options.experts, options.top_k) * _factor(keep, options)


def _gate(channels: Tensor, gates: Tensor) -> Tensor:
    """Multiply the rank channels of each expert, columns of a (T, C) tensor, by its gate, shape (T, E)."""
    return (_by_expert(channels, gates) * gates.to(channels.dtype).unsqueeze(-1)).view_as(channels)


def _by_expert(channels: Tensor, gates: Tensor) -> Tensor:
    tokens, num_experts = gates.shape
    return channels.view(tokens, num_experts, channels.shape[1] // num_experts)
