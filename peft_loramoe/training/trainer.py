"""`LoRAMoETrainerMixin`: Trainer and TRL's trainers with task types and the balance term."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..balance.results import configs_of, find_recorder
from ..balance.samples import label_tokens
from ..config import LoRAMoEConfig
from ..layer import first_layer
from .anchor_pass import AnchorPass, check_anchor_options
from .callback import RouterCallback, active_config
from .collator import COLUMN, TaskTypeCollator, default_task_type, example_types
from .optimizer import router_multipliers, routers_share_a_group, set_router_rates


# TRL's trainers whose loss calls the model with the rows of the batch several times over: all chosen answers, then all
# rejected ones.
IN_BLOCKS = frozenset({"DPOTrainer", "CPOTrainer", "ORPOTrainer", "RewardTrainer", "TPOTrainer"})
# TRL's trainers that generate in `_prepare_inputs` itself and keep the order of the prompts.
GENERATE_IN_ORDER = frozenset({"A2POTrainer"})


if TYPE_CHECKING:

    class _Trainer(Trainer):
        """What the mixin is put before: a trainer of transformers, with these methods if it is one of TRL's."""

        model: Any
        _prepare_dataset: Any
        _generate_and_score_completions: Any
        _prepare_training_batch: Any
        _get_model_forward_kwargs: Any
else:
    _Trainer = object


