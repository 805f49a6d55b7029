"""What a run learned and what it kept: losses without and with the adapter, and where the routers send the tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from ..balance import layer_routing
from ..config import LoRAMoEConfig
from ..modes import evaluation_mode
from .records import IGNORED


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


@dataclass(frozen=True)
class Retention:
    """Base model and adapted model on the same samples.

    Attributes:
        samples: how many.
        loss_before: loss of the base model, nats per label token.
        loss_after: loss with the adapter.
        kept_weight: router weight on the groups that stand for what the model knows (the null groups; without any,
            group 0), mean over the adapted linears and the tokens.
    """

    samples: int
    loss_before: float
    loss_after: float
    kept_weight: float


def knowledge_groups(config: LoRAMoEConfig) -> list[int]:
    """The expert groups that stand for what the model knows: the null groups, or else group 0."""
    return list(config.null_groups or [0])


def measure_retention(
    trainer: Trainer, dataset: Dataset, progress: Callable[[int], object] | None = None
) -> Retention:
    """Compare the trainer's model with and without its adapter. All processes have to call it.

    Args:
        trainer: after training, or before; its model has one LoRAMoE adapter.
        dataset: columns `input_ids` and `labels`.
        progress: called with 1 after each batch of this process.
    """
    accelerator: Any = trainer.accelerator
    wrapped, model = trainer.model_wrapped, accelerator.unwrap_model(trainer.model)
    groups = knowledge_groups(model.peft_config[model.active_adapter])
    sums: dict[str, torch.Tensor] = defaultdict(
        lambda: torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    )
    with evaluation_mode(model), torch.no_grad():
        loader = trainer.get_eval_dataloader(cast("Any", dataset))  # annotated for data sets of torch only
        for batch in loader:
            inputs = {name: value for name, value in trainer._prepare_inputs(batch).items() if name != "task_types"}
            for name, adapter in (("before", model.disable_adapter()), ("after", nullcontext())):
                with adapter:
                    sums[name] += _loss_and_tokens(wrapped, inputs)
            sums["weight"] += _weight_and_tokens(model, groups).to(sums["after"])
            if progress is not None:
                progress(1)
    # Each process has its own batches.
    before, after, weight = (accelerator.reduce(sums[name]).tolist() for name in ("before", "after", "weight"))
    return Retention(len(dataset), before[0] / before[1], after[0] / after[1], weight[0] / weight[1])


def _loss_and_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Sum of the losses of a batch, and the number of label tokens."""
    tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
    # With a cache, transformers 4 does not look for samples that share a row.
    return torch.stack([model(**inputs, use_cache=False).loss.double() * tokens, tokens.double()])


def _weight_and_tokens(model: Any, groups: list[int]) -> torch.Tensor:
    """Sum over linears and tokens of the router weight on some groups, and the number of such tokens."""
    total = torch.zeros(2, dtype=torch.float64)
    for layer in layer_routing(model):
        weights = [layer.importance[:, layer.groups.slices[group]].sum() for group in groups]
        total += torch.stack([sum(weights[1:], weights[0]), layer.token_counts.sum()]).double().cpu()
    return total
