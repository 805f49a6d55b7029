"""`LoRAMoETrainerMixin`: Trainer and TRL's trainers with task types and the balance term."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import balance_loss, balance_terms, collect_balance
from ..balance.samples import label_tokens
from ..config import LoRAMoEConfig
from ..layer import LoRAMoELinear
from .callback import RouterCallback
from .collator import COLUMN, TaskTypeCollator
from .optimizer import router_multipliers, routers_share_a_group, set_router_rates


class LoRAMoETrainerMixin:
    """Task types and the balance term for any trainer class that derives from transformers' `Trainer`.

    Put it first; nothing else changes::

        class MyTrainer(LoRAMoETrainerMixin, SFTTrainer): ...

    A column `task_type` of the data sets (see `TaskTypeCollator`) reaches the model, also where the trainer calls it with
    arguments of its own choice, packs samples (TRL's "bfd" and "bfd_split") or flattens them. The balance term is added to
    the loss that `compute_loss` returns, once for each micro-batch, in training only, weighted as the trainer weights the
    micro-batches of an accumulated batch; all passes of one `compute_loss` count as one batch. A `RouterCallback` among the
    callbacks adds its numbers to the trainer's log. With a model without LoRAMoE layers the trainer is the plain one.

    The routers learn at `router_lr_multiplier` (of the config) times `learning_rate`, with any `optim` of the training
    arguments; its options, weight decay included, stay as they are. Groups that are passed to the trainer
    (`optimizer_groups` makes some) are kept, with a warning if they give routers and experts one rate.

    Raises:
        ValueError: FSDP 1 with `use_orig_params=False`, context or sequence parallelism, "wrapped" packing, a
            `compute_loss` that passes the adapted model by, or an optimizer whose rate is the same for all parameters
            (LOMO, layer-wise ones, an optimizer or a scheduler in DeepSpeed's own configuration) while
            `router_lr_multiplier` is not 1.
    """

    _warned_of_router_rate = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _config_of(self.model) is not None:
            _check_parallelism(self.accelerator)
            if _has_router_rates(self.model):
                self._check_optimizer()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss, in training plus the balance term."""
        inputs = dict(inputs)
        task_types = inputs.pop("task_types", None)
        share = self._share(inputs, num_items_in_batch)  # before super() takes the labels out
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        config = _config_of(model)
        if config is None or not model.training or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, **options)
        with collect_balance(model, task_types):
            result = super().compute_loss(model, inputs, **options)
        if not balance_terms(model) and config.balance_loss_weight > 0:
            raise ValueError(
                f"{type(self).__name__}.compute_loss called no LoRAMoE layer through the model's forward, so there is no "
                "balance term: are the adapters disabled, or does a fused loss read the weights itself? Change that, or set "
                "balance_loss_weight=0."
            )
        loss = result[0] if return_outputs else result
        loss = loss + (balance_loss(model) * share).to(loss.device, loss.dtype)
        return (loss, *result[1:]) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's optimizer, with the routers in groups of their own unless `router_lr_multiplier` is 1."""
        trained = self.model if model is None else model
        _, options = self.optimizer_cls_and_kwargs or (None, {})
        given = self.optimizer is not None or "params" in options
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        if not _has_router_rates(trained):
            return optimizer
        if not given:
            set_router_rates(optimizer, trained)
        elif routers_share_a_group(optimizer, trained) and not self._warned_of_router_rate:
            self._warned_of_router_rate = True
            warnings.warn(
                "The optimizer given to the trainer has routers and other parameters in one group, so they have one "
                "learning rate and router_lr_multiplier has no effect. Make its groups with "
                "peft_loramoe.training.optimizer_groups(model, lr), let the trainer make the optimizer, or set "
                "router_lr_multiplier=1."
            )
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with what `RouterCallback` measured in this step."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RouterCallback):
                logs = {**logs, **callback.take()}
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_test_dataloader(*args, **kwargs)

    def _check_optimizer(self) -> None:
        name = getattr(self.args.optim, "value", self.args.optim)
        own_rate = "lomo" in name or name.endswith("layerwise")
        if own_rate and self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            raise ValueError(
                f"optim='{name}' updates all parameters with one learning rate during the backward pass; choose another, "
                "or set router_lr_multiplier=1."
            )
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
            for section in ("optimizer", "scheduler"):
                if section in config:
                    raise ValueError(
                        f"The DeepSpeed configuration has a section '{section}', which gives all parameters one learning rate. "
                        "Remove it, so that `optim` and `lr_scheduler_type` of the training arguments count, or set "
                        "router_lr_multiplier=1."
                    )

    @contextmanager
    def _task_types_collated(self) -> Iterator[None]:
        # Only while a loader is made: trainers look at the class of their collator.
        collator, config = self.data_collator, _config_of(self.model)
        if config is not None and not isinstance(collator, TaskTypeCollator):
            self.data_collator = TaskTypeCollator(collator, config)
        try:
            yield
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns and _config_of(self.model) is not None:
            self._signature_columns = [*self._signature_columns, COLUMN]

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's preparation; where it packs, the task types are packed too (TRL keeps its own columns only)."""
        prepare = super()._prepare_dataset
        call = inspect.signature(prepare).bind(*args, **kwargs).arguments
        if COLUMN not in (call["dataset"].column_names or []):
            return prepare(*args, **kwargs)
        packing, options = call.get("packing", False), call["args"]
        call["args"] = copy.copy(options)
        call["args"].use_liger_kernel = False  # here TRL only dropped columns for it
        if packing:
            call["packing"] = False
            call["args"].max_length = None  # packing cuts
        dataset = prepare(**call)
        return _pack(dataset, options) if packing else dataset

    def _share(self, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """The part of an accumulated batch's term that this micro-batch contributes."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            normalised = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = normalised or self.compute_loss_func is not None
        if not scaled:
            return 1.0  # the trainer divides the loss by the number of micro-batches
        tokens = label_tokens(inputs, getattr(self, "_loss_shifts_labels", False))
        if num_items_in_batch is None or tokens is None:
            return 1 / self.current_gradient_accumulation_steps
        # Tokens of all processes are counted, whose gradients are averaged.
        processes = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return tokens * processes / num_items_in_batch


def _config_of(model: nn.Module) -> LoRAMoEConfig | None:
    """The configuration of the active (or else any) LoRAMoE adapter."""
    layer = next((m for m in model.modules() if isinstance(m, LoRAMoELinear)), None)
    if layer is None:
        return None
    return next(layer.recorder.configs[name] for name in (*layer.active_adapters, *layer.loramoe_experts))


def _has_router_rates(model: nn.Module) -> bool:
    return any(multiplier != 1 for multiplier in router_multipliers(model).values())


def _check_parallelism(accelerator: Any) -> None:
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1 and not fsdp.use_orig_params:
        raise ValueError(
            "FSDP 1 with use_orig_params=False joins frozen and trained parameters into one; set fsdp_version: 2, or "
            "fsdp_use_orig_params: true."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    for kind in ("cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False):
            raise ValueError(
                f"{kind}_size={getattr(parallelism, f'{kind}_size')} splits samples between processes, and a sample's routing "
                f"cannot be balanced in parts; set {kind}_size=1."
            )


def _pack(dataset: Any, options: Any) -> Any:
    """Pack a prepared data set as TRL does, the task types with it, one for each token."""
    from trl import pack_dataset

    if options.packing_strategy == "wrapped":
        raise ValueError(
            "packing_strategy='wrapped' keeps no boundaries between samples, so task types cannot be attributed; use 'bfd' or "
            f"'bfd_split', or leave the column {COLUMN} out."
        )
    dataset = dataset.map(lambda example: {COLUMN: [example[COLUMN]] * len(example["input_ids"])})
    by_token = ("input_ids", "labels", "completion_mask", "assistant_masks", COLUMN)
    dataset = dataset.select_columns([name for name in by_token if name in dataset.column_names])
    packed = pack_dataset(dataset, options.max_length, options.packing_strategy)
    return packed.shuffle(seed=options.seed) if options.shuffle_dataset else packed
