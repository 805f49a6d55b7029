"""The mixture as its formula reads: one linear pair for each expert, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLoop(nn.Module):
    """``base_layer(x) + s * sum_i p_i(x) * B_i A_i drop_i(x)``, with N separate pairs of linears and N dropout masks.

    The order of operations is that of the authors' code (Dou et al. 2024): softmax in float32, gates in the dtype of
    the experts, every expert's whole output weighted and added. As in PEFT's LoRA, the input is cast to the adapters'
    dtype and the sum back to the base layer's.

    Args:
        base_layer: the frozen linear layer.
        in_features: its input size.
        out_features: its output size.
        experts: number of experts N.
        r: rank of each.
        scaling: factor s on the sum.
        dropout: probability of dropping an entry of an expert's input.
        dtype: dtype of the experts and the router.
        device: their device.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        *,
        experts: int,
        r: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        options = {"bias": False, "dtype": dtype, "device": device}
        self.base_layer = base_layer
        self.scaling = scaling
        self.router = nn.Linear(in_features, experts, **options)
        self.A = nn.ModuleList(nn.Linear(in_features, r, **options) for _ in range(experts))
        self.B = nn.ModuleList(nn.Linear(r, out_features, **options) for _ in range(experts))
        self.dropout = nn.Dropout(dropout)
        for B in self.B:
            nn.init.zeros_(B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in_features) to (..., out_features), in the base layer's output dtype."""
        result = self.base_layer(x)
        dtype = result.dtype
        x = x.to(self.router.weight.dtype)
        gates = F.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)
        for i, (A, B) in enumerate(zip(self.A, self.B)):
            result = result + gates[..., i : i + 1] * B(A(self.dropout(x))) * self.scaling
        return result.to(dtype)
