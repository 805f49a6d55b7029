"""The mixture's arithmetic in Triton, for CUDA devices: the same three functions as `mixture_torch`, with the same
meaning.

Forward, two launches: `project` reads x once, `expand` writes the output. Backward, three: `gate_backward` reads the
gradient of the output, `input_gradient` writes that of x, and `input_weight_gradients` reads x once more; partial sums
over tokens are added in a fixed order, so results do not change from run to run. The gradient of B is a product of
cuBLAS, which takes a ninth of the time that a kernel here took. So is the base layer's, on top of what `expand` and
`input_gradient` wrote (beta = 1): an output is written once.

Dropout's mask is an int32 tensor of shape (T, ceil(in_features / 32)): bit b of word w tells whether column 32 * w + b
is kept.

Block sizes are rules, not searches, found on an H200. Every kernel is bound by the one large tensor that it reads or
writes, so a block is as tall as leaves a program for each multiprocessor, and in flight as often as shared memory
allows. There is nothing to search again for every number of tokens, and nothing that differs between processes.

With few tokens the time goes into launches. So nothing is launched that a kernel can do on the way, and the launching
code does without Triton's own helpers: `triton.cdiv` takes as long as a small operation of torch.
"""

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_kernels as kernels
from .mixture_torch import Inputs, MixtureOptions, Saved, drop_probability
from .router import mm_has_out_dtype, select_gates, select_gates_backward, softmax_backward


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_CHANNELS, MAX_ROUTER_OUTPUTS = 128, 64
# Where they were found faster than torch: an H200; an H100 has the same capability. Elsewhere, from 8.0 on (bfloat16
# and TF32), they run only if they are asked for.
MEASURED_CAPABILITY = (9, 0)
ASKED_FOR = os.environ.get("PEFT_LORAMOE_TRITON") == "1"
# Up to here, blocks of tokens are so few that the columns of x are split among programs too; `expand_partials` adds
# the sums.
FEW_TOKENS = 64
# Programs that keep the large GPUs busy (132 multiprocessors in an H100 or H200).
PROGRAMS = 128
# Up to here one program sums over all tokens, and writes a gradient without partial sums.
TOKENS_AT_A_TIME = 1024
# Bytes of shared memory that are left to the compiler; 227 KiB are there in an H100 or H200.
RESERVED_SHARED_MEMORY = 27 * 1024


def supports(x: Tensor, A: Tensor, B: Tensor, router: Tensor, options: MixtureOptions) -> bool:
    """Whether the kernels can compute this mixture, forward and backward; depends on device, dtypes, shapes and
    options only.

    Arguments as in `mixture_torch.forward`.
    """
    return (
        _can_run(x.device)
        and x.dtype in DTYPES
        and A.dtype in DTYPES
        and B.dtype in DTYPES
        and router.dtype in DTYPES
        and options.router_dtype == torch.float32
        and 0 < A.shape[0] <= MAX_CHANNELS
        and router.shape[0] <= MAX_ROUTER_OUTPUTS
    )


@torch.compiler.assume_constant_result
def _can_run(device: torch.device) -> bool:
    if kernels.INTERPRETED.value:
        return device.type == "cpu"
    if device.type != "cuda":
        return False
    return _capability(device) >= (8, 0) if ASKED_FOR else _capability(device) == MEASURED_CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def dropout_mask(x: Tensor, dropout: float) -> Tensor:
    """What dropout keeps of x, as bits (see above), drawn with a seed from the device's generator."""
    seed = torch.randint(2**63 - 1, (1,), device=x.device)
    # The operator is for the compiler: its dispatch takes as long as ten kernels to launch.
    draw = _dropout_bits if torch.compiler.is_compiling() else _draw_bits
    return draw(seed, x.shape[0], x.shape[1], dropout)


