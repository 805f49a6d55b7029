import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_loramoe.ops import mixture, reference


# Relative to the float64 result; the hidden projection and the gates are rounded to the activations' dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

shapes = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 33), st.integers(1, 29))


def random_mixture(num_experts, r, in_features, out_features, leading, dtype):
    x = torch.randn(*leading, in_features).to(dtype)
    A, B = torch.randn(num_experts * r, in_features), torch.randn(out_features, num_experts * r)
    gates = torch.softmax(torch.randn(*leading, num_experts), dim=-1)
    return x, A, B, gates


def relative_error(value, expected):
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@given(shapes, st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_stacked_form_agrees_with_the_formula_in_output_and_gradients(shape, leading, dtype, seed):
    torch.manual_seed(seed)
    inputs = [t.requires_grad_() for t in random_mixture(*shape, leading, dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    output, expected = mixture(*inputs), reference.mixture(*exact)
    assert output.dtype == dtype and output.shape == expected.shape
    gradient = torch.randn_like(expected)
    output.backward(gradient.to(dtype))
    expected.backward(gradient)
    if output.numel():
        assert relative_error(output, expected) < TOLERANCE[dtype]
        for value, reference_value in zip(inputs, exact):
            assert value.grad.dtype == value.dtype
            tolerance = max(TOLERANCE[dtype], TOLERANCE[value.dtype])
            assert relative_error(value.grad, reference_value.grad) < tolerance


def test_gradcheck():
    torch.manual_seed(0)
    inputs = [t.double().requires_grad_() for t in random_mixture(3, 2, 5, 4, (2, 3), torch.float64)]
    assert torch.autograd.gradcheck(mixture, inputs)


def test_reference_written_out_for_two_experts_of_rank_one():
    x, gates = torch.tensor([2.0, 3.0]), torch.tensor([0.25, 0.75])
    A, B = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 10.0]])
    assert reference.mixture(x, A, B, gates).item() == 0.25 * 2 * 1 + 0.75 * 3 * 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_activations_dtype_under_float32_masters(dtype):
    x, A, B, gates = random_mixture(2, 2, 6, 5, (3,), dtype)
    assert mixture(x, A, B, gates).dtype == dtype
