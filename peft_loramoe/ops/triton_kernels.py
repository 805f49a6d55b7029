"""Triton kernels of the mixture; `mixture_triton` launches them and says what they are for.

Tokens are rows, T of them; C rank channels, N router outputs, experts of R channels each. Column FIRST of the gates
belongs to the first expert; columns that belong to none are of null experts. C, N, R and FIRST are compile-time
constants: a layer has one set of them, and rows of C entries can only be read in wide loads if C is known. Row offsets
are 64-bit, since T * in_features can exceed 2**31. An argument of None compiles a kernel without that part.

All products accumulate in float32. Products of float32 operands use three TF32 products ("tf32x3"), which is float32
up to a relative 2**-22; of bfloat16 and float16 operands they are exact.
"""

import triton
import triton.language as tl


if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 5):
    raise ImportError(
        f"The kernels need Triton 3.5 or newer, and this is {triton.__version__}. Upgrade triton (and torch)."
    )

# The interpreter of Triton 3.9 computes wrong products of bfloat16 tensors, which it holds as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Philox4x32 passes BigCrush from 7 rounds on (Salmon et al. 2011, table 2); the customary 10 would be 40 % slower.
PHILOX_ROUNDS = tl.constexpr(7)
# Words of 32 random bits for each word of the mask: the probability of a bit has 16 binary digits.
DIGITS = tl.constexpr(16)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _dot_float32(x, weight, total):
    """``total + x @ weight``, accurate to float32 rounding whatever the dtypes."""
    if x.dtype != tl.bfloat16:
        total = _dot(x.to(tl.float32), weight.to(tl.float32), total)
    elif weight.dtype == tl.bfloat16:
        total = _dot(x, weight, total)
    else:
        rest = weight.to(tl.float32)
        for _ in tl.static_range(3):  # three bfloat16 hold the 24 bits of a float32
            part = rest.to(tl.bfloat16)
            total = _dot(x, part, total)
            rest -= part.to(tl.float32)
    return total


@triton.jit
def _dot_selection(values, selection, total):
    """``total + values @ selection`` of float32 values, accurate to their rounding, and a matrix of zeros and ones."""
    rest, selection = values, selection.to(tl.float32).to(tl.bfloat16)
    for _ in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        total = _dot(part, selection, total)
        rest -= part.to(tl.float32)
    return total


@triton.jit
def _drop(tile, keep, t, start, tokens, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile of rows t and columns start to start + BLOCK_D, zero where the mask's bits are."""
    w = start // 32 + tl.arange(0, BLOCK_D // 32)
    inside = (t < tokens)[:, None] & (w < width)[None, :]
    words = tl.load(keep + t.to(tl.int64)[:, None] * width + w[None, :], mask=inside, other=0)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (BLOCK_T, BLOCK_D)) != 0, tile, tl.zeros_like(tile))


