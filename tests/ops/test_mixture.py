import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_loramoe.ops import MixtureOptions, reference
from peft_loramoe.ops.mixture import mixture
from peft_loramoe.ops.mixture_torch import drop_probability, dropout_mask


pytestmark = [pytest.mark.version_independent, pytest.mark.usefixtures("input_size")]

# Relative to the float64 result; the rank channels and the gates are rounded to the activations' dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
OPERATOR = torch.ops.peft_loramoe.mixture.default
BACKWARD_OPERATOR = torch.ops.peft_loramoe.mixture_backward.default
PLAIN = MixtureOptions([0, 1, 2], 1.5, 1.0, 0.0, top_k=None, balance_detach=False)

NAMES = ("x", "A", "B", "router", "base")


def random_inputs(options, num_outputs, r, in_features, out_features, leading, dtype, masters):
    """x, A, B, router and the base layer's output, with gradient; the matrices in their own dtype."""
    num_experts = len(options.experts)
    shapes = [(num_experts * r, in_features), (out_features, num_experts * r), (num_outputs, in_features)]
    x, base = torch.randn(*leading, in_features).to(dtype), torch.randn(*leading, out_features).to(dtype)
    matrices = [torch.randn(shape).to(masters) for shape in shapes]
    return [tensor.requires_grad_() for tensor in (x, *matrices, base)]


def exact(inputs, options, keep=None):
    """Inputs, output and probabilities in float64, by the reference."""
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    *arguments, base = inputs
    output, probabilities = reference.mixture(
        *arguments,
        scaling=options.scaling,
        temperature=options.temperature,
        experts=options.experts,
        top_k=options.top_k,
        keep=keep,
        dropout=drop_probability(options.dropout),
    )
    return inputs, base + output, probabilities


def relative_error(value, expected):
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@st.composite
def cases(draw):
    num_outputs = draw(st.integers(2, 7))
    experts = draw(st.sets(st.integers(0, num_outputs - 1), min_size=1))
    options = MixtureOptions(
        scaling=draw(st.floats(0.1, 4)),
        temperature=draw(st.floats(0.5, 2)),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        experts=tuple(sorted(experts)),
        top_k=None,
        router_dtype=torch.float32,
        balance_detach=False,
    )
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = dict(
        num_outputs=num_outputs,
        r=draw(st.integers(1, 5)),
        in_features=draw(st.integers(1, 33)),
        out_features=draw(st.integers(1, 29)),
        leading=draw(st.lists(st.integers(0, 7), max_size=3)),
        dtype=dtype,
        masters=draw(st.sampled_from([dtype, torch.float64 if dtype == torch.float64 else torch.float32])),
    )
    return options, shape, draw(st.integers(0, 2**31))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_agrees_with_the_formula_in_output_probabilities_and_gradients(case):
    options, shape, seed = case
    torch.manual_seed(seed)
    inputs = random_inputs(options, **shape)
    dtype, masters = shape["dtype"], shape["masters"]
    torch.manual_seed(seed)
    output, probabilities = mixture(*inputs[:4], options, dropout=True, base=inputs[4])
    torch.manual_seed(seed)
    rows = inputs[0].view(-1, shape["in_features"])
    keep = dropout_mask(rows, options.dropout).view_as(inputs[0]) if options.dropout else None
    exact_inputs, expected, expected_probabilities = exact(inputs, options, keep)

    assert output.dtype == dtype and output.shape == expected.shape
    assert probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probabilities.double(), expected_probabilities, rtol=1e-4, atol=1e-6)
    if not output.numel():
        return
    # Terms may cancel, their rounding errors do not; about as large are the base layer's output and one expert's.
    x, A, B, _, base = exact_inputs
    one_expert = options.scaling * x.norm() * A.norm() * B.norm() / (A.numel() ** 0.5 * shape["num_outputs"])
    magnitude = max(expected.norm(), base.norm(), one_expert)
    assert (output.double() - expected).norm() < TOLERANCE[dtype] * magnitude

    gradients = torch.randn_like(expected), torch.randn_like(expected_probabilities)
    torch.autograd.backward([output, probabilities], [gradients[0].to(dtype), gradients[1].to(probabilities.dtype)])
    torch.autograd.backward([expected, expected_probabilities], list(gradients))
    # Of a saturated router hardly any gradient is left, but the rounding errors of what cancelled are.
    floor = 0.5 * max(reference_value.grad.norm() for reference_value in exact_inputs)
    for name, value, reference_value in zip(NAMES, inputs, exact_inputs):
        assert value.grad.dtype == value.dtype
        error = (value.grad.double() - reference_value.grad).norm() / max(reference_value.grad.norm(), floor)
        assert error < 2 * max(TOLERANCE[dtype], TOLERANCE[masters]), name


