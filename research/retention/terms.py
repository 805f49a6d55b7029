"""Balance terms and routers that the package does not have, for the screening."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from peft_loramoe import LoRAExperts
from peft_loramoe.balance.constraint import balance_targets, balance_term
from peft_loramoe.groups import ExpertGroups


class Importance:
    """Importance with gradient of all linears, over the forward passes of one step.

    Args:
        model: a LoRAMoE model, all of whose linears have the same number of experts.
    """

    def __init__(self, model: nn.Module) -> None:
        experts = [module for module in model.modules() if isinstance(module, LoRAExperts)]
        self.groups = experts[0].groups
        self.probabilities: list[Tensor] = []
        self.passes: list[tuple[Tensor, Tensor]] = []
        for module in experts:
            module.register_forward_hook(lambda module, inputs, outputs: self.probabilities.append(outputs[1]))

    def end_pass(self, lengths: Sequence[int], types: Sequence[int]) -> None:
        """Average what was recorded in a packed row over the tokens of each sample."""
        of_samples = torch.stack(self.probabilities)[:, 0].split(list(lengths), dim=1)
        importance = torch.stack([part.mean(1) for part in of_samples], dim=1)
        self.passes.append((importance, torch.tensor(types, device=importance.device)))
        self.probabilities.clear()

    def pop(self) -> tuple[Tensor, Tensor]:
        """Importance, shape (linears, samples, experts), and task types, shape (samples,), of the step."""
        importance, types = (torch.cat(parts, dim) for parts, dim in zip(zip(*self.passes), (1, 0)))
        self.passes.clear()
        return importance, types


def sample_weights(types: Tensor) -> Tensor:
    """Weights of the samples with which each type that is present counts equally.

    They sum to one, shape (samples,).
    """
    counts = torch.bincount(types)[types]
    return 1 / counts / len(types.unique())


def class_equal(importance: Tensor, types: Tensor, groups: ExpertGroups, delta: float) -> Tensor:
    """The package's corrected, squared coefficient of variation, in which each type counts equally."""
    targets = balance_targets(types, groups, delta)
    Z = importance / (targets / targets.mean(-1, keepdim=True))
    weights = sample_weights(types)[:, None]
    mean = (weights * Z).sum(1).mean(-1)
    variance = (weights * (Z - mean[:, None, None]) ** 2).sum(1).mean(-1)
    return (variance / mean**2).sum()


def cross_entropy(importance: Tensor, types: Tensor, groups: ExpertGroups, delta: float) -> Tensor:
    """Cross-entropy of the groups' weights against (1 + delta) / 2 for the type's group; types count equally."""
    weights = torch.stack([importance[..., part].sum(-1) for part in groups.slices], dim=-1)
    target = (1 + delta * (2 * nn.functional.one_hot(types, len(groups)) - 1)) / len(groups)
    losses = -(target * weights.clamp(min=1e-6).log()).sum(-1)
    return (losses * sample_weights(types)).sum()


def package(importance: Tensor, types: Tensor, groups: ExpertGroups, delta: float) -> Tensor:
    """The package's default term."""
    targets = balance_targets(types, groups, delta)
    counts = torch.ones(len(types), dtype=torch.int64)
    return balance_term(importance, counts, targets, formula="cv_squared", target="corrected", importance="mean").sum()


TERMS: dict[str, Callable[[Tensor, Tensor, ExpertGroups, float], Tensor]] = {
    "package": package,
    "class_equal": class_equal,
    "cross_entropy": cross_entropy,
}


class NormalisedRouterExperts(LoRAExperts):
    """Experts whose router reads x divided by its root mean square; plain torch, dense, without dropout."""

    def forward(
        self, x: Tensor, base: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `LoRAExperts.forward`."""
        normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        probabilities = (normalised @ self.router.t()).softmax(-1)
        gates = probabilities[..., self.groups.lora_experts].repeat_interleave(self.r, dim=-1)
        mixture = ((x @ self.A.t()) * gates) @ self.B.t() * self.options.scaling
        if self.options.balance_detach:
            probabilities = (normalised.detach() @ self.router.t()).softmax(-1)
        base = nn.functional.linear(x, weight, bias) if weight is not None else base
        return (mixture if base is None else base + mixture), probabilities


def normalise_routers(model: nn.Module) -> None:
    """Make all experts of the model `NormalisedRouterExperts`."""
    for module in model.modules():
        if isinstance(module, LoRAExperts):
            module.__class__ = NormalisedRouterExperts
