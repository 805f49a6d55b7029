"""What test_mixture_triton.py computes: on a CUDA device, or in a process of its own where Triton interprets the
kernels.

Triton decides when a kernel is defined whether it is interpreted, so one process cannot have both.
"""

import importlib
from typing import NamedTuple

import numpy
import torch
import torch._inductor.config

from peft_loramoe.ops import MixtureOptions, mixture_torch, reference
from peft_loramoe.ops import mixture as mixture_module
from peft_loramoe.ops.mixture import mixture


NAMES = ("x", "A", "B", "router")


class Case(NamedTuple):
    tokens: int = 6
    in_features: int = 42
    out_features: int = 123
    num_outputs: int = 3
    experts: tuple[int, ...] = (0, 1, 2)
    r: int = 5
    dtype: torch.dtype = torch.float32
    masters: torch.dtype = torch.float32
    dropout: float = 0.3
    top_k: int | None = None
    balance_detach: bool = False
    add: str = "base"  # "nothing", "base", "weight" or "weight and bias"
    layout: str = (
        "contiguous"  # of x, the base layer's output and the output's gradient; or "every other", "transposed"
    )
    frozen: tuple[str, ...] = ()
    seed: int = 0


def use_kernels():
    """Make `ops.mixture` use the kernels wherever they support it, on a CPU under the interpreter."""
    torch.set_num_threads(1)
    mixture_module.KERNELS = kernels()


def kernels():
    return importlib.import_module("peft_loramoe.ops.mixture_triton")


def unpack(keep, columns):
    bits = keep[:, :, None] >> torch.arange(32, device=keep.device) & 1
    return bits.flatten(1)[:, :columns].bool()


def mask(rows, columns, dropout, seed, device="cpu"):
    """The mask that `ops.mixture` draws after `torch.manual_seed(seed)`, boolean."""
    torch.manual_seed(seed)
    return unpack(kernels().dropout_mask(torch.empty(rows, columns, device=device), dropout), columns)


def options_of(case):
    return MixtureOptions(
        list(case.experts), 1.5, 0.7, case.dropout, top_k=case.top_k, balance_detach=case.balance_detach
    )


def inputs_of(case, device):
    torch.manual_seed(case.seed)
    num_channels = len(case.experts) * case.r
    x, gradient, base = (
        _in_layout(torch.randn(case.tokens, width, device=device).to(case.dtype), case.layout)
        for width in (case.in_features, case.out_features, case.out_features)
    )
    shapes = [
        (num_channels, case.in_features),
        (case.out_features, num_channels),
        (case.num_outputs, case.in_features),
    ]
    matrices = [torch.randn(shape, device=device).to(case.masters) / shape[1] ** 0.5 for shape in shapes]
    weight = (torch.randn(case.out_features, case.in_features, device=device) / case.in_features**0.5).to(case.dtype)
    added = {}
    if case.add == "base":
        added["base"] = base
    elif case.add != "nothing":
        bias = torch.randn(case.out_features, device=device).to(case.dtype)
        added |= dict(weight=weight, bias=bias if case.add == "weight and bias" else None)
    inputs = [x, *matrices]
    for name, tensor in zip(NAMES, inputs):
        tensor.requires_grad_(name not in case.frozen)
    return inputs, added, gradient, torch.randn(case.tokens, case.num_outputs, device=device)


def errors(case, device="cpu"):
    """Errors of `ops.mixture` relative to the reference in float64.

    Output, probabilities, every gradient that is wanted.
    """
    inputs, added, *gradients = inputs_of(case, device)
    options = options_of(case)
    keep = mask(*inputs[0].shape, case.dropout, case.seed, device) if case.dropout else None
    torch.manual_seed(case.seed)
    got = mixture(*inputs, options, dropout=True, **added)
    _backward(got, gradients, inputs)

    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    arguments = dict(
        scaling=options.scaling,
        temperature=options.temperature,
        experts=options.experts,
        top_k=options.top_k,
        keep=keep,
        dropout=mixture_torch.drop_probability(case.dropout),
    )
    output, probabilities = reference.mixture(*exact, **arguments)
    if case.balance_detach:
        _, probabilities = reference.mixture(exact[0].detach(), *exact[1:], **arguments)
    if case.add == "base":
        output = output + added["base"].double()
    elif case.add != "nothing":
        output = output + exact[0] @ added["weight"].double().t()
        output = output if added["bias"] is None else output + added["bias"].double()
    _backward((output, probabilities), gradients, exact)

    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    result = dict(output=_error(got[0], output), probabilities=_error(got[1], probabilities))
    for name, tensor, wanted in zip(NAMES, inputs, exact):
        assert (tensor.grad is None) == (name in case.frozen)
        if name not in case.frozen:
            result[name] = _error(tensor.grad, wanted.grad)
    return result


