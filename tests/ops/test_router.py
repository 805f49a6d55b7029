import pytest
import torch

from peft_loramoe.ops.router import (
    ENTRIES_AT_A_TIME,
    project,
    router_probabilities,
    select_gates,
    select_gates_backward,
    softmax_backward,
    split_in_bfloat16,
)


pytestmark = pytest.mark.version_independent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 5, ENTRIES_AT_A_TIME["cpu"] // 64 + 3])
def test_logits_are_accurate_to_float32_whatever_the_activations(dtype, tokens):
    torch.manual_seed(0)
    x, router = torch.randn(tokens, 64).to(dtype), torch.randn(3, 64)
    logits = project(x, router, torch.float32)
    exact = x.double() @ router.double().T
    assert logits.dtype == torch.float32 and logits.shape == (tokens, 3)
    # The bound of a sum of 64 products, each rounded.
    assert ((logits - exact).abs() <= 64 * 2**-24 * (x.double().abs() @ router.double().abs().T)).all()


def test_three_bfloat16_hold_a_float32():
    router = torch.randn(1000)
    assert torch.equal(sum(part.double() for part in split_in_bfloat16(router)), router.double())


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_accurate_to_float32_on_cuda(masters):
    torch.manual_seed(0)
    x, router = torch.randn(70, 64).bfloat16(), torch.randn(3, 64).to(masters)
    logits = project(x.cuda(), router.cuda(), torch.float32).cpu()
    assert logits.dtype == torch.float32 and logits.shape == (70, 3)
    bound = 64 * 2**-22 * (x.double().abs() @ router.double().abs().T)  # the order of tensor cores' sums is their own
    assert ((logits - x.double() @ router.double().T).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_in_the_dtype_that_is_asked_for(dtype):
    x, router = torch.randn(5, 8), torch.randn(3, 8)
    torch.testing.assert_close(project(x, router, dtype), x.to(dtype) @ router.to(dtype).T)


def test_probabilities_are_the_softmax_of_the_logits_over_the_temperature():
    logits = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(router_probabilities(logits, 2.0), torch.softmax(logits / 2.0, dim=-1))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_probabilities_are_at_least_float32(dtype, expected):
    assert router_probabilities(torch.randn(5, 3, dtype=dtype), 1.0).dtype == expected


def test_float16_activations_do_not_overflow():
    x = torch.full((2, 8), 60000.0, dtype=torch.float16)
    router = torch.tensor([[10.0] * 8, [-10.0] * 8])
    probabilities = router_probabilities(project(x, router, torch.float32), 1.0)
    torch.testing.assert_close(probabilities, torch.tensor([[1.0, 0.0]] * 2))


def test_top_k_keeps_the_largest_gates_and_renormalises():
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(select_gates(probabilities, [0, 1, 2, 3], 2), torch.tensor([[0.0, 4 / 7, 3 / 7, 0.0]]))


def test_null_experts_have_no_gate_but_are_chosen_like_others():
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(select_gates(probabilities, [0, 2], None), torch.tensor([[0.1, 0.3]]))
    torch.testing.assert_close(select_gates(probabilities, [0, 2], 2), torch.tensor([[0.0, 3 / 7]]))


def test_dense_gates_are_the_probabilities():
    probabilities = torch.softmax(torch.randn(2, 4), dim=-1)
    assert select_gates(probabilities, [0, 1, 2, 3], None) is probabilities


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [1, 3]])
def test_gradients_are_autograds(experts, top_k):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    probabilities = router_probabilities(logits, 0.7)
    gates = select_gates(probabilities, experts, top_k)
    gradient = torch.randn_like(gates)
    (expected,) = torch.autograd.grad(gates, logits, gradient)
    through = select_gates_backward(gradient, probabilities.detach(), experts, top_k)
    torch.testing.assert_close(softmax_backward(through, probabilities.detach(), 0.7), expected)
