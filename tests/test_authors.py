"""The authors' released arithmetic, written once more, against this package with the switches set to it.

Per-expert A and B, softmax router, unmasked sums over tokens, var / mean^2 of importance times 1 +- delta, each
layer's term times blc_weight added to the loss. Their task type 1 owns the first half of the experts: type 0 here.
"""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_loramoe import LoRAMoEConfig, balance_loss


N, R, ALPHA, BLC_ALPHA, BLC_WEIGHT = 6, 4, 32, 0.1, 0.1


class AuthorsLinear(nn.Module):
    """One adapted linear of the authors' code."""

    def __init__(self, base, A, B, route):
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterList([nn.Parameter(block.clone()) for block in A.split(R, dim=0)])
        self.lora_B = nn.ParameterList([nn.Parameter(block.clone()) for block in B.split(R, dim=1)])
        self.lora_route = nn.Parameter(route.clone())

    def forward(self, x, task_types):
        result = self.base(x)
        route_weight = torch.softmax(x @ self.lora_route.T, dim=-1)
        for i in range(N):
            result = result + route_weight[:, :, i : i + 1] * (x @ self.lora_A[i].T @ self.lora_B[i].T) * (ALPHA / R)
        first = (task_types == 1).view(-1, 1).repeat(1, N // 2)
        matches = torch.cat([first, ~first], dim=-1)
        weighted = (route_weight.sum(dim=1) * torch.where(matches, 1 + BLC_ALPHA, 1 - BLC_ALPHA)).flatten()
        return result, weighted.var() / (weighted.mean() ** 2 + 1e-10) * BLC_WEIGHT


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_of_the_authors_code_are_reproduced(seed):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    config = LoRAMoEConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=["0", "2"],
        init_weights=False,
        balance_loss_weight=BLC_WEIGHT,
        balance_delta=BLC_ALPHA,
        balance_detach=False,
        balance_target="paper",
        balance_formula="cv_squared",
        balance_importance="sum",
    )
    model = get_peft_model(base, config)
    layers = [model.base_model.model[i] for i in (0, 2)]
    ours = [layer.loramoe_experts["default"] for layer in layers]
    theirs = [AuthorsLinear(layer.base_layer, e.A.data, e.B.data, e.router.data) for layer, e in zip(layers, ours)]

    x, wanted, types = torch.randn(5, 7, 10), torch.randn(5, 7, 8), torch.tensor([1, 0, 0, 1, 1])
    hidden, first = theirs[0](x, types)
    output, second = theirs[1](torch.tanh(hidden), types)
    expected = nn.functional.mse_loss(output, wanted) + first + second
    expected.backward()

    loss = nn.functional.mse_loss(model(x, task_types=1 - types), wanted) + balance_loss(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for mine, original in zip(ours, theirs):
        gradients = {
            "A": torch.cat([block.grad for block in original.lora_A]),
            "B": torch.cat([block.grad for block in original.lora_B], dim=1),
            "router": original.lora_route.grad,
        }
        for name, gradient in gradients.items():
            error = (getattr(mine, name).grad - gradient).norm() / gradient.norm()
            assert error < 1e-6, (name, error)