class _Checked:
    """Triton's interpreter, which raises for an access outside of the kernel's tensors."""

    def __init__(self, interpreter):
        self.interpreter, self.ranges = interpreter, []

    def __getattr__(self, name):
        return getattr(self.interpreter, name)

    def load(self, pointers, mask, *rest):
        self._check(pointers[mask])
        return self.interpreter.load(pointers, mask, *rest)

    def store(self, pointers, value, mask):
        self._check(pointers[mask])
        return self.interpreter.store(pointers, value, mask)

    def _check(self, addresses):
        inside = numpy.zeros(addresses.shape, bool)
        for first, last in self.ranges:
            inside |= (addresses >= first) & (addresses < last)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} addresses are outside of the kernel's tensors")


def check_accesses(case):
    """Run a case in the interpreter; raises for an access outside of the tensors that a kernel was given."""
    runtime = importlib.import_module("triton.runtime.interpreter")
    checked, launch = _Checked(runtime._interpreter), kernels()._launch

    def launch_checked(kernel, grid, *args, **constants):
        checked.ranges = [
            (t.data_ptr(), t.data_ptr() + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))))
            for t in args
            if isinstance(t, torch.Tensor) and t.numel()
        ]
        launch(kernel, grid, *args, **constants)

    runtime._interpreter, kernels()._launch = checked, launch_checked
    try:
        errors(case)
    finally:
        runtime._interpreter, kernels()._launch = checked.interpreter, launch


def differences(case, device="cpu"):
    """Differences between the two implementations, called with the same arguments, relative to `mixture_torch`."""
    (x, A, B, router), added, grad_output, grad_probabilities = inputs_of(case, device)
    results = []
    with torch.no_grad():
        for implementation in (kernels(), mixture_torch):
            keep = None
            if case.dropout:
                torch.manual_seed(case.seed)
                keep = kernels().dropout_mask(x, case.dropout)
                keep = keep if implementation is kernels() else unpack(keep, case.in_features)
            rest = [added.get(name) for name in ("base", "weight", "bias")]
            inputs = mixture_torch.Inputs(x, A, B, router, keep, *rest)
            result = implementation.forward(inputs, options_of(case))
            result += implementation.backward(
                grad_output, grad_probabilities, inputs.saved(*result[1:]), options_of(case), [True] * 4
            )
            results.append(result)
    for ours, theirs in zip(*results):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return [_error(ours, theirs.double()) for ours, theirs in zip(*results)]


def compiled_and_eager(device="cpu"):
    """Output and gradients of the mixture with dropout: as is, and under `torch.compile(fullgraph=True)`."""
    case = Case()
    results = []
    backend = "aot_eager" if device == "cpu" else "inductor"
    for function in (mixture, torch.compile(mixture, fullgraph=True, backend=backend)):
        inputs, added, *gradients = inputs_of(case, device)
        torch.manual_seed(1)
        with torch._inductor.config.patch(fallback_random=True):  # the seed is the one of eager mode
            outputs = function(*inputs, options_of(case), dropout=True, **added)
        _backward(outputs, gradients, inputs)
        results.append([*(t.detach() for t in outputs), *(t.grad for t in inputs)])
    return results


def check_operators():
    """`torch.library.opcheck` of dropout's operator."""
    torch.library.opcheck(kernels()._dropout_bits, (torch.randint(2**60, (1,)), 3, 70, 0.3))


def _in_layout(tensor, layout):
    if layout == "every other":
        return torch.stack([tensor, tensor], dim=-1).flatten(1)[:, ::2]
    return tensor.t().contiguous().t() if layout == "transposed" else tensor


def _backward(outputs, gradients, inputs):
    if any(tensor.requires_grad for tensor in inputs):
        pairs = [
            (output, gradient.to(output.dtype)) for output, gradient in zip(outputs, gradients) if output.requires_grad
        ]
        torch.autograd.backward(*zip(*pairs))


def _error(value, expected):
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()