class LoRAMoETrainerMixin(_Trainer):
    """Task types and the balance term for any trainer class that derives from transformers' `Trainer`.

    Put it first; nothing else changes::

        class MyTrainer(LoRAMoETrainerMixin, SFTTrainer): ...

    A column `task_type` of the data sets (see `TaskTypeCollator`) reaches the model, also where the trainer calls it
    with arguments of its own choice, packs samples (TRL's "bfd" and "bfd_split"), flattens them or generates answers.
    The balance term is added to the loss that `compute_loss` returns, in training only; the micro-batches of an
    accumulated batch count equally, and all passes of one `compute_loss` form one batch. An optimizer step whose loss
    does not have the term is refused. A micro-batch without label tokens has a task loss of zero, and its term. A
    `RouterCallback` among the callbacks adds its numbers to the trainer's log, which also has the parts of `loss`: the
    task loss `model_loss` and the weighted `balance_loss`. With a model without LoRAMoE layers the trainer is the
    plain one.

    A trainer of your own whose `compute_loss` calls the model with the rows of the batch several times over, first all
    chosen, then all rejected answers, sets `task_types_in_blocks = True` in its class.

    Anchors are short texts that stand for what the model knows (`sample_anchors`). Every training micro-batch draws a
    few of them for a forward pass of their own, as samples of type 0: the balance term is computed over both. Samples
    are of type 1 then, unless the data set has a column `task_type`. Two means over the anchors' tokens are added to
    the loss, also for models without LoRAMoE layers: the language-modelling loss, times `anchor_loss_weight`, and the
    divergence KL(base model || model) of the predicted distributions, times `anchor_kl_weight`. They are logged
    unweighted, as `anchor_loss` and `anchor_kl`. The loss of the tasks, its labels and its normalisation stay as they
    are.

    Args:
        *args: those of the trainer.
        anchors: texts, or records with a `text`: a JSONL file of them, a data set with a column `text`, or a list.
            Needs a tokenizer as `processing_class`.
        anchor_loss_weight: weight of the language-modelling loss on the anchors; None for 0.
        anchor_kl_weight: weight of the divergence from the base model on the anchors, in nats; None for 0.3. Costs
            another forward pass of the anchors, with the adapters disabled; a model without an adapter, or whose base
            model is trained too (as by `bias="all"`), needs 0.
        anchors_per_batch: anchors of each micro-batch; None for a tenth of its samples, at least one.
        anchors_every: draw anchors for every n-th micro-batch only; None for 1.
        **kwargs: those of the trainer.

    The routers learn at `router_lr_multiplier` (of the config) times `learning_rate`, with any `optim` of the training
    arguments; its options, weight decay included, stay as they are. Groups that are passed to the trainer
    (`optimizer_groups` makes some) are kept, with a warning if they give routers and experts one rate.

    Raises:
        TypeError: an option is not a number, or the anchors are a mapping.
        ValueError: FSDP 1 with `use_orig_params=False`, context or sequence parallelism, rollouts by vLLM, "wrapped"
            packing, a `compute_loss` that passes the adapted model by, an optimizer step without the balance term
            (the trainer computes its loss elsewhere), rows without a task type, bad anchors, an option that is out of
            its range or has no effect, or an optimizer whose rate is the same for all parameters (LOMO, layer-wise
            ones, an optimizer or a scheduler in DeepSpeed's own configuration) while `router_lr_multiplier` is not 1.

    Example:
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> class LoRAMoETrainer(LoRAMoETrainerMixin, Trainer): ...
        >>> data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "task_type": 1}] * 4
        >>> args = TrainingArguments("run", max_steps=1, report_to="none", disable_tqdm=True)
        >>> trainer = LoRAMoETrainer(tiny_model(), args, train_dataset=data)
        >>> trainer.remove_callback(PrinterCallback)
        >>> trainer.train().global_step
        1
    """

    _warned_of_router_rate = False
    _term_step: int | None = None  # the optimizer step of the last loss that the term was added to
    _checked_optimizer: Any = None

    def __init__(
        self,
        *args: Any,
        anchors: str | Path | Iterable[str | Mapping[str, Any]] | None = None,
        anchor_loss_weight: float | None = None,
        anchor_kl_weight: float | None = None,
        anchors_per_batch: int | None = None,
        anchors_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_vllm(type(self).__name__, args, kwargs)
        anchor_options = check_anchor_options(
            anchors is not None,
            anchor_loss_weight=anchor_loss_weight,
            anchor_kl_weight=anchor_kl_weight,
            anchors_per_batch=anchors_per_batch,
            anchors_every=anchors_every,
        )
        super().__init__(*args, **kwargs)
        self._added, self._steps_added = {}, 0.0  # to the trainer's loss since it logged, over so many optimizer steps
        config = active_config(self.model)
        if config is not None:
            _check_parallelism(self.accelerator)
            if _has_router_rates(self.model):
                self._check_one_rate("set router_lr_multiplier=1")
        self._anchors: AnchorPass | None = None
        if anchors is not None:
            self._anchors = AnchorPass(self, config, anchors, anchor_options)

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
        config = active_config(model)
        training = model.training and torch.is_grad_enabled()
        if not training or (config is None and self._anchors is None):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        anchors = expected = None
        if self._anchors is not None and (anchors := self._anchors.draw(inputs)) is not None:
            expected = self._anchors.expected(model, anchors)
        if task_types is None and self._anchors is not None and config is not None:
            task_types = default_task_type(config)
        unlabelled = self._is_unlabelled(inputs)  # before super() takes the labels out
        options = {"return_outputs": return_outputs, "num_items_in_batch": _at_least_one(num_items_in_batch)}
        recorder = find_recorder(model)
        with recorder.collect(task_types, self._in_blocks, adds_term=True) if recorder else nullcontext():
            result: Any = super().compute_loss(model, inputs, **options)
            if _has_term(model) and not (recorder and recorder.recorded):
                raise ValueError(
                    f"{type(self).__name__}.compute_loss called no LoRAMoE layer in training mode through the model's "
                    "forward, so there is no balance term: is the model in eval mode, are the adapters disabled, or "
                    "does a fused loss read the weights itself? Change that, or set balance_loss_weight=0."
                )
            of_anchors = None
            if self._anchors is not None and anchors is not None:
                of_anchors = self._anchors.loss(model, anchors, expected)
        if config is not None:
            for callback in self._router_callbacks():
                for types in (task_types, None if anchors is None else 0):
                    callback.see(types, config)
        loss = result[0] if return_outputs else result
        if unlabelled is not None:  # the mean over no labels is not a number
            loss = torch.where(unlabelled.to(loss.device) & loss.isnan(), torch.zeros_like(loss), loss)
        self._term_step = self.state.global_step
        added = {"balance_loss": recorder.loss() if recorder else None, "anchors": of_anchors}
        for name, term in added.items():
            if term is not None:
                loss = loss + (term * self._accumulation_weight(num_items_in_batch)).to(loss.device, loss.dtype)
                self._added[name] = (
                    self._added.get(name, 0.0) + term.detach() / self.current_gradient_accumulation_steps
                )
        self._steps_added += 1 / self.current_gradient_accumulation_steps
        return (loss, *result[1:]) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's optimizer, with the routers in groups of their own unless `router_lr_multiplier` is 1."""
        trained = self.model if model is None else model
        _, options = self.optimizer_cls_and_kwargs or (None, {})
        given = self.optimizer is not None or "params" in options
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it, before a second call of train
        if isinstance(inner, torch.optim.Optimizer) and inner is not self._checked_optimizer:
            self._checked_optimizer = inner
            inner.register_step_pre_hook(lambda *_: self._check_term())
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
        """The trainer's log, with the parts of its loss, and what `RouterCallback` measured in this step."""
        of_training = {"loss", "learning_rate"} <= logs.keys()  # not a log of the user's own
        if of_training and self._added:
            means = {name: self._mean(total / self._steps_added) for name, total in self._added.items()}
            logs = {**logs, "model_loss": logs["loss"] - sum(means.values())}
            if "balance_loss" in means:
                logs["balance_loss"] = means["balance_loss"]
            self._added, self._steps_added = {}, 0.0
        if self._anchors is not None and of_training:
            logs = {**logs, **self._anchors.take_losses()}
        for callback in self._router_callbacks():
            logs = {**logs, **callback.take()}
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's step of an evaluation, which needs no task types."""
        given: Any = inputs
        if isinstance(inputs, Mapping) and "task_types" in inputs:
            given = copy.copy(inputs)
            given.pop("task_types")
        return super().prediction_step(model, given, *args, **kwargs)

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_train_dataloader(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with `task_types` in the batches."""
        with self._task_types_collated():
            return super().get_test_dataloader(*args, **kwargs)

    def _check_one_rate(self, remedy: str) -> None:
        """Refuse optimizers that know one learning rate; `remedy` is what to do without another."""
        name = getattr(self.args.optim, "value", self.args.optim)
        own_rate = "lomo" in name or name.endswith("layerwise")
        if own_rate and self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            raise ValueError(
                f"optim='{name}' updates all parameters with one learning rate during the backward pass; choose "
                f"another, or {remedy}."
            )
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            config = plugin.hf_ds_config.config
            for section in ("optimizer", "scheduler"):
                if section in config:
                    raise ValueError(
                        f"The DeepSpeed configuration has a section '{section}', which gives all parameters one "
                        "learning rate. Remove it, so that `optim` and `lr_scheduler_type` of the training arguments "
                        f"count, or {remedy}."
                    )

    @contextmanager
    def _task_types_collated(self) -> Generator[None]:
        # Only while a loader is made: trainers look at the class of their collator.
        collator, config = self.data_collator, active_config(self.model)
        if config is not None and not isinstance(collator, TaskTypeCollator):
            self.data_collator = TaskTypeCollator(collator, config)
        try:
            yield
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns and active_config(self.model) is not None:
            self._signature_columns = [*self._signature_columns, COLUMN]

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's preparation; where it packs, the task types are packed too (TRL keeps its own columns only)."""
        prepare = super()._prepare_dataset
        call = inspect.signature(prepare).bind(*args, **kwargs).arguments
        if COLUMN not in _column_names(call["dataset"]):
            return prepare(*args, **kwargs)
        packing, options = call.get("packing", False), call["args"]
        call["args"] = copy.copy(options)
        call["args"].use_liger_kernel = False  # here TRL only dropped columns for it
        if packing:
            call["packing"] = False
            call["args"].max_length = None  # packing cuts
        dataset = prepare(**call)
        return _pack(dataset, options) if packing else dataset

    def _prepare_inputs(self, inputs: Any) -> Any:
        batch = super()._prepare_inputs(inputs)
        config = active_config(self.model)
        if config is None or not _are_typed_prompts(inputs) or "task_types" in batch:
            return batch
        if _is_named(self, GENERATE_IN_ORDER):
            return self._with_types(inputs, batch)
        raise ValueError(
            f"{type(self).__name__}._prepare_inputs turns examples into a batch, and nothing tells which of its rows "
            f"comes from which example. Have it return task_types, one for each row, or leave the column {COLUMN} out."
        )

    def _generate_and_score_completions(self, inputs: list[Mapping[str, Any]]) -> Any:
        return self._with_types(inputs, super()._generate_and_score_completions(inputs))

    def _prepare_training_batch(self, inputs: list[Mapping[str, Any]]) -> Any:
        return self._with_types(inputs, super()._prepare_training_batch(inputs))

    def _get_model_forward_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # GOLDTrainer passes on what it does not know, also to `generate`, which needs no types.
        given = super()._get_model_forward_kwargs(*args, **kwargs)
        return {name: value for name, value in given.items() if name != "task_types"}

    def _with_types(self, examples: list[Mapping[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """Add `task_types` to a batch whose rows are generated from the examples, one from each, in their order."""
        config = active_config(self.model)
        types = None if config is None else example_types(examples, config)
        if types is None:
            return batch
        ids = batch["prompt_ids" if "prompt_ids" in batch else "input_ids"]
        if len(ids) != len(examples):
            raise ValueError(
                f"{type(self).__name__} made {len(ids)} rows of {len(examples)} prompts, and nothing tells which row "
                f"comes from which prompt; leave the column {COLUMN} out."
            )
        if any(known.dim() > 0 for known in types):
            raise ValueError(f"A prompt has a list in {COLUMN}; answers are generated for prompts of one type only.")
        batch["task_types"] = torch.stack(types).to(ids.device)
        return batch

    @property
    def _in_blocks(self) -> bool:
        # No attribute of the mixin's: it would hide that of the trainer's class, which comes after it.
        return getattr(self, "task_types_in_blocks", _is_named(self, IN_BLOCKS))

    def _check_term(self) -> None:
        """Refuse an optimizer step without the balance term in its gradient."""
        if _has_term(self.model) and self._term_step != self.state.global_step:
            raise ValueError(
                f"{type(self).__name__} is about to take an optimizer step whose loss has no balance term, because it "
                "does not come from compute_loss in training mode: some trainers, TRL's OnlineDPOTrainer for one, "
                "compute it elsewhere. Use a trainer of the table in docs/trainers.md, or set balance_loss_weight=0."
            )

    def _accumulation_weight(self, num_items_in_batch: Tensor | int | None) -> float:
        """The weight of this micro-batch's term and anchors, such that those of an accumulated batch count equally."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            normalised = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = normalised or self.compute_loss_func is not None
        # Otherwise the trainer divides. The gradients of several processes are averaged either way.
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    def _router_callbacks(self) -> list[RouterCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RouterCallback)]

    def _is_unlabelled(self, inputs: Mapping[str, Any]) -> Tensor | None:
        tokens = label_tokens(inputs, getattr(self, "_loss_shifts_labels", False))
        return None if tokens is None else tokens == 0

    def _mean(self, value: Tensor) -> float:
        """Over the processes."""
        reduced: Any = self.accelerator.reduce(value, reduction="mean")
        return reduced.item()


def _has_term(model: nn.Module) -> bool:
    """Whether an active adapter has a balance term."""
    if (layer := first_layer(model)) is None:
        return False
    active = layer.active_adapters
    return any(config.balance_loss_weight > 0 for name, config in configs_of(layer).items() if name in active)


def _has_router_rates(model: nn.Module) -> bool:
    return any(multiplier != 1 for multiplier in router_multipliers(model).values())


def _at_least_one(num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
    """So that a loss summed over no labels and divided by their number is zero."""
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.clamp(min=1)
    return num_items_in_batch if num_items_in_batch is None else max(num_items_in_batch, 1)


def _is_named(trainer: LoRAMoETrainerMixin, names: frozenset[str]) -> bool:
    return any(parent.__name__ in names for parent in type(trainer).__mro__)


def _are_typed_prompts(inputs: Any) -> bool:
    """Whether these are the examples themselves, as trainers get them that generate answers."""
    return isinstance(inputs, list) and any(isinstance(example, Mapping) and COLUMN in example for example in inputs)


def _refuse_vllm(trainer: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse TRL's rollouts by vLLM, which would merge the adapter, before vLLM is started."""
    values = (*args, *kwargs.values())
    arguments = next((value for value in values if isinstance(value, TrainingArguments)), None)
    model = kwargs.get("model", args[0] if args else None)
    adapted = isinstance(model, nn.Module) and active_config(model) is not None
    if not adapted and not any(isinstance(value, LoRAMoEConfig) for value in values):
        return
    # Trainers without the option, the asynchronous ones, always generate with the server that they are given.
    if getattr(arguments, "use_vllm", hasattr(arguments, "vllm_server_base_url")):
        advice = "set use_vllm=False" if hasattr(arguments, "use_vllm") else "use GRPOTrainer or DistillationTrainer"
        raise ValueError(
            f"{trainer} would generate with vLLM, to which TRL sends weights with the adapter merged into them. "
            f"LoRAMoE adapters cannot be merged: {advice}, so that the model itself generates. With GRPOTrainer, "
            "rollout_func=VLLMRollouts(engine) sends vLLM the adapter instead (docs/serving.md)."
        )


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
                f"{kind}_size={getattr(parallelism, f'{kind}_size')} splits samples between processes, and a sample's "
                f"routing cannot be balanced in parts; set {kind}_size=1."
            )


def _column_names(dataset: Any) -> list[str]:
    """Names of the columns of a data set; those of a stream may have to be read from its first example."""
    return list(next(iter(dataset), {})) if dataset.column_names is None else dataset.column_names


def _pack(dataset: Any, options: Any) -> Any:
    """Pack a prepared data set as TRL does, the task types with it, one for each token."""
    from trl import pack_dataset

    if options.packing_strategy == "wrapped":
        raise ValueError(
            "packing_strategy='wrapped' keeps no boundaries between samples, so task types cannot be attributed; use "
            f"'bfd' or 'bfd_split', or leave the column {COLUMN} out."
        )
    dataset = dataset.map(lambda example: {COLUMN: [example[COLUMN]] * len(example["input_ids"])})
    by_token = ("input_ids", "labels", "completion_mask", "assistant_masks", COLUMN)
    columns = _column_names(dataset)
    dataset = dataset.select_columns([name for name in by_token if name in columns])
    packed = pack_dataset(dataset, options.max_length, options.packing_strategy)
    return packed.shuffle(seed=options.seed) if options.shuffle_dataset else packed
