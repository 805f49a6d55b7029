"""`RouterCallback`: what the routers do while they train, in the trainer's logs."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..balance import balance_loss, balance_terms, layer_routing
from ..balance.results import configs_of
from ..balance.task_types import repeat_for_rows, task_type_tensor
from ..config import LoRAMoEConfig
from ..layer import adapted_layers, first_layer


NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
UNNUMBERED = "other_layers"


class RouterCallback(TrainerCallback):
    """Logs the routers' state at every step at which the trainer logs.

    The metrics are of the last forward pass of the step (with gradient accumulation, the last micro-batch), over the
    samples of all processes. Each is a mean over the adapted linears of a block of layers, and, but for the balance
    term, over the real tokens of one task type in the batch; types that do not occur are left out:

        router/{block}/{type}/entropy           of the router's probabilities, in nats; ln N where routing is uniform
        router/{block}/{type}/weight_{group}    router probability of an expert group; they sum to 1 over the groups
        router/{block}/{type}/load_min          mean router probability of the linear's least used expert
        router/{block}/{type}/load_max          and of its most used one
        router/{block}/balance_term             unweighted balance term of one linear, mean over the processes
        router/balance_loss                     weighted sum of all terms: what a loss of this batch alone contains;
                                                mean over the processes
        router/null/{type}                      router probability of the null groups, mean over all adapted linears;
                                                only with `null_groups`

    A block is named by its first and last layer ("layers_0-7"), after its stack where there are several
    ("encoder.block_0-3"); linears whose names contain no number are "other_layers". Types and groups have the names of
    `task_type_names`, or are type_0, group_0, ...; samples without a type are "unknown". If more than one adapter is
    active, its name comes after "router/".

    Reporters run before other callbacks, so this one cannot add to the logs by itself: the trainer's `log` has to,
    which is what `LoRAMoETrainerMixin` is for. Between log steps nothing is computed.

    With null groups it also watches whether the routers learn to tell the task types apart. After the warm-up, and not
    before a quarter of the steps, it warns once if the null groups' weight on the null groups' own types is hardly
    larger than on the others, or if one of the two kinds has not occurred in any micro-batch.

    Args:
        layer_groups: number of blocks that the adapted layers of each stack are divided into; 0 for the last two
            metrics only.

    Raises:
        ValueError: `layer_groups` is negative or no integer.

    Example:
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> from peft_loramoe.training import LoRAMoETrainerMixin
        >>> class LoRAMoETrainer(LoRAMoETrainerMixin, Trainer): ...
        >>> data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "task_type": 1}] * 4
        >>> args = TrainingArguments("run", max_steps=1, logging_steps=1, report_to="none", disable_tqdm=True)
        >>> callback = RouterCallback(layer_groups=1)
        >>> trainer = LoRAMoETrainer(tiny_model(), args, train_dataset=data, callbacks=[callback])
        >>> trainer.remove_callback(PrinterCallback)
        >>> result = trainer.train()
        >>> sorted(name for name in trainer.state.log_history[0] if name.endswith("weight_group_1"))
        ['router/layers_0-1/type_1/weight_group_1']
    """

    def __init__(self, layer_groups: int = 3) -> None:
        if not isinstance(layer_groups, int) or isinstance(layer_groups, bool) or layer_groups < 0:
            raise ValueError(f"layer_groups={layer_groups!r} must be an integer, at least 0.")
        self.layer_groups = layer_groups
        self._separation = _Separation()
        self._seen: Tensor | None = None
        self._metrics: dict[str, float] = {}
        self._step_done: int | None = None

    def see(self, task_types: Any, config: LoRAMoEConfig) -> None:
        """Note which task types a micro-batch has: the last pass of a logged step need not have all of them.

        Args:
            task_types: as the model takes them, or one integer or name, the type of all samples; None where nobody
                knows.
            config: of the adapter.
        """
        if task_types is None or not config.null_groups:
            return
        types = task_type_tensor(repeat_for_rows(task_types, 1), config.num_groups, config.task_type_names)
        seen = (types.flatten() == torch.arange(config.num_groups, device=types.device)[:, None]).any(1)
        self._seen = seen if self._seen is None else self._seen | seen.to(self._seen.device)

    def take(self) -> dict[str, float]:
        """Hand over the metrics of the current step by name, once: a second call returns an empty dictionary."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Refuse models that have no routers."""
        adapted_layers(model)
        self._metrics, self._step_done, self._separation, self._seen = {}, None, _Separation(), None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Compute the metrics if the trainer is about to log."""
        # A step that was logged, or followed by an evaluation, is not logged at the end of the epoch again: the
        # forward pass that could be read then is another one.
        if control.should_log and self._step_done != state.global_step:
            self._step_done = state.global_step
            with torch.no_grad():
                table, config = _table(model, args.device), active_config(model)
                self._metrics = _metrics(table, model, self.layer_groups)
            if config is not None and self._separation.is_watched(config):
                warm_up = max(args.get_warmup_steps(state.max_steps), state.max_steps // 4)
                weights, seen = _null_weights(table, config), _of_all_processes(self._seen, config, args.device)
                message = self._separation.add(weights, seen, config, state.global_step > warm_up)
                if message and state.is_world_process_zero:
                    warnings.warn(f"After {state.global_step} of {state.max_steps} steps {message}")

    on_epoch_end = on_step_end  # logging_strategy="epoch" decides there

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the last forward pass is no longer the training step's, and keep evaluation logs clean."""
        self._metrics, self._step_done = {}, state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse trainers that log without the metrics.

        Raises:
            ValueError: nobody took the metrics.
        """
        if self.take():
            raise ValueError(
                "The trainer logged without taking RouterCallback's metrics, which would be lost. Put the mixin "
                "before the trainer, `class MyTrainer(LoRAMoETrainerMixin, SFTTrainer)`, or leave the callback out."
            )


class _Separation:
    """Whether the null groups' weight tells the task types apart, from the last few measurements after the warm-up."""

    MEASUREMENTS = 3
    SHARE = 0.25  # of the difference that the balance term aims at, below which types are not told apart

    def __init__(self) -> None:
        self._measurements = 0
        self._own: deque[float] = deque(maxlen=self.MEASUREMENTS)  # weight on the null groups' own types
        self._others: deque[float] = deque(maxlen=self.MEASUREMENTS)  # and on the other types
        self._judged = False

    def is_watched(self, config: LoRAMoEConfig) -> bool:
        """Whether the types are to be told apart, and no warning was given yet."""
        aims = config.balance_loss_weight > 0 and config.balance_delta > 0 and config.balance_target != "paper"
        return not self._judged and bool(config.null_groups) and aims

    def add(self, weights: dict[int, float], seen: set[int], config: LoRAMoEConfig, warm: bool) -> str | None:
        """Take a measurement; returns what is wrong, at most once.

        Args:
            weights: null weight by task type, of the types in the last pass.
            seen: the types of all micro-batches so far.
            config: of the adapter.
            warm: whether the warm-up is over.
        """
        if not warm:
            return None
        seen = {task_type for task_type in {*seen, *weights} if task_type >= 0}
        self._measurements += 1
        null_groups = {*(config.null_groups or ())}
        for column, types in ((self._own, seen & null_groups), (self._others, seen - null_groups)):
            if measured := [weights[task_type] for task_type in types if task_type in weights]:
                column.append(_mean(measured))
        if self._measurements < self.MEASUREMENTS:
            return None
        message = self._missing(seen, config) or self._not_separated(config)
        self._judged = message is not None
        return message

    def _missing(self, seen: set[int], config: LoRAMoEConfig) -> str | None:
        null_groups = config.null_groups or []
        types = " or ".join(map(str, null_groups))
        if seen.isdisjoint(null_groups):
            return (
                f"no sample of type {types} was seen: nothing tells the routers what to leave to the base model. Give "
                "the trainer anchors, or samples of that type."
            )
        if seen <= {*null_groups}:
            return (
                f"no sample of another type than {types} was seen: nothing tells the routers what to leave to the "
                "experts. Give the samples of the tasks another type."
            )
        return None

    def _not_separated(self, config: LoRAMoEConfig) -> str | None:
        if min(len(self._own), len(self._others)) < self.MEASUREMENTS:
            return None
        known, tasks = _mean(self._own), _mean(self._others)
        if known - tasks >= self.SHARE * config.balance_delta:
            return None
        return (
            f"the routers hardly tell the task types apart: the null group's weight is {known:.2f} on what the model "
            f"knows and {tasks:.2f} on the tasks. Raise router_lr_multiplier (now {config.router_lr_multiplier:g}), "
            "the learning rate (lower it where the loss is unstable) or balance_loss_weight (now "
            f"{config.balance_loss_weight:g}), train for longer, or check the task types."
        )