DOUBLE = dict(
    num_outputs=4, r=2, in_features=5, out_features=3, leading=(6,), dtype=torch.float64, masters=torch.float64
)


@pytest.mark.parametrize("base", ["none", "output", "weight"])
@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 2}, {"top_k": 3, "experts": [1, 2, 3]}, {"temperature": 0.5}], ids=str
)
def test_gradcheck(changes, base):
    options = PLAIN._replace(**{"experts": [0, 1, 2, 3], **changes})
    torch.manual_seed(0)
    *inputs, output = random_inputs(options, **DOUBLE)
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def run(x, A, B, router, base_output):
        more = {"none": {}, "output": {"base": base_output}, "weight": {"weight": weight, "bias": bias}}[base]
        return mixture(x, A, B, router, options, dropout=False, **more)

    assert torch.autograd.gradcheck(run, (*inputs, output))


@pytest.mark.parametrize(
    "changes", [{"top_k": 2}, {"top_k": 1, "experts": [0, 3]}, {"top_k": 3, "dropout": 0.4}], ids=str
)
def test_top_k_agrees_with_the_formula(changes):
    options = PLAIN._replace(**{"experts": [0, 1, 2, 3], **changes})
    torch.manual_seed(0)
    inputs = random_inputs(options, **{**DOUBLE, "leading": (64,)})
    torch.manual_seed(1)
    output, _ = mixture(*inputs[:4], options, dropout=True, base=inputs[4])
    torch.manual_seed(1)
    keep = dropout_mask(inputs[0], options.dropout) if options.dropout else None
    exact_inputs, expected, _ = exact(inputs, options, keep)
    torch.testing.assert_close(output, expected)
    output.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for value, reference_value in zip(inputs, exact_inputs):
        torch.testing.assert_close(value.grad, reference_value.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_layer_inside_gives_what_the_base_layer_before_gives(dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 30).to(dtype).requires_grad_(False)
    results = []
    for inside in (True, False):
        torch.manual_seed(1)
        inputs = random_inputs(PLAIN, 3, 2, 40, 30, (9, 4), dtype, dtype)[:4]
        base = {"weight": layer.weight, "bias": layer.bias} if inside else {"base": layer(inputs[0])}
        output, probabilities = mixture(*inputs, PLAIN, dropout=False, **base)
        torch.autograd.backward([output, probabilities], [torch.ones_like(output), probabilities.detach()])
        results.append([output, *(t.grad for t in inputs)])
    for one, other in zip(*results):
        assert relative_error(one, other.double()) < TOLERANCE[dtype] / 2


def test_the_base_output_is_not_written_to():
    inputs = random_inputs(PLAIN, 3, 2, 8, 5, (4,), torch.float32, torch.float32)
    with torch.no_grad():
        before = inputs[4].clone()
        mixture(*inputs[:4], PLAIN, dropout=False, base=inputs[4])
        assert torch.equal(inputs[4], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_output_of_another_dtype_sets_the_outputs(dtype):
    x, A, B, router, base = random_inputs(PLAIN, 3, 2, 8, 5, (4,), dtype, torch.float32)
    output, _ = mixture(x, A, B, router, PLAIN, dropout=False, base=base.float())
    assert output.dtype == torch.float32
    output.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_activations_dtype_under_float32_masters(dtype):
    inputs = random_inputs(PLAIN, 3, 2, 8, 5, (4,), dtype, torch.float32)[:4]
    assert mixture(*inputs, PLAIN, dropout=False)[0].dtype == dtype


def test_autocast_computes_in_its_dtype_and_routes_in_float32():
    x, A, B, router, _ = random_inputs(PLAIN, 3, 2, 64, 5, (40,), torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, probabilities = mixture(x, A, B, router, PLAIN, dropout=False)
    assert (output.dtype, probabilities.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(probabilities, torch.softmax(x.bfloat16().float() @ router.T, dim=-1))
    output.sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32


def test_detached_balancing_trains_the_router_and_not_x():
    gradients = []
    for detach in (False, True):
        torch.manual_seed(0)
        options = PLAIN._replace(balance_detach=detach)
        inputs = random_inputs(options, 3, 2, 8, 5, (4,), torch.float64, torch.float64)[:4]
        _, probabilities = mixture(*inputs, options, dropout=False)
        probabilities[:, 0].sum().backward()
        gradients.append([t.grad for t in inputs])
    (x, _, _, router), (x_detached, _, _, router_detached) = gradients
    torch.testing.assert_close(router, router_detached)
    assert x.abs().max() > 0 and x_detached is None


@pytest.mark.parametrize("frozen", [("x",), ("A", "B"), ("router",), ("x", "A", "router"), ("B",)], ids="-".join)
def test_only_what_is_trained_gets_a_gradient(frozen):
    torch.manual_seed(0)
    inputs = random_inputs(PLAIN, 3, 2, 8, 5, (4,), torch.float64, torch.float64)[:4]
    expected = torch.autograd.grad(mixture(*inputs, PLAIN, dropout=False)[0].sum(), inputs)
    for name, tensor in zip(NAMES, inputs):
        tensor.requires_grad_(name not in frozen)
    mixture(*inputs, PLAIN, dropout=False)[0].sum().backward()
    for name, tensor, gradient in zip(NAMES, inputs, expected):
        assert (tensor.grad is None) == (name in frozen)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient)


def test_dropout_drops_entries_of_the_experts_input_only():
    options = PLAIN._replace(dropout=0.5)
    inputs = random_inputs(options, 3, 2, 8, 5, (64,), torch.float32, torch.float32)[:4]
    dropped, in_training = mixture(*inputs, options, dropout=True)
    kept, in_evaluation = mixture(*inputs, options, dropout=False)
    assert not torch.allclose(dropped, kept)
    torch.testing.assert_close(in_training, in_evaluation)


@pytest.mark.parametrize("dropout", [0.001, 0.05, 0.5, 0.99])
def test_dropout_drops_each_entry_as_often_as_it_should(dropout):
    keep = dropout_mask(torch.empty(200_000, 4), dropout)  # each row from one random word
    deviation = (dropout * (1 - dropout) / len(keep)) ** 0.5
    assert ((keep.double().mean(0) - (1 - dropout)).abs() < 5 * deviation).all()
    assert torch.corrcoef(keep.t().double()).triu(1).abs().max() < 5 / len(keep) ** 0.5


def test_dropout_masks_have_any_shape():
    assert [dropout_mask(torch.empty(shape), 0.5).shape for shape in [(0, 3), (1, 1), (7, 3)]] == [
        (0, 3),
        (1, 1),
        (7, 3),
    ]


def test_dropout_keeps_the_mean():
    x, A, B = torch.ones(20000, 8), torch.ones(1, 8), torch.ones(1, 1)
    options = MixtureOptions([0], 1.0, 1.0, 0.25, top_k=None, balance_detach=False)
    output, _ = mixture(x, A, B, torch.zeros(2, 8), options, dropout=True)
    assert output.mean().item() == pytest.approx(0.5 * 8, rel=0.01)  # the gate of one of two experts


@pytest.mark.parametrize("dropout", [1e-6, 0.001, 0.3, 0.9, 0.999, 0.99999, 1 - 1e-9])
def test_the_factor_makes_up_for_what_the_mask_drops(dropout):
    assert MixtureOptions((0,), dropout=dropout).factor(torch.ones(1)) == 1 / (1 - drop_probability(dropout))
    entries = 50_000_000 if dropout > 0.999 else 1_000_000
    keep = dropout_mask(torch.empty(entries), dropout)
    deviation = (drop_probability(dropout) * (1 - drop_probability(dropout)) / entries) ** 0.5
    assert abs(keep.sum(dtype=torch.float64).item() / entries - (1 - drop_probability(dropout))) < 5 * deviation


def test_the_gradient_of_the_gradient_is_right_or_refused(input_size):
    torch.manual_seed(0)
    inputs = random_inputs(PLAIN, **DOUBLE)[:4]

    def run(*tensors):
        return mixture(*tensors, PLAIN, dropout=False)[0]

    if input_size == "small":
        assert torch.autograd.gradgradcheck(run, inputs)
    else:
        (gradient,) = torch.autograd.grad(run(*inputs).sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            gradient.sum().backward()


def test_without_gradient_the_same_numbers_come_without_the_operator():
    inputs = random_inputs(PLAIN, 3, 2, 8, 5, (4,), torch.float32, torch.float32)
    results = [mixture(*inputs[:4], PLAIN, dropout=False, base=inputs[4])]
    with torch.inference_mode():
        results.append(mixture(*inputs[:4], PLAIN, dropout=False, base=inputs[4]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(dropout):
    options = PLAIN._replace(dropout=dropout)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        inputs = random_inputs(options, 3, 2, 8, 5, (4,), torch.float32, torch.float32)[:4]

        def run(*tensors):
            return mixture(*tensors, options, dropout=True)[0]

        torch.manual_seed(1)
        output = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)
        output.sum().backward()
        gradients.append([t.grad for t in inputs])
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


OPCHECKS = {
    "plain": ({}, False, "none"),
    "dropout": ({"dropout": 0.3}, True, "output"),
    "inside": ({"top_k": 2}, False, "weight"),
    "null experts": ({"experts": [1, 2], "balance_detach": True}, True, "weight"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OPCHECKS)
def test_operators_are_registered_as_torch_wants(case, dtype):
    changes, dropped, base = OPCHECKS[case]
    options = PLAIN._replace(**changes)
    *inputs, output = random_inputs(options, 3, 2, 8, 5, (4,), dtype, torch.float32)
    keep = dropout_mask(inputs[0], 0.3) if dropped else None
    weight = torch.randn(5, 8, dtype=dtype) if base == "weight" else None
    arguments = (*inputs, keep, output if base == "output" else None, weight, None, *options)
    torch.library.opcheck(OPERATOR, arguments)
    inputs = [t.detach() for t in inputs]
    with torch.no_grad():
        output, probabilities, hidden = OPERATOR(*inputs, *arguments[4:])
    needs = [True, True, False, True]
    more = (keep, weight, probabilities, hidden, *options, needs)
    torch.library.opcheck(BACKWARD_OPERATOR, (output, torch.ones_like(probabilities), *inputs, *more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 40])
def test_the_output_is_contiguous_whatever_the_base_layer_returned(tokens, dtype):
    inputs = random_inputs(PLAIN, 3, 2, 8, 5, (tokens,), torch.bfloat16, torch.float32)[:4]
    transposed = torch.randn(5, tokens, dtype=dtype).t()
    torch.library.opcheck(OPERATOR, (*inputs, None, transposed, None, None, *PLAIN))
    output, _ = mixture(*inputs, PLAIN, dropout=False, base=transposed)
    assert output.is_contiguous()
    alone, _ = mixture(*inputs, PLAIN, dropout=False)
    torch.testing.assert_close(output, (transposed + alone.float()).to(dtype), rtol=2e-2, atol=2e-2)


COMPILED = {
    "plain": ({}, (20,), "none"),
    "one token": ({}, (1,), "output"),
    "dropout": ({"dropout": 0.3}, (4, 5), "output"),
    "router in float64": ({"router_dtype": torch.float64, "dropout": 0.3}, (20,), "weight"),
    "sparse": ({"top_k": 2, "experts": [0, 2], "balance_detach": True}, (3, 5), "none"),
}


def graph_and_gradients(call, case, dtype):
    """Output, probabilities and all gradients of the mixture in a case of COMPILED."""
    changes, leading, added = COMPILED[case]
    options = PLAIN._replace(**changes)
    torch.manual_seed(0)
    inputs = random_inputs(options, 3, 2, 8, 5, leading, dtype, torch.promote_types(dtype, torch.float32))
    linear = {"weight": torch.randn(5, 8, dtype=dtype)} if added == "weight" else {}
    base = inputs[4] if added == "output" else None
    output, probabilities = call(*inputs[:4], options, dropout=True, base=base, **linear)
    torch.autograd.backward([output, probabilities], [torch.randn_like(output), torch.randn_like(probabilities)])
    return [output.detach(), probabilities.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_it_is_one_graph_with_the_same_numbers(case):
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    results = [graph_and_gradients(call, case, torch.float64) for call in (mixture, compiled)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("case", ["plain", "sparse"])
def test_inductor_fuses_it_and_keeps_its_precision(case):
    compiled = torch.compile(mixture, fullgraph=True)
    results = [graph_and_gradients(call, case, torch.bfloat16) for call in (mixture, compiled)]
    for index, (eager, fused) in enumerate(zip(*results)):
        assert fused.dtype == eager.dtype
        probabilities = index == 1
        assert relative_error(fused, eager.double()) < TOLERANCE[torch.float32 if probabilities else torch.bfloat16]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_drops_in_both_directions_what_one_mask_says():
    options, x = MixtureOptions([0], 1.0, 1.0, 0.5, top_k=None, balance_detach=False), torch.ones(512, 64)
    inputs = x.requires_grad_(), torch.eye(64), torch.eye(64), torch.zeros(1, 64)
    compiled = torch.compile(mixture, fullgraph=True)
    kept, other = (compiled(*inputs, options, dropout=True)[0] for _ in range(2))
    kept.sum().backward()
    assert kept.unique().tolist() == [0, 2]
    assert (kept == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(x.grad, kept)
    assert not torch.equal(other, kept)


def test_options_can_be_copied_with_their_layer():
    assert copy.deepcopy(PLAIN) == PLAIN


def test_reference_written_out_for_two_experts_of_rank_one():
    x, router = torch.tensor([2.0, 3.0]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    router[1, 0] = torch.log(torch.tensor(3.0)) / 2  # gates 1/4 and 3/4
    A, B = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 10.0]])
    output, probabilities = reference.mixture(x, A, B, router, scaling=2.0)
    torch.testing.assert_close(probabilities, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(output, torch.tensor([2 * (0.25 * 2 * 1 + 0.75 * 3 * 10)]))
