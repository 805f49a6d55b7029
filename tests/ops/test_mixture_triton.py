import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_cases
from peft_loramoe.ops import MixtureOptions, mixture_torch
from peft_loramoe.ops import mixture as mixture_module
from peft_loramoe.ops.mixture import mixture
from peft_loramoe.ops.mixture_torch import Inputs
from triton_cases import Case


pytestmark = pytest.mark.version_independent

triton = pytest.importorskip("triton")
mixture_triton = importlib.import_module("peft_loramoe.ops.mixture_triton")

# Relative to the float64 result; the rank channels and the gates are rounded to the activations' dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)
TENSOR_CORES = 1e-5  # of the probabilities: their sums in float32 are truncated, not rounded
PLAIN = MixtureOptions([0, 1, 2], 1.5, 1.0, 0.1, top_k=None, balance_detach=False)
gpu = pytest.mark.gpu


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of triton_cases in a process whose kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=triton_cases.use_kernels
        ) as pool:
            pool.submit(os.getpid).result()  # the process starts with the first task
            patch.undo()
            yield lambda function, *args: pool.submit(function, *args).result()


def assert_small(errors, case, of_probabilities=2e-6):
    assert max(errors.values()) < TOLERANCE[case.dtype], errors
    assert errors["probabilities"] < of_probabilities, "the logits are accurate to float32 whatever the dtype of x"


