"""What the layers hand over during a call of the model, and the balance term that it becomes.

Two hooks on the base model serve every way of calling it: `PeftModelFor*`, the plain `PeftModel`, `inject_adapter_in_model`
and transformers' `add_adapter`. The first takes `task_types` out of the arguments and starts recording; the second stops
and adds the balance term to the loss. Layers that run again in the backward pass (gradient checkpointing) find it stopped.
The same hooks on the model below the head serve trainers that apply the head themselves.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..config import LoRAMoEConfig
from ..experts import LoRAExperts
from ..groups import ExpertGroups
from .recording import ForwardPass, Record
from .samples import Batch, label_tokens, repeat_for_rows
from .terms import Terms, compute_terms


@dataclass(frozen=True)
class LayerRouting:
    """How one adapted linear routed the samples of the last forward pass. Tensors are detached.

    Attributes:
        adapter: name of the adapter.
        layer: name of the linear inside the base model.
        importance: sum of the router probabilities over each sample's real tokens, shape (M, N), floating point.
        entropy: sum of the entropies of the router probabilities over the same tokens, shape (M,), floating point, in nats.
        token_counts: real tokens of each sample, shape (M,), int64; 0 marks an unused slot.
        task_types: shape (M,), int64, -1 for unknown.
        groups: the expert groups, N experts in all.
        probabilities: of each token that the layer read, padding included, shape (..., N), floating point.
    """

    adapter: str
    layer: str
    importance: Tensor
    entropy: Tensor
    token_counts: Tensor
    task_types: Tensor
    groups: ExpertGroups
    probabilities: Tensor


class Recorder:
    """Collects router probabilities while the base model runs; one per base model, shared by its adapted layers.

    Args:
        configs: the base model's adapter configurations by adapter name, shared with the tuner.
    """

    def __init__(self, configs: dict[str, LoRAMoEConfig]) -> None:
        self.configs = configs
        self.handles: list[RemovableHandle] = []  # hooks that leave the base model with the recorder
        self.loaded: set[str] = set()  # adapters whose tensors came from a checkpoint
        self._warned: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._recording: nn.Module | None = None  # the module whose call is being recorded
        self._passes: list[ForwardPass] = []
        self._terms: list[Terms] | None = None
        self._unused = False  # a term that was neither added to a loss nor read
        self._collecting = False
        self._collected_types: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # What one forward pass recorded belongs to that graph: copies and pickles start empty.
        copy = Recorder(self.configs)
        copy.handles, copy.loaded, copy._warned = self.handles, self.loaded, self._warned
        return copy.__dict__

    def install(self, model: nn.Module) -> None:
        """Hook into the base model, and into the model below its head."""
        self._hook(model, self._start)
        below_head = getattr(model, "base_model", None)
        if isinstance(below_head, nn.Module) and below_head is not model:
            self._hook(below_head, self._start_below_head)

    def _hook(self, module: nn.Module, start: Callable) -> None:
        self.handles += [
            module.register_forward_pre_hook(start, with_kwargs=True),
            module.register_forward_hook(self._stop, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the base model and forget what was recorded."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._reset()

    @contextmanager
    def collect(self, task_types: Any = None) -> Iterator[None]:
        """Take the training passes inside for one batch, whose term is read afterwards instead of added to their losses.

        Passes without gradient (reference models, metrics) are left out.

        Args:
            task_types: for calls that are not given any; repeated where a call has the rows several times over.
        """
        self._reset()
        self._collecting, self._collected_types = True, task_types
        try:
            yield
        finally:
            self._collecting, self._collected_types = False, None

    def record(self, adapter: str, layer: str, experts: LoRAExperts, probabilities: Tensor) -> None:
        """Called by each adapted layer with its router probabilities, shape (..., N); kept only inside the hooks."""
        if self._recording is not None:
            self._passes[-1].records.append(Record(adapter, layer, experts, probabilities))

    def tokens_per_row(self, tokens: int, layer: str) -> int | None:
        """Tokens in each row of the batch, if a layer that sees `tokens` of them sees the whole batch, flattened."""
        return self._passes[-1].batch.row_width(tokens, layer) if self._recording is not None else None

    def terms(self) -> dict[str, dict[str, Tensor]]:
        """The balance term of each layer, unweighted, by adapter and layer name."""
        found = {(some.adapter, layer): term for some in self._all_terms() for layer, term in zip(some.layers, some.values)}
        terms: dict[str, dict[str, Tensor]] = {}
        for one in self._passes:
            for record in one.records:  # in the order of the layers
                terms.setdefault(record.adapter, {})[record.layer] = found[record.adapter, record.layer].clone()  # no view
        return terms

    def loss(self) -> Tensor:
        """The sum of all terms, each weighted by its adapter's `balance_loss_weight`: a scalar."""
        weighted = [self.configs[some.adapter].balance_loss_weight * some.values.sum() for some in self._all_terms()]
        return torch.stack([term.to(weighted[0].device) for term in weighted]).sum() if weighted else torch.zeros(())

    def routing(self) -> list[LayerRouting]:
        """What the last forward pass recorded, summed over the tokens of each sample."""
        with torch.no_grad():
            return [
                LayerRouting(
                    record.adapter,
                    record.layer,
                    (importance := one.importance([record]))[0].squeeze(0),
                    one.entropy(record),
                    importance[1],
                    one.task_types(record),
                    record.experts.groups,
                    record.probabilities.detach(),
                )
                for one in self._passes
                for record in one.records
            ]

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "The model runs inside nn.DataParallel, whose threads would mix up their batches. Start one process for each "
                "GPU instead (torchrun, accelerate launch), or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        kwargs = dict(kwargs)
        task_types = kwargs.pop("task_types", None)
        if not self._collecting:
            self._warn_of_unused_term(module)
            self._reset()
        self._terms = None
        names = inspect.signature(module.forward).parameters if args else ()
        inputs = {**dict(zip(names, args)), **kwargs}
        is_encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        batch = Batch(inputs, task_types, is_encoder_decoder)
        if task_types is None and self._collected_types is not None:
            batch = Batch(inputs, repeat_for_rows(self._collected_types, batch.rows), is_encoder_decoder)
        self._passes.append(ForwardPass(self.configs, batch, module.training))
        self._recording = module
        return args, kwargs

    def _start_below_head(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (args, kwargs) if self._recording is not None else self._start(module, args, kwargs)

    def _stop(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if module is not self._recording:
            return output
        self._recording = None
        last = self._passes[-1]
        last.check_task_types()
        balanced = last.balanced
        if self._collecting and not (last.training and last.grad_enabled and last.records):
            self._passes.pop()
        if not last.training or not balanced:
            return output
        if last.batch.task_types is None and any(self.configs[name].num_groups > 1 for name in balanced):
            self._warn(
                "balance_loss_weight > 0, but the model was called without task_types: every sample counts as of unknown "
                "type, so the balance term only spreads the load evenly over the experts. Pass task_types (with Trainer or "
                "TRL: a column task_type and peft_loramoe.training.LoRAMoETrainerMixin), or set balance_loss_weight=0."
            )
        if self._collecting:
            return output
        self._unused = last.grad_enabled
        has_labels = last.batch.inputs.get("labels") is not None
        return _add_to_loss(output, lambda: self.loss() * self._share(module), has_labels)

    def _all_terms(self) -> list[Terms]:
        self._unused = False
        if self._terms is None:  # kept, so that one process may read what all of them computed together
            self._terms = compute_terms(self._passes, self.configs)
        return self._terms

    def _share(self, module: nn.Module) -> Tensor | float:
        """This batch's part of the label tokens by which the model normalised its loss (gradient accumulation)."""
        batch = self._passes[-1].batch
        total = batch.inputs.get("num_items_in_batch")
        shifted = LOSS_MAPPING.get(getattr(module, "loss_type", None)) is ForCausalLMLoss and not batch.is_encoder_decoder
        tokens = label_tokens(batch.inputs, shifted)
        return 1.0 if total is None or tokens is None else tokens / total

    def _warn_of_unused_term(self, module: nn.Module) -> None:
        if self._unused and module.training and torch.is_grad_enabled():
            self._warn(
                "The balance term of the last forward pass reached no loss: the model computed none itself, and "
                "balance_loss(model) was not read before the next pass. With Trainer or TRL use "
                "peft_loramoe.training.LoRAMoETrainerMixin; in a loop of your own add balance_loss(model) to the loss, or set "
                "balance_loss_weight=0."
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _emit(message)


@torch.compiler.assume_constant_result  # emitted while tracing, so that the graph does not break
def _emit(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _add_to_loss(output: Any, term: Any, has_labels: bool) -> Any:
    """Add `term()` to the loss in a model's output; an output without a loss is returned as it is."""
    if isinstance(output, dict):  # ModelOutput is one too
        if output.get("loss") is not None:
            loss = output["loss"]
            output["loss"] = loss + term().to(loss.device, loss.dtype)
    elif isinstance(output, tuple) and has_labels and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return (output[0] + term().to(output[0].device, output[0].dtype), *output[1:])
    return output


def find_recorder(model: nn.Module) -> Recorder | None:
    """The recorder of the adapted layers in `model`, or None if it has none."""
    return next((r for m in model.modules() if isinstance(r := getattr(m, "recorder", None), Recorder)), None)


def _recorder_of(model: nn.Module) -> Recorder:
    if (recorder := find_recorder(model)) is None:
        raise ValueError(f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model first.")
    return recorder


def balance_loss(model: nn.Module) -> Tensor:
    """The balance term of the last forward pass: the sum over layers, times `balance_loss_weight`.

    In training mode `outputs.loss` already contains it. Add it yourself where the loss is computed outside the model, before
    the next forward pass; it carries gradient. After `collect_balance`, it is the term of all passes collected.

    Args:
        model: the adapted model, wrapped in whatever way.

    Returns:
        A scalar, float32; zero if no adapter was active.

    Raises:
        ValueError: the model has no LoRAMoE layers, or the term cannot be computed (the message says why).
    """
    return _recorder_of(model).loss()


@contextmanager
def collect_balance(model: nn.Module, task_types: Any = None) -> Iterator[None]:
    """Take all training passes inside for one batch; read its term with `balance_loss` afterwards.

    For losses that are computed outside the model, or from several passes (preference and contrastive losses): inside, no
    `outputs.loss` contains the term. Passes without gradient, such as a reference model's, are left out.

    Args:
        model: the adapted model, wrapped in whatever way.
        task_types: for calls that are not given any, as the model takes them; a call that has the batch's rows several times
            over (first all chosen, then all rejected answers) repeats them.

    Raises:
        ValueError: the model has no LoRAMoE layers.
    """
    with _recorder_of(model).collect(task_types):
        yield


def balance_terms(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The unweighted balance term of each adapted linear in the last forward pass: adapter -> layer name -> scalar.

    They are computed together, so that a backward pass through one of them before another needs `retain_graph=True`.

    Raises:
        ValueError: as `balance_loss`.
    """
    return _recorder_of(model).terms()


def layer_routing(model: nn.Module) -> list[LayerRouting]:
    """How each adapted linear routed the samples of the last forward pass, in the order of the layers.

    Raises:
        ValueError: as `balance_loss`.
    """
    return _recorder_of(model).routing()
