import pytest
import torch

from peft_loramoe.routing import router_probabilities, select_gates


def test_probabilities_are_the_softmax_of_the_logits_over_the_temperature():
    x, router = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    expected = torch.softmax(x @ router.T / 2.0, dim=-1)
    torch.testing.assert_close(router_probabilities(x, router, 2.0, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_activations_are_routed_in_float32(dtype):
    x, router = torch.randn(5, 8).to(dtype), torch.randn(3, 8)
    probabilities = router_probabilities(x, router, 1.0, torch.float32)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, torch.softmax(x.float() @ router.T, dim=-1))


def test_float16_activations_do_not_overflow():
    x = torch.full((2, 8), 60000.0, dtype=torch.float16)
    router = torch.tensor([[10.0] * 8, [-10.0] * 8])
    probabilities = router_probabilities(x, router, 1.0, torch.float32)
    torch.testing.assert_close(probabilities, torch.tensor([[1.0, 0.0]] * 2))


def test_autocast_does_not_lower_the_router():
    x, router = torch.randn(5, 64), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = router_probabilities(x, router, 1.0, torch.float32)
    torch.testing.assert_close(probabilities, torch.softmax(x @ router.T, dim=-1))


def test_top_k_keeps_the_largest_gates_and_renormalises():
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(select_gates(probabilities, 2), torch.tensor([[0.0, 4 / 7, 3 / 7, 0.0]]))


@pytest.mark.parametrize("top_k", [None, 4])
def test_dense_gates_are_the_probabilities(top_k):
    probabilities = torch.softmax(torch.randn(2, 4), dim=-1)
    assert select_gates(probabilities, top_k) is probabilities
