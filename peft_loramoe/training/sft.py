"""`LoRAMoESFTTrainer`: TRL's `SFTTrainer` for LoRAMoE. Importing this module needs trl."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from trl import SFTTrainer, get_training_chat_template

from ..config import LoRAMoEConfig
from ..options import number, optional
from .callback import active_config
from .optimizer import optimizer_groups
from .trainer import LoRAMoETrainerMixin


GENERATION = re.compile(r"\{%-?\s*generation\b")
REENTRANT = (
    "with DeepSpeed ZeRO-3, SFTTrainer makes it reentrant, which gives the balance term no gradient; use ZeRO-2 or "
    "FSDP"
)
LORAPLUS_RATIO = optional(number(0, 1e6, open_minimum=True, why="; with 1, B learns at the rate of A"))


class LoRAMoESFTTrainer(LoRAMoETrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with all that `LoRAMoETrainerMixin` adds.

    The adapter of a quantised model stays in float32: SFTTrainer alone casts it to bfloat16, in which the small steps
    of an optimizer are rounded away.

    Args:
        *args: those of `SFTTrainer`.
        loraplus_lr_ratio: the B matrices learn this many times faster than the A matrices (LoRA+); None for the same
            rate.
        **kwargs: those of `LoRAMoETrainerMixin` and `SFTTrainer`.

    Raises:
        TypeError: `loraplus_lr_ratio` is not a number, or what the mixin refuses.
        ValueError: `loraplus_lr_ratio` is out of its range or given with an optimizer, gradient checkpointing with
            DeepSpeed ZeRO-3 and a balance term, or what the mixin refuses.
    """

    def __init__(self, *args: Any, loraplus_lr_ratio: float | None = None, **kwargs: Any) -> None:
        self.loraplus_lr_ratio = LORAPLUS_RATIO("loraplus_lr_ratio", loraplus_lr_ratio)
        super().__init__(*args, **kwargs)
        if loraplus_lr_ratio is not None:
            given = {"optimizers": self.optimizer, "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs}
            if name := next((name for name, value in given.items() if value is not None), None):
                raise ValueError(
                    f"loraplus_lr_ratio={loraplus_lr_ratio} has no effect with {name}: pass optimizer_groups(model, "
                    f"lr, loraplus_lr_ratio={loraplus_lr_ratio}) to the optimizer instead."
                )
            self._check_one_rate("leave loraplus_lr_ratio out")
        if (config := active_config(self.model)) is not None and checkpointing_is_reentrant(self.args, config):
            raise ValueError(
                f"gradient_checkpointing=True: {REENTRANT}, or set gradient_checkpointing=False, or "
                "balance_loss_weight=0 in the adapter's configuration."
            )
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def create_optimizer(self, *model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `optim` in the training arguments, with the rates of LoRA+ and of the routers."""
        # Not before training, since FSDP replaces the parameters when it starts.
        if self.loraplus_lr_ratio is not None and self.optimizer is None:
            optimized: Any = model[0] if model else self.model  # transformers 5 passes what FSDP made of it
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, optimized)
            options["params"] = optimizer_groups(
                optimized,
                self.args.learning_rate,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer_cls_and_kwargs = (kind, options)
        return super().create_optimizer(*model)


def checkpointing_is_reentrant(args: TrainingArguments, config: LoRAMoEConfig) -> bool:
    """Whether SFTTrainer makes checkpointing reentrant, and the adapter has a balance term, which that would stop."""
    plugin = args.deepspeed_plugin
    zero_3 = plugin is not None and plugin.zero_stage == 3
    return zero_3 and bool(args.gradient_checkpointing and config.balance_loss_weight)


def marked_chat_template(tokenizer: Any) -> str | None:
    """A chat template that renders like the tokenizer's and marks the assistant's turns with {% generation %}.

    Args:
        tokenizer: has a chat template.

    Returns:
        The tokenizer's own template if it has the marks, or TRL's version of it; None if TRL knows none.
    """
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        return None
    # Before 1.16, TRL's templates do not always have the marks.
    marked: str = template["default"] if isinstance(template, dict) else template
    return marked if GENERATION.search(marked) else None
