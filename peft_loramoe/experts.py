"""`LoRAExperts`: the mixture of one linear layer - its parameters, their initialisation and its forward pass."""

import math

import torch
from torch import Tensor, nn

from .groups import ExpertGroups
from .ops.mixture import MixtureOptions, mixture


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
        groups: the expert groups.
        options: scaling, router and dropout; `options.experts` are the experts that are not null.
        frozen: whether A and B stay as they are when the adapter is trained.

    Example:
        >>> import torch
        >>> from peft_loramoe.groups import ExpertGroups
        >>> from peft_loramoe.ops import MixtureOptions
        >>> groups = ExpertGroups((2, 2), null=(0,))
        >>> experts = LoRAExperts(16, 32, r=4, groups=groups, options=MixtureOptions(experts=groups.lora_experts))
        >>> experts.reset_parameters(init_weights=True, router_init="kaiming_uniform")
        >>> output, probabilities = experts(torch.randn(3, 16))
        >>> output.shape, probabilities.shape
        (torch.Size([3, 32]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        groups: ExpertGroups,
        options: MixtureOptions,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.r = r
        self.groups = groups
        self.options = options
        self.frozen = frozen
        self.loaded = False  # whether the values came from a checkpoint
        self.initial_scaling = options.scaling
        self.A = nn.Parameter(torch.empty(len(options.experts) * r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, len(options.experts) * r))
        self.router = nn.Parameter(torch.empty(groups.num_experts, in_features))

    @property
    def num_experts(self) -> int:
        """Number of router outputs, null experts included."""
        return self.groups.num_experts

    @property
    def scaling(self) -> float:
        """Factor on the experts' sum."""
        return self.options.scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.options = self.options._replace(scaling=value)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter by which FSDP policies recognise a leaf that is to be wrapped."""
        return self.A

    def reset_parameters(self, init_weights: bool | str, router_init: str) -> None:
        """Initialise all parameters in place.

        Args:
            init_weights: True for PEFT LoRA's start (A uniform, B zero, so the mixture adds nothing), "gaussian" for a
                normal A with standard deviation 1/r and B zero, False for random A and B.
            router_init: as in `initialise_router`.
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
        initialise_router(self.router, router_init)

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
            weight: instead, the frozen weight of a base layer that is to be computed here, shape (out_features,
                in_features).
            bias: its bias.

        Returns:
            The sum, or the mixture alone if neither is given, shape (..., out_features), in the dtype of `base`, or
            else of `x` (or the autocast dtype), and the router probabilities, shape (..., num_experts), float32 or
            float64.
        """
        return mixture(
            x, self.A, self.B, self.router, self.options, dropout=self.training, base=base, weight=weight, bias=bias
        )

    def extra_repr(self) -> str:
        """The mixture's shape, for `print(model)`."""
        out_features, in_features = self.B.shape[0], self.A.shape[1]
        text = f"in_features={in_features}, out_features={out_features}, r={self.r}, groups={list(self.groups.sizes)}"
        return text + (f", null_groups={list(self.groups.null)}" if self.groups.null else "")


def initialise_router(router: Tensor, router_init: str) -> None:
    """Initialise the rows of a router in place.

    Args:
        router: shape (num_experts, in_features).
        router_init: "kaiming_uniform" (what `nn.Linear` does), "normal" (standard deviation 0.02) or "zeros" (uniform
            routing).
    """
    if router_init == "kaiming_uniform":
        nn.init.kaiming_uniform_(router, a=math.sqrt(5))
    elif router_init == "normal":
        nn.init.normal_(router, std=0.02)
    else:
        nn.init.zeros_(router)
