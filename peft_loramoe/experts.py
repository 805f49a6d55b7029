"""`LoRAExperts`: the mixture of one linear layer - its parameters, their initialisation and its forward pass."""

import math

import torch
from torch import Tensor, nn

from .ops import Options, mixture


class LoRAExperts(nn.Module):
    """N LoRA experts and their softmax router for one linear layer (Dou et al. 2024, section 3.2).

    A leaf module that computes in its own `forward`, so that casting, copying, FSDP and ZeRO treat it as one unit.

    Parameters, where E is the number of experts that are not null:
        A: (E*r, in_features), expert i owns rows i*r to (i+1)*r.
        B: (out_features, E*r), the same columns.
        router: (num_experts, in_features).

    Args:
        in_features: input size of the linear layer.
        out_features: output size of the linear layer.
        r: rank of each expert.
        expert_groups: sizes of the expert groups; experts are numbered group by group.
        null_groups: indices of the groups whose experts are null: a router output, no parameters, no contribution.
        scaling: factor on the experts' sum (lora_alpha / r).
        dropout: probability of dropping an entry of the experts' input; all experts see the same dropped input, and the
            router the full one.
        temperature: router temperature.
        router_dtype: dtype of the router's logits.
        top_k: experts used by each token; None for all.
        balance_detach: hand out probabilities that carry gradient to the router but not to the layers below.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        expert_groups: list[int],
        null_groups: list[int],
        scaling: float,
        dropout: float,
        temperature: float,
        router_dtype: torch.dtype,
        top_k: int | None,
        balance_detach: bool,
    ) -> None:
        super().__init__()
        self.r = r
        self.expert_groups = expert_groups
        self.null_groups = null_groups
        self.scaling = self.initial_scaling = scaling
        self.dropout = dropout
        self.temperature = temperature
        self.router_dtype = router_dtype
        self.top_k = top_k
        self.balance_detach = balance_detach

        groups = [group for group, size in enumerate(expert_groups) for _ in range(size)]
        self.lora_experts = [i for i, group in enumerate(groups) if group not in null_groups]
        self.A = nn.Parameter(torch.empty(len(self.lora_experts) * r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, len(self.lora_experts) * r))
        self.router = nn.Parameter(torch.empty(sum(expert_groups), in_features))

    @property
    def num_experts(self) -> int:
        """Number of router outputs, null experts included."""
        return sum(self.expert_groups)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter by which FSDP policies recognise a leaf that is to be wrapped."""
        return self.A

    def reset_parameters(self, init_weights: bool | str, router_init: str) -> None:
        """Initialise all parameters in place.

        Args:
            init_weights: True for PEFT LoRA's start (A uniform, B zero, so the mixture adds nothing), "gaussian" for a
                normal A with standard deviation 1/r and B zero, False for random A and B.
            router_init: "kaiming_uniform" (what `nn.Linear` does), "normal" (standard deviation 0.02) or "zeros"
                (uniform routing).
        """
        if init_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init_weights is False:
            # fan-in of one expert, not of the stack: the start does not depend on how many experts there are
            nn.init.uniform_(self.B, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))
        else:
            nn.init.zeros_(self.B)
        if router_init == "kaiming_uniform":
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        elif router_init == "normal":
            nn.init.normal_(self.router, std=0.02)
        else:
            nn.init.zeros_(self.router)

    def forward(
        self,
        x: Tensor,
        base: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the mixture, and add it to the base layer's output.

        Args:
            x: input of the linear layer, shape (..., in_features), floating point.
            base: output of the base layer, shape (..., out_features); it is not written to.
            weight: instead, the frozen weight of a base layer that is to be computed here, shape (out_features, in_features).
            bias: its bias.

        Returns:
            The sum, or the mixture alone if neither is given, shape (..., out_features), in the dtype of `base`, or else of `x`
            (or the autocast dtype), and the router probabilities, shape (..., num_experts), float32 or float64.
        """
        options = Options(
            self.scaling,
            self.temperature,
            self.dropout,
            self.lora_experts,
            self.top_k,
            self.router_dtype,
            self.balance_detach,
        )
        return mixture(x, self.A, self.B, self.router, options, dropout=self.training, base=base, weight=weight, bias=bias)

    def extra_repr(self) -> str:
        """The mixture's shape, for `print(model)`."""
        out_features, in_features = self.B.shape[0], self.A.shape[1]
        text = f"in_features={in_features}, out_features={out_features}, r={self.r}, expert_groups={self.expert_groups}"
        return text + (f", null_groups={self.null_groups}" if self.null_groups else "")