@st.composite
def cases(draw, narrowest=1):
    num_outputs = draw(st.integers(2, 20))
    experts = draw(st.one_of(st.just(range(num_outputs)), st.sets(st.integers(0, num_outputs - 1), min_size=1)))
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        tokens=draw(st.sampled_from([1, 3, 16, 17, 64, 65, 90])),
        in_features=draw(st.integers(narrowest, 150)),
        out_features=draw(st.integers(narrowest, 150)),
        num_outputs=num_outputs,
        experts=tuple(sorted(experts)),
        r=draw(st.integers(1, 6)),
        dtype=dtype,
        masters=draw(st.sampled_from([torch.float32, dtype])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        top_k=draw(st.sampled_from([None, 2])),
        balance_detach=draw(st.booleans()),
        add=draw(st.sampled_from(["nothing", "base", "weight", "weight and bias"])),
        layout=draw(st.sampled_from(["contiguous", "every other", "transposed"])),
        frozen=tuple(draw(st.sets(st.sampled_from(triton_cases.NAMES)))),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.slow
@given(case=cases(narrowest=4))  # where the parts of a gradient of one entry cancel out, its relative error is large
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_agree_with_the_formula_in_outputs_and_gradients(interpreter, case):
    assert_small(interpreter(triton_cases.errors, case), case)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(tokens=70, dtype=torch.bfloat16, add="weight and bias", balance_detach=True),
        Case(tokens=300, in_features=40, out_features=30, dtype=torch.float16, add="weight"),
        Case(num_outputs=64, experts=tuple(range(64)), r=2, out_features=40),
        Case(num_outputs=2, experts=(0, 1), r=64, in_features=50),
        Case(tokens=600, in_features=33, out_features=29),  # tokens split among programs
        Case(
            tokens=3, in_features=2200, out_features=10, dtype=torch.bfloat16, dropout=0.0
        ),  # columns split among programs
        Case(tokens=70, num_outputs=6, experts=(0, 2, 5), top_k=2, add="nothing"),
        Case(tokens=3, num_outputs=6, experts=(2, 3, 4)),
        Case(tokens=70, num_outputs=6, experts=(0, 2, 4)),
    ],
    ids=[
        "few tokens",
        "one block",
        "float16",
        "many experts",
        "large rank",
        "many tokens",
        "many columns",
        "top_k and null",
        "few tokens, null",
        "null between",
    ],
)
def test_written_out_cases(interpreter, case):
    assert_small(interpreter(triton_cases.errors, case), case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(case=Case(tokens=1, in_features=1, out_features=1, num_outputs=2, experts=(0, 1), r=1))
def test_kernels_read_and_write_their_tensors_only(interpreter, case):
    interpreter(triton_cases.check_accesses, case)


@pytest.mark.parametrize("add", ["nothing", "base", "weight"])
def test_results_have_the_shapes_dtypes_and_values_of_the_torch_implementation(interpreter, add):
    case = Case(tokens=20, dtype=torch.float16, add=add)
    assert max(interpreter(triton_cases.differences, case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("add", ["nothing", "base", "weight"])
def test_no_tokens(interpreter, add):
    errors = interpreter(triton_cases.errors, Case(tokens=0, add=add))
    assert set(errors.values()) == {0.0}


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_dropout_keeps_entries_independently_with_its_probability(interpreter, dropout):
    keep = interpreter(triton_cases.mask, 300, 331, dropout, 0)
    rate, size = 1 - dropout, keep.numel()
    assert keep.shape == (300, 331)
    assert abs(keep.double().mean() - rate) < 5 * (rate * dropout / size) ** 0.5
    for shift in (1, 32):  # in the same word, and in the next one
        both = (keep[:, shift:] & keep[:, :-shift]).double().mean()
        assert abs(both - rate**2) < 5 * rate / size**0.5
    of_bits = keep[:, :320].view(300, 10, 32).double().mean((0, 1))
    assert (of_bits - rate).abs().max() < 5 * (rate * dropout / 3000) ** 0.5


def test_dropout_follows_the_generator(interpreter):
    first, again, other = (interpreter(triton_cases.mask, 20, 50, 0.3, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_dropout_is_an_operator(interpreter):
    interpreter(triton_cases.check_operators)


def test_compiles_without_graph_breaks(interpreter):
    for eager, compiled in zip(*interpreter(triton_cases.compiled_and_eager)):
        torch.testing.assert_close(compiled, eager)


# Which mixtures the kernels compute


def tensors(
    tokens=4,
    in_features=5,
    out_features=6,
    num_channels=6,
    num_outputs=3,
    dtype=torch.bfloat16,
    masters=torch.float32,
    device="meta",
):
    x = torch.empty(tokens, in_features, dtype=dtype, device=device)
    shapes = [(num_channels, in_features), (out_features, num_channels), (num_outputs, in_features)]
    return [x, *(torch.empty(shape, dtype=masters, device=device) for shape in shapes)]


@pytest.fixture
def h100(monkeypatch):
    """Tensors on "cuda" have a device, dtypes and shapes, but no values."""
    monkeypatch.setattr(mixture_triton, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(mixture_triton, "ASKED_FOR", False)
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    ("changes", "option", "supported"),
    [
        ({}, {}, True),
        (dict(dtype=torch.float16), {}, True),
        (dict(dtype=torch.float32), {}, True),
        (dict(num_channels=128, num_outputs=64), {}, True),
        ({}, dict(top_k=2, experts=[0, 2]), True),
        (dict(dtype=torch.float64), {}, False),
        (dict(masters=torch.float64), {}, False),
        (dict(num_channels=129), {}, False),
        (dict(num_outputs=65), {}, False),
        ({}, dict(router_dtype=torch.bfloat16), False),
    ],
    ids=str,
)
def test_supports(h100, changes, option, supported):
    assert mixture_triton.supports(*tensors(**changes, device="cuda"), PLAIN._replace(**option)) is supported


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_not_supported(device):
    assert not mixture_triton.supports(*tensors(device=device), PLAIN)


@pytest.mark.parametrize(
    ("capability", "by_default", "if_asked_for"),
    [((7, 5), False, False), ((8, 0), False, True), ((9, 0), True, True), ((10, 0), False, True)],
)
def test_devices(h100, monkeypatch, capability, by_default, if_asked_for):
    monkeypatch.setattr(mixture_triton, "_capability", lambda device: capability)
    assert mixture_triton.supports(*tensors(device="cuda"), PLAIN) is by_default
    monkeypatch.setattr(mixture_triton, "ASKED_FOR", True)
    assert mixture_triton.supports(*tensors(device="cuda"), PLAIN) is if_asked_for


@pytest.mark.parametrize(
    ("environment", "cuda", "found"),
    [("1", "13.0", True), ("0", "13.0", False), (None, "13.0", True), ("1", None, False)],
    ids=["turned on", "turned off", "by default", "torch without CUDA"],
)
def test_kernels_are_found_unless_they_are_turned_off(monkeypatch, environment, cuda, found):
    monkeypatch.delenv("PEFT_LORAMOE_TRITON", raising=False)
    if environment is not None:
        monkeypatch.setenv("PEFT_LORAMOE_TRITON", environment)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert (mixture_module.find_kernels() is mixture_triton) is found


def test_another_value_of_the_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("PEFT_LORAMOE_TRITON", "yes")
    with pytest.raises(ValueError, match="PEFT_LORAMOE_TRITON='yes' must be"):
        mixture_module.find_kernels()


def test_kernels_that_are_turned_on_and_cannot_be_had_are_an_error(monkeypatch):
    monkeypatch.setenv("PEFT_LORAMOE_TRITON", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "__version__", "3.4.1")
    _forget_kernels(monkeypatch)
    with pytest.raises(ImportError, match="need Triton 3.5 or newer"):
        mixture_module.find_kernels()
    monkeypatch.delenv("PEFT_LORAMOE_TRITON")
    assert mixture_module.find_kernels() is None


def test_an_old_triton_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.4.1")
    _forget_kernels(monkeypatch)
    with pytest.raises(ImportError, match=r"need Triton 3.5 or newer, and this is 3.4.1. Upgrade"):
        importlib.import_module("peft_loramoe.ops.mixture_triton")


def _forget_kernels(monkeypatch):
    for name in ("mixture_triton", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"peft_loramoe.ops.{name}")
        monkeypatch.delattr(f"peft_loramoe.ops.{name}")


def test_a_boolean_mask_is_read_by_the_torch_implementation(h100, monkeypatch):
    monkeypatch.setattr(mixture_module, "KERNELS", mixture_triton)
    arguments = tensors(device="cuda")
    bits, mask = (
        torch.empty(4, width, dtype=dtype, device="cuda") for width, dtype in ((1, torch.int32), (5, torch.bool))
    )
    chosen = [
        mixture_module.select_backend(Inputs(*arguments, keep, base=None, weight=None, bias=None), PLAIN)
        for keep in (None, bits, mask)
    ]
    assert chosen == [mixture_triton, mixture_triton, mixture_torch]


# Ahead-of-time compilation for an H100, from the launches that shapes on the meta device would make

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(monkeypatch, tokens, num_outputs, r, dtype, masters=torch.float32, weight=True, top_k=None):
    """(kernel, grid, arguments, constants) of a forward and a backward pass with dropout, d 4096 -> 11008."""
    made = []
    monkeypatch.setattr(
        mixture_triton, "_launch", lambda kernel, grid, *args, **kwargs: made.append((kernel, grid, args, kwargs))
    )
    x, A, B, router = tensors(tokens, 4096, 11008, num_outputs * r, num_outputs, dtype, masters)
    options = PLAIN._replace(experts=list(range(num_outputs)), top_k=top_k)
    keep = mixture_triton._draw_bits(torch.empty(1, dtype=torch.int64, device="meta"), tokens, 4096, 0.1)
    base = x.new_empty(tokens, 11008)
    added = (None, x.new_empty(11008, 4096), None) if weight else (base, None, None)
    inputs = Inputs(x, A, B, router, keep, *added)
    _, probabilities, hidden = mixture_triton.forward(inputs, options)
    forward = len(made)
    saved = inputs.saved(probabilities, hidden)
    mixture_triton.backward(base, torch.empty_like(probabilities), saved, options, [True] * 4)
    return made[1:forward], made[forward:], made[0]


def compile_for_h100(kernel, args, constants):
    """Registers, stack (where registers are spilled to) and shared memory, in bytes."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else args[index]
        specialize = name not in kernel.do_not_specialize
        if name in constants or value is None or (isinstance(value, int) and value == 1 and specialize):
            signature[name], constexprs[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and specialize and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
    return usage["REG"], usage["STACK"], compiled.metadata.shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dict(tokens=8192, num_outputs=6, r=4, dtype=torch.bfloat16),
        dict(tokens=8192, num_outputs=6, r=4, dtype=torch.float32, weight=False),
        dict(tokens=8192, num_outputs=64, r=2, dtype=torch.bfloat16),
        dict(tokens=8192, num_outputs=6, r=4, dtype=torch.float16, only=("project", "gate_backward")),
        dict(tokens=1, num_outputs=6, r=4, dtype=torch.bfloat16, only=("project", "expand_partials")),
        dict(
            tokens=300,
            num_outputs=16,
            r=8,
            dtype=torch.bfloat16,
            masters=torch.bfloat16,
            top_k=2,
            only=("gate_backward",),
        ),
    ],
    ids=["bf16", "fp32", "widest", "fp16", "decode", "top_k"],
)
def test_kernels_compile_for_an_h100_within_its_registers_and_shared_memory(monkeypatch, case):
    case = dict(case)
    only = case.pop("only", None)
    forward, backward, dropout = launches(monkeypatch, **case)
    compiled = [launch for launch in (dropout, *forward, *backward) if only is None or launch[0].__name__ in only]
    assert len(compiled) == (6 if only is None else len(only))
    for kernel, _, args, constants in compiled:
        _, stack, shared = compile_for_h100(kernel, args, constants)
        # ptxas may put a scalar on the stack though registers are free
        assert stack <= 8, f"{kernel.__name__} spills registers"
        assert shared <= 227 * 1024, kernel.__name__


@pytest.mark.parametrize(("tokens", "second"), [(1, "expand_partials"), (64, "expand_partials"), (65, "expand")])
def test_launches(monkeypatch, tokens, second):
    forward, backward, _ = launches(monkeypatch, tokens, 6, 4, torch.bfloat16)
    assert [kernel.__name__ for kernel, *_ in forward] == ["project", second]
    assert sorted(kernel.__name__ for kernel, *_ in backward) == [
        "gate_backward",
        "input_gradient",
        "input_weight_gradients",
    ]


def test_the_number_of_tokens_does_not_compile_kernels_anew(monkeypatch):
    constants = []
    for tokens in (5000, 5001, 8192):
        forward, backward, _ = launches(monkeypatch, tokens, 6, 4, torch.bfloat16)
        constants.append([kwargs for *_, kwargs in forward + backward])
        names = {name for kernel, *_ in forward + backward for name in kernel.do_not_specialize}
        assert names == {"tokens", "span"}
    assert constants[0] == constants[1] == constants[2]


# On a GPU


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(mixture_module, "KERNELS", mixture_triton)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6, 17, 64, 65, 300, 5000, 65536])
def test_gpu_agrees_with_the_formula(on_gpu, tokens, dtype):
    case = Case(tokens, 342, 223, 6, tuple(range(6)), 4, dtype, add="weight and bias", balance_detach=True)
    assert_small(triton_cases.errors(case, "cuda"), case, TENSOR_CORES)


@gpu
@pytest.mark.parametrize("shard", range(8))  # every case compiles kernels of its own: workers share them
def test_gpu_agrees_with_the_formula_for_odd_sizes(on_gpu, shard):
    @seed(shard)
    @given(case=cases())
    @settings(max_examples=12, deadline=None, database=None)
    def check(case):
        assert_small(triton_cases.errors(case, "cuda"), case, TENSOR_CORES)

    check()


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_agrees_with_the_torch_implementation(on_gpu, dtype):
    case = Case(4096, 1024, 2752, 6, tuple(range(6)), 4, dtype, add="weight")
    assert max(triton_cases.differences(case, "cuda")) < TOLERANCE[dtype]


@gpu
def test_gpu_widest(on_gpu):
    case = Case(300, 342, 223, 64, tuple(range(64)), 2)
    assert_small(triton_cases.errors(case, "cuda"), case, TENSOR_CORES)


@gpu
def test_gpu_gradients_do_not_change_from_run_to_run(on_gpu):
    case = Case(8192, 512, 640, dtype=torch.bfloat16)
    assert triton_cases.errors(case, "cuda") == triton_cases.errors(case, "cuda")


@gpu
def test_gpu_more_entries_than_32_bits_count(on_gpu):
    row = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    x = row.repeat(2**19 + 3, 1).requires_grad_()
    _, *matrices = triton_cases.inputs_of(Case(1, 4096, 8), "cuda")[0]
    output, _ = mixture(x, *matrices, PLAIN, dropout=False)
    output.backward(output.detach())
    assert (output == output[0]).all() and (x.grad == x.grad[0]).all()


@gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_gpu_graph_replay(on_gpu, tokens):
    (x, *matrices), added, *_ = triton_cases.inputs_of(Case(tokens, dtype=torch.bfloat16, add="weight"), "cuda")
    x = x.detach()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for dropout in (False, True):
                mixture(x, *matrices, PLAIN, dropout=dropout, **added)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, probabilities = mixture(x, *matrices, PLAIN, dropout=False, **added)
            dropped, _ = mixture(x, *matrices, PLAIN._replace(dropout=0.5), dropout=True, **added)
        graph.replay()
        before = dropped.clone()
        graph.replay()
        assert not torch.equal(before, dropped), "each replay draws a mask of its own"
        x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = mixture(x, *matrices, PLAIN, dropout=False, **added)
    torch.testing.assert_close((output, probabilities), wanted)


@gpu
def test_gpu_torch_compile(on_gpu):
    for eager, compiled in zip(*triton_cases.compiled_and_eager("cuda")):
        torch.testing.assert_close(compiled, eager)