@triton.jit
def _load_rows(tensor, t, column, tokens, WIDTH: tl.constexpr):
    """Rows of a contiguous (T, WIDTH) tensor, zero outside of it."""
    inside = (t < tokens)[:, None] & (column < WIDTH)[None, :]
    return tl.load(tensor + t.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(tensor, values, t, column, tokens, WIDTH: tl.constexpr):
    inside = (t < tokens)[:, None] & (column < WIDTH)[None, :]
    tl.store(tensor + t.to(tl.int64)[:, None] * WIDTH + column[None, :], values, mask=inside)


@triton.jit
def _load_gates(gates, t, c, tokens, C: tl.constexpr, N: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr):
    """The gate of each rank channel's expert."""
    inside = (t < tokens)[:, None] & (c < C)[None, :]
    return tl.load(gates + t.to(tl.int64)[:, None] * N + (FIRST + c // R)[None, :], mask=inside, other=0.0)


@triton.jit
def _softmax(logits, n, temperature, N: tl.constexpr):
    scaled = tl.where((n < N)[None, :], logits / temperature, float("-inf"))
    powers = tl.exp(scaled - tl.max(scaled, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def _softmax_backward(grad, probabilities, temperature):
    product = probabilities * grad
    return (product - probabilities * tl.sum(product, axis=1)[:, None]) / temperature


@triton.jit
def _store_expanded(
    gated, B, base, bias, output, t, o, c, tokens, out_features, base_row, base_column, C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """``output = base + bias + gated @ B^T``."""
    weight = tl.load(B + o[None, :] * C + c[:, None], mask=(c < C)[:, None] & (o < out_features)[None, :], other=0.0)
    total = _dot(gated, weight.to(gated.dtype), tl.zeros((BLOCK_T, BLOCK_O), tl.float32))
    row, column = t.to(tl.int64)[:, None], o.to(tl.int64)[None, :]
    inside = (t < tokens)[:, None] & (o < out_features)[None, :]
    if bias is not None:
        total += tl.load(bias + o, mask=o < out_features, other=0.0)[None, :].to(tl.float32)
    if base is not None:
        total = tl.load(base + row * base_row + column * base_column, mask=inside, other=0.0) + total
    tl.store(output + row * out_features + column, total, mask=inside)


@triton.jit(do_not_specialize=["words", "threshold"])
def dropout_bits(seed, keep, words, threshold, BLOCK: tl.constexpr):
    """Words of 32 independent bits that are one with probability ``threshold / 2**16``.

    By the digits of that probability, last one first: "or" with a random bit turns a probability p into (1 + p) / 2,
    "and" into p / 2.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    key = tl.load(seed)
    bits = tl.zeros((BLOCK,), tl.uint32)
    for i in tl.static_range(DIGITS // 4):
        third = tl.full((BLOCK,), i, tl.uint32)
        four = tl.philox(key, low, high, third, tl.zeros_like(third), PHILOX_ROUNDS)
        for j in tl.static_range(4):
            one = (threshold >> (4 * i + j)) & 1
            bits = tl.where(one != 0, bits | four[j], bits & four[j])
    tl.store(keep + word, bits.to(tl.int32, bitcast=True), mask=word < words)


@triton.jit(do_not_specialize=["tokens"])
def project(
    x, keep, A, router, hidden, probabilities, partials, tokens, in_features, x_row, x_column, span, temperature,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``hidden = drop(x) @ A^T`` and ``probabilities = softmax(x @ router^T / temperature)`` in one pass over x.

    With `partials`, shape (splits, T, C + N), program (i, j) sums over columns j*span to (j+1)*span and leaves the
    sums there.
    """
    split = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    channels = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    logits = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    rows = x + t.to(tl.int64)[:, None] * x_row
    for start in range(split * span, tl.minimum((split + 1) * span, in_features), BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        inside = k < in_features
        tile = tl.load(
            rows + k.to(tl.int64)[None, :] * x_column, mask=(t < tokens)[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            router + n[None, :] * in_features + k[:, None], mask=inside[:, None] & (n < N)[None, :], other=0.0
        )
        logits = _dot_float32(tile, weight, logits)
        weight = tl.load(A + c[None, :] * in_features + k[:, None], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        if keep is not None:
            tile = _drop(tile, keep, t, start, tokens, tl.cdiv(in_features, 32), BLOCK_T, BLOCK_D)
        channels = _dot(tile, weight.to(tile.dtype), channels)
    if partials is None:
        _store_rows(hidden, channels, t, c, tokens, C)
        _store_rows(probabilities, _softmax(logits, n, temperature, N), t, n, tokens, N)
    else:
        sums = partials + (split * tokens + t)[:, None] * (C + N)
        tl.store(sums + c[None, :], channels, mask=(t < tokens)[:, None] & (c < C)[None, :])
        tl.store(sums + C + n[None, :], logits, mask=(t < tokens)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def expand(
    hidden, gates, B, base, bias, output, tokens, out_features, base_row, base_column, factor,
    C: tl.constexpr, N: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``output = base + bias + (hidden * gates * factor) @ B^T``; the gated channels are not stored."""
    blocks = tl.cdiv(out_features, BLOCK_O)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    channels = _load_rows(hidden, t, c, tokens, C)
    gated = channels.to(tl.float32) * (_load_gates(gates, t, c, tokens, C, N, R, FIRST) * factor)
    gated = gated.to(channels.dtype)
    _store_expanded(
        gated, B, base, bias, output, t, o, c, tokens, out_features, base_row, base_column, C, BLOCK_T, BLOCK_O
    )


@triton.jit(do_not_specialize=["tokens", "splits"])
def expand_partials(
    partials, hidden, probabilities, B, base, bias, output,
    tokens, out_features, base_row, base_column, splits, factor, temperature,
    C: tl.constexpr, N: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`expand` for few tokens: sums the `partials` of `project` first, and stores `hidden` and `probabilities`."""
    t, o = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    channels = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    logits = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(0, splits, 8):
        for i in tl.static_range(8):  # so many loads in flight
            split = first + i
            row, inside = (split * tokens + t)[:, None] * (C + N), (t < (tokens if split < splits else 0))[:, None]
            channels += tl.load(partials + row + c[None, :], mask=inside & (c < C)[None, :], other=0.0)
            logits += tl.load(partials + row + C + n[None, :], mask=inside & (n < N)[None, :], other=0.0)
    softmax = _softmax(logits, n, temperature, N)
    rounded = channels.to(hidden.dtype.element_ty)
    if tl.program_id(0) == 0:
        _store_rows(hidden, rounded, t, c, tokens, C)
        _store_rows(probabilities, softmax, t, n, tokens, N)
    gates = (
        _dot_selection(softmax, n[:, None] == (FIRST + c // R)[None, :], tl.zeros((BLOCK_T, BLOCK_C), tl.float32))
        * factor
    )
    gated = (rounded.to(tl.float32) * gates).to(rounded.dtype)
    _store_expanded(
        gated, B, base, bias, output, t, o, c, tokens, out_features, base_row, base_column, C, BLOCK_T, BLOCK_O
    )


@triton.jit(do_not_specialize=["tokens"])
def gate_backward(
    grad_output, B, hidden, gates, grad_probabilities, grad_hidden, gated, grad_gates, to_router, to_x,
    tokens, out_features, grad_row, grad_column, factor, temperature,
    C: tl.constexpr, N: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the rank channels and of the gates, in one pass over the gradient of the output; and the gated
    channels, where `gated` is given.

    Without `grad_gates` the gates are the probabilities, and the gradients of the logits are stored: the one from all
    uses of the probabilities in `to_router`, and the one from the experts alone in `to_x`, where given.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    grad_gated = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    dtype = hidden.dtype.element_ty
    rows = grad_output + t.to(tl.int64)[:, None] * grad_row
    for start in range(0, out_features, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        inside = o < out_features
        tile = tl.load(
            rows + o.to(tl.int64)[None, :] * grad_column, mask=(t < tokens)[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(B + o[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        grad_gated = _dot(tile.to(dtype), weight.to(dtype), grad_gated)
    gate = _load_gates(gates, t, c, tokens, C, N, R, FIRST) * factor
    _store_rows(grad_hidden, grad_gated * gate, t, c, tokens, C)
    channels = _load_rows(hidden, t, c, tokens, C).to(tl.float32)
    if gated is not None:
        _store_rows(gated, channels * gate, t, c, tokens, C)
    products = grad_gated * channels
    grad = (
        _dot_selection(products, (FIRST + c // R)[:, None] == n[None, :], tl.zeros((BLOCK_T, BLOCK_N), tl.float32))
        * factor
    )
    if grad_gates is not None:
        _store_rows(grad_gates, grad, t, n, tokens, N)
    else:
        probabilities = _load_rows(gates, t, n, tokens, N)
        if to_x is not None:
            _store_rows(to_x, _softmax_backward(grad, probabilities, temperature), t, n, tokens, N)
        if grad_probabilities is not None:
            grad += _load_rows(grad_probabilities, t, n, tokens, N)
        _store_rows(to_router, _softmax_backward(grad, probabilities, temperature), t, n, tokens, N)


@triton.jit(do_not_specialize=["tokens"])
def input_gradient(
    grad_hidden, to_x, A, router, keep, grad_x, tokens, in_features,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``grad_x = drop(grad_hidden @ A) + to_x @ router``."""
    blocks = tl.cdiv(in_features, BLOCK_D)
    start = tl.program_id(0) % blocks * BLOCK_D
    t, k = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T), start + tl.arange(0, BLOCK_D)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    inside = (k < in_features)[None, :]
    channels, logits = _load_rows(grad_hidden, t, c, tokens, C), _load_rows(to_x, t, n, tokens, N)
    weight = tl.load(A + c[:, None] * in_features + k[None, :], mask=(c < C)[:, None] & inside, other=0.0)
    total = _dot(channels, weight.to(channels.dtype), tl.zeros((BLOCK_T, BLOCK_D), tl.float32))
    if keep is not None:
        total = _drop(total, keep, t, start, tokens, tl.cdiv(in_features, 32), BLOCK_T, BLOCK_D)
    weight = tl.load(router + n[:, None] * in_features + k[None, :], mask=(n < N)[:, None] & inside, other=0.0)
    total = _dot(logits, weight.to(channels.dtype), total)
    row, column = t.to(tl.int64)[:, None], k[None, :]
    tl.store(grad_x + row * in_features + column, total, mask=(t < tokens)[:, None] & inside)


@triton.jit(do_not_specialize=["tokens", "span"])
def input_weight_gradients(
    x, keep, grad_hidden, to_router, A_partials, router_partials, tokens, in_features, x_row, x_column, span,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``grad_hidden^T @ drop(x)`` and ``to_router^T @ x``; program (i, j) sums over tokens j*span to (j+1)*span.

    Either of `A_partials`, shape (splits, C, in_features), and `router_partials`, shape (splits, N, in_features), may
    be None. A single split's sums are the gradients.
    """
    start, split = tl.program_id(0) * BLOCK_D, tl.program_id(1)
    k, c, n = start + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    inside = (k < in_features)[None, :]
    grad_A = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    grad_router = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, tokens), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        row, column = t.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        tile = tl.load(x + row * x_row + column * x_column, mask=(t < tokens)[:, None] & inside, other=0.0)
        if router_partials is not None:
            grad_router = _dot(tl.trans(_load_rows(to_router, t, n, tokens, N)), tile, grad_router)
        if A_partials is not None:
            if keep is not None:
                tile = _drop(tile, keep, t, start, tokens, tl.cdiv(in_features, 32), BLOCK_T, BLOCK_D)
            grad_A = _dot(tl.trans(_load_rows(grad_hidden, t, c, tokens, C)), tile, grad_A)
    if A_partials is not None:
        tl.store(
            A_partials + (split * C + c)[:, None] * in_features + k[None, :], grad_A, mask=(c < C)[:, None] & inside
        )
    if router_partials is not None:
        row = (split * N + n)[:, None]
        tl.store(router_partials + row * in_features + k[None, :], grad_router, mask=(n < N)[:, None] & inside)
