"""Anchors, task types and the routers' learning rate in the training loop of PEFT's comparison."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from transformers import PreTrainedModel

from peft_loramoe import LoRAMoEConfig, __version__, balance_loss, collect_balance
from peft_loramoe.modes import base_model
from peft_loramoe.training import optimizer_groups
from peft_loramoe.training.anchor_pass import AnchorBatches, divergence, predictions


# What LoRAMoETrainerMixin does by default with batches of four.
ANCHORS_PER_STEP = 1
ANCHOR_KL_WEIGHT = 0.3


class AnchoredModel(PeftModelForCausalLM):
    """A PEFT model that learns from a few anchors beside each training batch.

    In a training pass, LoRAMoE layers see the batch as task type 1 and the anchors as type 0. The gradient of
    `outputs.loss` is that of the batch's loss, plus the weighted divergence KL(base model || model) on the anchors,
    plus the balance term. Its value is the batch's loss alone, so that PEFT's training loss means the same for all methods.

    Args:
        base_model: the base model.
        config: of an adapter of any PEFT method.
        anchors: drawn from, one step after the other.
        options: of `PeftModel`.
    """

    def __init__(
        self, base_model: PreTrainedModel, config: PeftConfig, anchors: AnchorBatches, **options: Any
    ) -> None:
        super().__init__(base_model, config, **options)
        self._anchors, self._step = anchors, 0

    def forward(self, *args: Any, **batch: Any) -> Any:
        """The outputs for a batch, in training with the loss above."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **batch)
        anchors = {
            name: tensor.to(self.device) for name, tensor in self._anchors.draw(ANCHORS_PER_STEP, self._step).items()
        }
        self._step += 1
        with base_model(self):
            expected, _ = predictions(super().forward(**anchors).logits, anchors)
        is_mixture = isinstance(self.peft_config[self.active_adapter], LoRAMoEConfig)
        if is_mixture:
            batch["task_types"] = batch["input_ids"].new_ones(len(batch["input_ids"]))
            anchors["task_types"] = anchors["input_ids"].new_zeros(ANCHORS_PER_STEP)
        with collect_balance(self) if is_mixture else nullcontext():
            outputs = super().forward(*args, **batch)
            predicted, _ = predictions(super().forward(**anchors).logits, anchors)
            added = ANCHOR_KL_WEIGHT * divergence(expected, predicted)
        if is_mixture:
            added = added + balance_loss(self)
        outputs.loss = outputs.loss + (added - added.detach())
        return outputs


def install(utils: ModuleType, anchors: Path) -> None:
    """Replace three functions of PEFT's `utils.py`, before its `run.py` imports them.

    Args:
        utils: the module.
        anchors: JSONL file of anchors.
    """
    make_optimizer, write_log = utils.get_optimizer_and_scheduler, utils.log_to_file

    def get_peft_model(base_model: PreTrainedModel, config: PeftConfig, **options: Any) -> AnchoredModel:
        config.base_model_name_or_path = base_model.name_or_path
        longest = base_model.config.max_position_embeddings
        tokenizer = utils.get_tokenizer(model_id=base_model.name_or_path, max_seq_length=longest)
        return AnchoredModel(base_model, config, AnchorBatches(anchors, tokenizer, max_length=longest), **options)

    def get_optimizer_and_scheduler(model: AnchoredModel, *, optimizer_type: str, **options: Any) -> tuple[Any, Any]:
        parameters: Any = model
        if isinstance(model.peft_config[model.active_adapter], LoRAMoEConfig):
            if not hasattr(torch.optim, optimizer_type):
                raise ValueError(
                    f"optimizer_type={optimizer_type!r} is for other PEFT methods; choose one of torch.optim."
                )
            parameters = _Groups(optimizer_groups(model, lr=options.get("lr")))
        return make_optimizer(parameters, optimizer_type=optimizer_type, **options)

    def log_to_file(*, log_data: dict[str, Any], save_dir: str, **options: Any) -> None:
        log_data["run_info"]["peft_loramoe"] = {
            "version": __version__,
            "anchors_sha256": hashlib.sha256(anchors.read_bytes()).hexdigest(),
            "anchors_per_step": ANCHORS_PER_STEP,
            "anchor_kl_weight": ANCHOR_KL_WEIGHT,
        }
        write_log(log_data=log_data, save_dir=save_dir, **options)
        print(f"The log is in {save_dir}")
        if log_data["train_info"]["status"] != "success":
            raise SystemExit(f"The run did not finish: {log_data['run_info']['error_msg']}")

    utils.get_peft_model = get_peft_model
    utils.get_optimizer_and_scheduler = get_optimizer_and_scheduler
    utils.log_to_file = log_to_file


class _Groups:
    """Parameter groups in the place of a model, for code that builds its optimizer of `model.parameters()`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def parameters(self) -> list[dict[str, Any]]:
        # Without weight_decay, so that the experiment's own applies.
        return [{name: group[name] for name in ("name", "params", "lr")} for group in self._groups]
