"""Screening of the router alone: what it learns from the balance term on the base model's activations.

A detached term trains nothing but the router, which reads what the base model computes. So terms, learning rates,
starts and batches are compared on activations that are computed once, in seconds each; the tasks' loss, which pulls
the router too, is left out. The best go through `run`.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_loramoe.groups import ExpertGroups

from .base_model import load
from .knowledge import Encoder
from .methods import METHODS, Run
from .scoring import Item, base_of, pad
from .terms import TERMS
from .training import scored_sets, training_anchors, training_batches


BLOCKS = (1, 8, 15, 22, 28)
GROUPS = ExpertGroups((6, 6))


@dataclass(frozen=True)
class Variant:
    """A way of training routers; attributes as in `Method` and `LoRAMoEConfig`."""

    term: str = "package"
    weight: float = 0.1
    delta: float = 0.7
    router_lr_multiplier: float = 10.0
    router_init: str = "kaiming_uniform"
    normalised_router: bool = False
    anchors_per_step: float = 2.0
    steps: int = 64


VARIANTS = {
    "retain": Variant(),
    "router lr x1": Variant(router_lr_multiplier=1),
    "router lr x3": Variant(router_lr_multiplier=3),
    "router lr x30": Variant(router_lr_multiplier=30),
    "router lr x100": Variant(router_lr_multiplier=100),
    "zeros": Variant(router_init="zeros"),
    "class equal": Variant(term="class_equal"),
    "class equal, x30": Variant(term="class_equal", router_lr_multiplier=30),
    "cross-entropy": Variant(term="cross_entropy"),
    "cross-entropy, x30": Variant(term="cross_entropy", router_lr_multiplier=30),
    "cross-entropy, delta .9": Variant(term="cross_entropy", delta=0.9),
    "delta .9": Variant(delta=0.9),
    "class equal, delta .9": Variant(term="class_equal", delta=0.9),
    "normalised x": Variant(normalised_router=True),
    "normalised x, x1": Variant(normalised_router=True, router_lr_multiplier=1),
    "normalised x, class equal": Variant(normalised_router=True, term="class_equal"),
    "anchors at random": Variant(anchors_per_step=-2.0),
    "one anchor a step": Variant(anchors_per_step=1.0),
    "half an anchor a step": Variant(anchors_per_step=0.5),
    "half an anchor a step, class equal": Variant(anchors_per_step=0.5, term="class_equal"),
    "4 anchors a step": Variant(anchors_per_step=4.0),
    "16 steps": Variant(steps=16),
    "16 steps, class equal": Variant(steps=16, term="class_equal"),
}


class Activations:
    """What the linears of some blocks read, one tensor.

    (rows, width, in_features) for each, and the mask of the tokens.
    """

    def __init__(self, model: nn.Module, items: list[Item]) -> None:
        self.inputs: dict[str, Tensor] = {}
        handles = []
        for block in BLOCKS:
            feed_forward = base_of(model).model.layers[block].mlp
            for name in ("gate_proj", "down_proj"):  # up_proj reads what gate_proj reads

                def keep(module: nn.Module, inputs: tuple[Tensor], name: str = f"{block} {name}") -> None:
                    self.inputs[name] = inputs[0].bfloat16()

                handles.append(getattr(feed_forward, name).register_forward_pre_hook(keep))
        ids, self.mask = pad([item.before + item.answer for item in items])
        with torch.no_grad():
            base_of(model).model(input_ids=ids, attention_mask=self.mask, use_cache=False)
        for handle in handles:
            handle.remove()

    def importance(self, routers: dict[str, Tensor], normalised: bool) -> Tensor:
        """Mean router probabilities of each sample, shape (linears, rows, experts)."""
        found = []
        for name, router in routers.items():
            x = self.inputs[name].float()
            if normalised:
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            probabilities = (x @ router.t()).softmax(-1) * self.mask[:, :, None]
            found.append(probabilities.sum(1) / self.mask.sum(1)[:, None])
        return torch.stack(found)


def screen(seed: int, model_name: str | None = None, names: list[str] | None = None) -> list[dict[str, Any]]:
    """Train the routers of each variant; a row for each with the null group's weights on what is scored."""
    model, tokenizer = load(model_name)
    encoder = Encoder(tokenizer)
    one = Run("lora", seed)
    steps = [Activations(model, items) for items, _, _ in training_batches(METHODS["lora"], one, encoder)[:32]]
    anchors = training_anchors(encoder)
    random.Random(seed).shuffle(anchors)
    pool = [Activations(model, [anchor]) for anchor in anchors[:128]]
    scored = {}
    for name, (items, _) in scored_sets(encoder, 0.25).items():
        scored[name] = Activations(model, items)
    return [train_routers(name, VARIANTS[name], seed, steps, pool, scored) for name in names or VARIANTS]


def train_routers(
    name: str,
    variant: Variant,
    seed: int,
    steps: list[Activations],
    pool: list[Activations],
    scored: dict[str, Activations],
) -> dict[str, Any]:
    """Train one router for each linear with the balance term alone; returns a row."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    routers = {}
    for linear, x in steps[0].inputs.items():
        router = torch.zeros(GROUPS.num_experts, x.shape[-1])
        if variant.router_init == "kaiming_uniform":
            nn.init.kaiming_uniform_(router, a=math.sqrt(5))
        routers[linear] = router.requires_grad_()
    optimizer = torch.optim.AdamW(routers.values(), lr=1e-3 * variant.router_lr_multiplier, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 3) * (1 - i / variant.steps))
    curve = []
    for step in range(variant.steps):
        rate = variant.anchors_per_step
        if rate < 0:
            number = sum(draw.random() < -rate / 20 for _ in range(20))
        else:
            number = math.floor((step + 1) * rate) - math.floor(step * rate)
        beside = [pool[draw.randrange(len(pool))] for _ in range(number)]
        batch = [steps[step % len(steps)], *beside]
        importance = torch.cat([part.importance(routers, variant.normalised_router) for part in batch], dim=1)
        types = torch.tensor([1] * len(batch[0].mask) + [0] * len(beside))
        loss = variant.weight * TERMS[variant.term](importance, types, GROUPS, variant.delta)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in (0, 7, 15, 31, 63):
            curve.append([step + 1, *null_weights(importance, types)])
    row: dict[str, Any] = {"name": name, "variant": asdict(variant), "seed": seed, "blocks": BLOCKS, "curve": curve}
    with torch.no_grad():
        for kind, activations in scored.items():
            null = activations.importance(routers, variant.normalised_router)[..., GROUPS.slices[0]].sum(-1)
            row[kind] = {"mean": round(float(null.mean()), 3), "linears": [round(w, 3) for w in null.mean(1).tolist()]}
    return row


def null_weights(importance: Tensor, types: Tensor) -> list[float | None]:
    """Mean weight of the null group for samples of type 0 and of type 1."""
    null = importance.detach()[..., GROUPS.slices[0]].sum(-1)
    return [round(float(null[:, types == kind].mean()), 3) if (types == kind).any() else None for kind in (0, 1)]