def _draw_bits(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    keep = _empty_bits(seed, rows, columns, dropout)
    scale = 2**kernels.DIGITS.value
    threshold = int((1 - drop_probability(dropout)) * scale)
    _launch(kernels.dropout_bits, (_cdiv(keep.numel(), 256),), seed, keep, keep.numel(), threshold, BLOCK=256)
    return keep


def _empty_bits(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    return seed.new_empty(rows, (columns + 31) // 32, dtype=torch.int32)


# An operator, so that torch.compile need not look inside.
_dropout_bits = torch.library.custom_op("peft_loramoe::dropout_bits", _draw_bits, mutates_args=())
_dropout_bits.register_fake(_empty_bits)


def forward(inputs: Inputs, options: MixtureOptions) -> tuple[Tensor, Tensor, Tensor]:
    """See `mixture_torch.forward`."""
    x, A, B, router, keep, base, weight, bias = inputs
    A, B, router = A.contiguous(), B.contiguous(), router.contiguous()
    (tokens, in_features), out_features, (C, N) = x.shape, B.shape[0], (A.shape[0], router.shape[0])
    probabilities = x.new_empty(tokens, N, dtype=torch.float32)
    hidden = x.new_empty(tokens, C)
    few = tokens <= FEW_TOKENS
    if weight is not None and few:
        base = output = F.linear(x, weight, bias)
        bias = None
    else:
        output = (x if base is None else base).new_empty(tokens, out_features)
    if tokens == 0:
        return output, probabilities, hidden

    plain, factor = _are_probabilities(options), options.factor(keep)
    channels = _channels(C, options)
    sizes = _sizes(C, N)
    rows = _reading_rows(tokens)
    of_a_column = rows * x.itemsize + sizes["BLOCK_C"] * A.itemsize + sizes["BLOCK_N"] * router.itemsize
    widest = 128 if x.dtype == torch.bfloat16 else 64  # others are in float32 for the router's logits
    columns, stages = _pipeline(widest, of_a_column, x.device)
    span, splits, partials = in_features, 1, None
    if few and plain:
        span = _cdiv(in_features, min(32, _power_of_2(_cdiv(in_features, 256))))
        span = _cdiv(span, columns) * columns
        splits = _cdiv(in_features, span)
        partials = x.new_empty(splits, tokens, C + N, dtype=torch.float32)
    _launch(
        kernels.project,
        (_cdiv(tokens, rows), splits),
        *(
            x,
            keep,
            A,
            router,
            hidden,
            probabilities,
            partials,
            tokens,
            in_features,
            *x.stride(),
            span,
            options.temperature,
        ),
        **dict(sizes, BLOCK_T=rows, BLOCK_D=columns),
        num_warps=_warps(x, sizes["BLOCK_C"]),
        num_stages=stages,
    )
    base_stride = (0, 0) if base is None else base.stride()
    if partials is not None:
        _launch(
            kernels.expand_partials,
            (_cdiv(out_features, 64), _cdiv(tokens, rows)),
            *(
                partials,
                hidden,
                probabilities,
                B,
                base,
                bias,
                output,
                tokens,
                out_features,
                *base_stride,
                splits,
            ),
            *(factor, options.temperature),
            **dict(sizes, BLOCK_T=rows, BLOCK_O=64, **channels),
            num_warps=_warps(x, sizes["BLOCK_C"]),
        )
        return output, probabilities, hidden

    gates = probabilities if plain else select_gates(probabilities, options.experts, options.top_k).contiguous()
    rows, columns, warps = _output_block(tokens, sizes["BLOCK_C"])
    _launch(
        kernels.expand,
        (_cdiv(tokens, rows) * _cdiv(out_features, columns),),
        *(hidden, gates, B, base, bias, output, tokens, out_features, *base_stride, factor),
        **dict(C=C, N=gates.shape[1], BLOCK_T=rows, BLOCK_O=columns, BLOCK_C=sizes["BLOCK_C"], **channels),
        num_warps=warps,
    )
    if weight is not None and not few:
        output.addmm_(x, weight.t())
    return output, probabilities, hidden


def backward(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    saved: Saved,
    options: MixtureOptions,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `mixture_torch.backward`."""
    x, A, B, router, keep, weight, probabilities, hidden = saved
    needs_x, needs_A, needs_B, needs_router = needs
    if x.shape[0] == 0:
        none = [torch.zeros_like(t) if wanted else None for t, wanted in zip((x, A, B, router), needs)]
        return none[0], none[1], none[2], none[3]
    plain = _are_probabilities(options)
    gates = probabilities if plain else select_gates(probabilities, options.experts, options.top_k).contiguous()
    factor = options.factor(keep)
    grad_x = grad_A = grad_B = grad_router = None
    channels, gated, to_router, to_x = _gate_backward(
        grad_output,
        grad_probabilities,
        B.contiguous(),
        hidden,
        gates,
        None if plain else probabilities,
        factor,
        options,
        needs_B,
    )
    if gated is not None:
        grad_B = _output_weight_gradient(grad_output, gated, B.dtype)
    if needs_A or needs_router:
        grad_A, grad_router = _input_weight_gradients(
            x, keep, channels if needs_A else None, to_router if needs_router else None, A, router
        )
    if needs_x:
        grad_x = _input_gradient(channels, to_x, A.contiguous(), router.contiguous(), keep)
        if weight is not None:
            grad_x.addmm_(grad_output, weight)
    return grad_x, grad_A, grad_B, grad_router


def _gate_backward(
    grad_output: Tensor,
    grad_probabilities: Tensor | None,
    B: Tensor,
    hidden: Tensor,
    gates: Tensor,
    probabilities: Tensor | None,
    factor: float,
    options: MixtureOptions,
    needs_gated: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of the rank channels; the gated channels, if asked for; gradients of the logits, for the router and
    for x.

    `probabilities` is None where the gates are columns of them.
    """
    (tokens, C), N, out_features = hidden.shape, gates.shape[1], B.shape[0]
    plain = probabilities is None
    grad_hidden = torch.empty_like(hidden)
    gated = torch.empty_like(hidden) if needs_gated else None
    grad_gates = None if plain else torch.empty_like(gates)
    to_router = hidden.new_empty(gates.shape) if plain else None
    apart = plain and options.balance_detach and grad_probabilities is not None
    to_x = hidden.new_empty(gates.shape) if apart else None
    sizes = _sizes(C, N)
    rows = _reading_rows(tokens)
    of_a_column = rows * grad_output.itemsize + sizes["BLOCK_C"] * B.itemsize
    columns, stages = _pipeline(512 // hidden.itemsize, of_a_column, hidden.device)
    _launch(
        kernels.gate_backward,
        (_cdiv(tokens, rows),),
        *(
            grad_output,
            B,
            hidden,
            gates,
            grad_probabilities.contiguous() if plain and grad_probabilities is not None else None,
        ),
        *(
            grad_hidden,
            gated,
            grad_gates,
            to_router,
            to_x,
            tokens,
            out_features,
            *grad_output.stride(),
            factor,
            options.temperature,
        ),
        **dict(sizes, BLOCK_T=rows, BLOCK_O=columns, **_channels(C, options)),
        num_warps=_warps(hidden, sizes["BLOCK_C"]),
        num_stages=stages,
    )
    if grad_gates is None or probabilities is None:
        assert to_router is not None
        return grad_hidden, gated, to_router, to_router if to_x is None else to_x
    grad = select_gates_backward(grad_gates, probabilities, options.experts, options.top_k)
    total = grad if grad_probabilities is None else grad + grad_probabilities
    to_router = softmax_backward(total, probabilities, options.temperature).to(hidden.dtype)
    if not options.balance_detach or grad_probabilities is None:
        return grad_hidden, gated, to_router, to_router
    return grad_hidden, gated, to_router, softmax_backward(grad, probabilities, options.temperature).to(hidden.dtype)


def _input_gradient(grad_hidden: Tensor, to_x: Tensor, A: Tensor, router: Tensor, keep: Tensor | None) -> Tensor:
    (tokens, C), (N, in_features) = grad_hidden.shape, router.shape
    grad_x = grad_hidden.new_empty(tokens, in_features)
    sizes = _sizes(C, N)
    rows, columns, warps = _output_block(tokens, sizes["BLOCK_C"])
    _launch(
        kernels.input_gradient,
        (_cdiv(tokens, rows) * _cdiv(in_features, columns),),
        *(grad_hidden, to_x, A, router, keep, grad_x, tokens, in_features),
        **dict(sizes, BLOCK_T=rows, BLOCK_D=columns),
        num_warps=warps,
    )
    return grad_x


def _input_weight_gradients(
    x: Tensor, keep: Tensor | None, grad_hidden: Tensor | None, to_router: Tensor | None, A: Tensor, router: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    (tokens, in_features), C, N = x.shape, A.shape[0], router.shape[0]
    sizes = _sizes(C, N)
    rows, columns, splits, span = _token_splits(x, sizes["BLOCK_C"])
    partials = [
        None
        if gradient is None
        else weight.new_empty(weight.shape)
        if splits == 1
        else x.new_empty(splits, *weight.shape, dtype=torch.float32)
        for gradient, weight in ((grad_hidden, A), (to_router, router))
    ]
    of_a_row = (columns + sizes["BLOCK_C"] + sizes["BLOCK_N"]) * x.itemsize
    _launch(
        kernels.input_weight_gradients,
        (_cdiv(in_features, columns), splits),
        *(x, keep, grad_hidden, to_router, *partials, tokens, in_features, *x.stride(), span),
        **dict(sizes, BLOCK_T=rows, BLOCK_D=columns),
        num_warps=_warps(x, sizes["BLOCK_C"]),
        num_stages=max(2, min(4, _shared_memory(x.device) // 2 // (rows * of_a_row))),  # so that two programs fit
    )
    if splits > 1:
        partials = [p if p is None else p.sum(0).to(weight.dtype) for p, weight in zip(partials, (A, router))]
    return partials[0], partials[1]


def _output_weight_gradient(grad_output: Tensor, gated: Tensor, dtype: torch.dtype) -> Tensor:
    grad_output = grad_output if grad_output.dtype == gated.dtype else grad_output.to(gated.dtype)
    if dtype == torch.float32 and gated.dtype != dtype and gated.is_cuda and mm_has_out_dtype():
        return torch.mm(gated.t(), grad_output, out_dtype=dtype).t().contiguous()
    return (gated.t() @ grad_output).t().to(dtype).contiguous()


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):  # a tensor; Triton launches on the current device
        kernel[grid](*args, **constants)


def _are_probabilities(options: MixtureOptions) -> bool:
    """Whether the gates are columns of the probabilities next to each other, which the kernels find by themselves."""
    experts = options.experts
    return options.top_k is None and experts[-1] - experts[0] == len(experts) - 1


def _channels(num_channels: int, options: MixtureOptions) -> dict[str, int]:
    """Which channels belong to which column of the gates."""
    experts = options.experts
    return dict(R=num_channels // len(experts), FIRST=experts[0] if _are_probabilities(options) else 0)


@functools.cache
def _sizes(C: int, N: int) -> dict[str, int]:
    """Rank channels, router outputs, and the blocks that hold them: powers of two that tensor cores can multiply."""
    return dict(C=C, N=N, BLOCK_C=max(16, _power_of_2(C)), BLOCK_N=max(16, _power_of_2(N)))


@functools.lru_cache
def _reading_rows(tokens: int) -> int:
    """Tokens of the blocks of a large tensor that a program reads one after the other."""
    return max(16, min(64, _power_of_2(_cdiv(tokens, PROGRAMS))))


@functools.lru_cache
def _pipeline(columns: int, of_a_column: int, device: torch.device) -> tuple[int, int]:
    """Columns of such blocks, at most `columns`, and how many are in flight; one column takes `of_a_column` bytes.

    Three in flight are a third faster than two, and worth narrower blocks.
    """
    size = _shared_memory(device)
    while columns > 32 and 3 * columns * of_a_column > size:
        columns //= 2
    return columns, max(2, min(4, size // (columns * of_a_column)))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory for a program's blocks; where kernels are interpreted, as many as an H100 has."""
    if device.type != "cuda":
        return 227 * 1024 - RESERVED_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - RESERVED_SHARED_MEMORY


def _warps(tensor: Tensor, channels: int) -> int:
    return 4 if channels <= 32 and tensor.itemsize == 2 else 8


def _output_block(tokens: int, channels: int) -> tuple[int, int, int]:
    """Tokens, columns and warps of a program that writes one block of a large tensor."""
    return max(16, min(64, _power_of_2(tokens))), 128, 4 if channels <= 32 else 8


def _token_splits(tensor: Tensor, channels: int) -> tuple[int, int, int, int]:
    """Block of tokens, block of columns, number of programs among which the tokens are split, and tokens for each."""
    tokens, columns = tensor.shape
    block_t, block = 64, 128 if channels <= 32 and tensor.itemsize == 2 else 64
    splits = max(1, min(_cdiv(tokens, TOKENS_AT_A_TIME), 2 * PROGRAMS // _cdiv(columns, block)))
    span = _cdiv(_cdiv(tokens, splits), block_t) * block_t
    return block_t, block, _cdiv(tokens, span), span


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()