def _of_all_processes(seen: Tensor | None, config: LoRAMoEConfig, device: torch.device) -> set[int]:
    """The task types that any process has seen; all have to call it."""
    counts = torch.zeros(config.num_groups, device=device)
    if seen is not None:
        counts += seen.to(device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return set(counts.nonzero().flatten().tolist())


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class _Table:
    """Sums of one forward pass over all samples of all processes.

    Attributes:
        rows: adapter and layer -> row, the same on every process.
        groups: sizes of the expert groups of each row.
        by_type: shape (rows, types, N + 2): importance of each expert, entropy, tokens; type -1 comes first.
        terms: shape (rows + 1, 2): balance term and how many processes have one; the last row is the weighted sum.
    """

    rows: dict[tuple[str, str], int]
    groups: list[list[int]]
    by_type: Tensor
    terms: Tensor


def _table(model: nn.Module, device: torch.device) -> _Table:
    layers = adapted_layers(model)
    groups = {(name, m.name): list(e.groups.sizes) for m in layers for name, e in m.loramoe_experts.items()}
    rows = {key: row for row, key in enumerate(groups)}
    num_types, num_experts = 1 + max(map(len, groups.values())), max(map(sum, groups.values()))
    by_type = torch.zeros(len(rows), num_types, num_experts + 2, device=device)
    terms = torch.zeros(len(rows) + 1, 2, device=device)
    for layer in layer_routing(model):
        columns = torch.zeros(len(layer.entropy), num_experts + 2, device=device)
        columns[:, : layer.importance.shape[1]] = layer.importance
        columns[:, -2] = layer.entropy
        columns[:, -1] = layer.token_counts
        by_type[rows[layer.adapter, layer.layer]].index_add_(0, layer.task_types.to(device) + 1, columns)
    for adapter, layers in balance_terms(model).items():
        for layer, term in layers.items():
            terms[rows[adapter, layer], 0] = term
            terms[rows[adapter, layer], 1] = 1
    terms[-1, 0] = balance_loss(model)
    terms[-1, 1] = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(by_type)
        dist.all_reduce(terms)
    return _Table(rows, list(groups.values()), by_type.cpu(), terms.cpu())


def active_config(model: nn.Module) -> LoRAMoEConfig | None:
    """The configuration of the first LoRAMoE adapter that is active, or of the first one; None if there is none."""
    if (layer := first_layer(model)) is None:
        return None
    configs = configs_of(layer)
    return configs[next(name for name in (*layer.active_adapters, *configs) if name in configs)]


def _null_weights(table: _Table, config: LoRAMoEConfig) -> dict[int, float]:
    """Router probability of the null groups by task type (-1 for unknown), mean over the linears that saw the type."""
    by_type: dict[int, list[float]] = {}
    for groups, sums_of_types in zip(table.groups, table.by_type):
        for index, sums in enumerate(sums_of_types):
            if (tokens := sums[-1]) > 0 and config.null_groups:
                by_group = sums[: sum(groups)].split(groups)
                weight = sum(by_group[group].sum() for group in config.null_groups) / tokens
                by_type.setdefault(index - 1, []).append(weight.item())
    return {index: sum(weights) / len(weights) for index, weights in by_type.items()}


def _metrics(table: _Table, model: nn.Module, layer_groups: int) -> dict[str, float]:
    configs = configs_of(model)
    used = table.by_type[..., -1].sum(-1) > 0
    active = list(dict.fromkeys(adapter for (adapter, _), row in table.rows.items() if used[row]))
    values: dict[str, list[float]] = {}
    for adapter in active:
        rows = {layer: row for (name, layer), row in table.rows.items() if name == adapter and used[row]}
        for block, layers in layer_blocks(list(rows), layer_groups).items() if layer_groups else ():
            prefix = f"router/{adapter}/{block}" if len(active) > 1 else f"router/{block}"
            for row in (rows[layer] for layer in layers):
                for name, value in _metrics_of_row(table, row, configs[adapter].task_type_names).items():
                    values.setdefault(f"{prefix}/{name}", []).append(value)
    if not active:
        return {}
    config, nulls = configs[active[0]], {}
    if len(active) == 1:
        unknown, names = _type_names(config.task_type_names, len(config.groups_of()))
        nulls = {
            f"router/null/{[unknown, *names][i + 1]}": weight for i, weight in _null_weights(table, config).items()
        }
    metrics = {name: sum(of_layers) / len(of_layers) for name, of_layers in values.items()}
    return {**metrics, **nulls, "router/balance_loss": _ratio(table.terms[-1])}


def _metrics_of_row(table: _Table, row: int, names: list[str] | None) -> dict[str, float]:
    groups = table.groups[row]
    group_names = names or [f"group_{group}" for group in range(len(groups))]
    unknown, type_names = _type_names(names, len(groups))
    metrics: dict[str, float] = {}
    for name, sums in zip([unknown, *type_names], table.by_type[row]):
        if (tokens := sums[-1]) > 0:
            load = sums[: sum(groups)] / tokens
            metrics[f"{name}/entropy"] = (sums[-2] / tokens).item()
            for group, part in zip(group_names, load.split(groups)):
                metrics[f"{name}/weight_{group}"] = part.sum().item()
            metrics[f"{name}/load_min"] = load.min().item()
            metrics[f"{name}/load_max"] = load.max().item()
    if table.terms[row, 1] > 0:
        metrics["balance_term"] = _ratio(table.terms[row])
    return metrics


def _type_names(names: list[str] | None, count: int) -> tuple[str, list[str]]:
    """What samples without a type, and those of each type, are called."""
    type_names = names or [f"type_{index}" for index in range(count)]
    return "unknown" if "unknown" not in type_names else "type_-1", type_names


def _ratio(sum_and_count: Tensor) -> float:
    return (sum_and_count[0] / sum_and_count[1]).item()


def layer_blocks(layers: list[str], layer_groups: int) -> dict[str, list[str]]:
    """Divide layers into contiguous blocks by depth.

    A layer's depth is the first component of its name that is a number, its stack what stands before it. Each stack is
    divided into blocks of nearly equal numbers of depths, at most as many as it has depths.

    Args:
        layers: names, in any order.
        layer_groups: number of blocks of each stack.

    Returns:
        Name of each block -> the names of its layers. Layers without a number are in one block, the last.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    unnumbered = []
    for layer in layers:
        if match := NUMBER.search(layer):
            stacks.setdefault(layer[: match.start()], {}).setdefault(int(match[1]), []).append(layer)
        else:
            unnumbered.append(layer)
    blocks: dict[str, list[str]] = {}
    for stack, by_depth in stacks.items():
        depths = sorted(by_depth)
        count = min(layer_groups, len(depths))
        bounds = [len(depths) * block // count for block in range(count + 1)]
        for start, end in pairwise(bounds):
            first, last = depths[start], depths[end - 1]
            name = f"{stack if len(stacks) > 1 and stack else 'layers'}_{first}" + (f"-{last}" if last > first else "")
            blocks[name] = [layer for depth in depths[start:end] for layer in by_depth[depth]]
    return {**blocks, UNNUMBERED: unnumbered} if unnumbered else blocks
