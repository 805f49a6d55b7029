"""What the layers hand over during one call of the model, and the balance term that it becomes.

Two hooks on the base model serve every way of calling it: `PeftModelFor*`, the plain `PeftModel`, `inject_adapter_in_model`
and transformers' `add_adapter`. The first takes `task_types` out of the arguments and starts recording; the second stops
and adds the balance term to the loss. Layers that run again in the backward pass (gradient checkpointing) find it stopped.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .balance import balance_targets, balance_term, importance
from .config import LoRAMoEConfig
from .experts import LoRAExperts
from .samples import Batch, Samples, task_type_tensor


@dataclass(frozen=True)
class LayerRouting:
    """How one adapted linear routed the samples of the last forward pass. Tensors are detached.

    Attributes:
        adapter: name of the adapter.
        layer: name of the linear inside the base model.
        importance: sum of the router probabilities over each sample's real tokens, shape (M, N), floating point.
        token_counts: real tokens of each sample, shape (M,), int64; 0 marks an unused slot.
        task_types: shape (M,), int64, -1 for unknown.
    """

    adapter: str
    layer: str
    importance: Tensor
    token_counts: Tensor
    task_types: Tensor


@dataclass(frozen=True)
class _Record:
    adapter: str
    layer: str
    experts: LoRAExperts
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
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        self._recording = False
        self._records: list[_Record] = []
        self._batch: Batch | None = None
        self._grad_enabled = False
        # What layers that see the same tokens share.
        self._samples: dict[tuple, Samples] = {}
        self._targets: dict[tuple, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What one forward pass recorded belongs to that graph: copies and pickles start empty.
        copy = Recorder(self.configs)
        copy.handles, copy.loaded, copy._warned = self.handles, self.loaded, self._warned
        return copy.__dict__

    def install(self, model: nn.Module) -> None:
        """Hook into the base model."""
        self.handles += [
            model.register_forward_pre_hook(self._start, with_kwargs=True),
            model.register_forward_hook(self._stop, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the base model and forget what was recorded."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._reset()

    def record(self, adapter: str, layer: str, experts: LoRAExperts, probabilities: Tensor) -> None:
        """Called by each adapted layer with its router probabilities, shape (..., N); kept only inside the hooks."""
        if self._recording:
            self._records.append(_Record(adapter, layer, experts, probabilities))

    def tokens_per_row(self, tokens: int, layer: str) -> int | None:
        """Tokens in each row of the batch, if a layer that sees `tokens` of them sees the whole batch, flattened."""
        return self._batch.row_width(tokens, layer) if self._recording else None

    def terms(self) -> dict[str, dict[str, Tensor]]:
        """The balance term of each layer, unweighted, by adapter and layer name."""
        terms: dict[str, dict[str, Tensor]] = {}
        for record in self._records:
            config = self.configs[record.adapter]
            if config.balance_loss_weight > 0:
                self._refuse_reentrant_checkpointing(record)
            sums, counts, _ = self._importance(record, record.probabilities)
            terms.setdefault(record.adapter, {})[record.layer] = balance_term(
                sums,
                counts,
                self._targets_of(record),
                formula=config.balance_formula,
                target=config.balance_target,
                importance=config.balance_importance,
            )
        return terms

    def loss(self) -> Tensor:
        """The sum of all terms, each weighted by its adapter's `balance_loss_weight`: a scalar."""
        weighted = [
            self.configs[adapter].balance_loss_weight * term
            for adapter, layers in self.terms().items()
            for term in layers.values()
        ]
        return torch.stack([term.to(weighted[0].device) for term in weighted]).sum() if weighted else torch.zeros(())

    def routing(self) -> list[LayerRouting]:
        """What the last forward pass recorded, summed over the tokens of each sample."""
        return [
            LayerRouting(record.adapter, record.layer, *self._importance(record, record.probabilities.detach()))
            for record in self._records
        ]

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._reset()
        kwargs = dict(kwargs)
        task_types = kwargs.pop("task_types", None)
        names = inspect.signature(module.forward).parameters if args else ()
        is_encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        self._batch = Batch({**dict(zip(names, args)), **kwargs}, task_types, bool(is_encoder_decoder))
        self._grad_enabled = torch.is_grad_enabled()
        self._recording = True
        return args, kwargs

    def _stop(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        self._recording = False
        active = {record.adapter for record in self._records}
        if self._batch.task_types is not None:
            for adapter in active:
                self._task_types(adapter)
        balanced = [self.configs[adapter] for adapter in active if self.configs[adapter].balance_loss_weight > 0]
        if not module.training or not balanced:
            return output
        if self._batch.task_types is None and not self._warned and any(len(c.groups_of()) > 1 for c in balanced):
            self._warned = True
            warnings.warn(
                "balance_loss_weight > 0, but the model was called without task_types: every sample counts as of unknown "
                "type, so the balance term only spreads the load evenly over the experts. Pass task_types, or set "
                "balance_loss_weight=0.",
                stacklevel=2,
            )
        has_labels = self._batch.inputs.get("labels") is not None
        return _add_to_loss(output, lambda: self.loss() * self._share(module), has_labels)

    def _importance(self, record: _Record, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        samples = self._samples_of(record)
        sums, counts = importance(probabilities.flatten(0, -2), samples.ids, samples.real, len(samples.task_types))
        return sums, counts, samples.task_types

    def _key(self, record: _Record) -> tuple:
        probabilities, of_decoder = record.probabilities, self._batch.reads_decoder_tokens(record.layer)
        return record.adapter, probabilities.shape[:-1], probabilities.device, of_decoder

    def _targets_of(self, record: _Record) -> Tensor:
        groups = record.experts.expert_groups
        key = (*self._key(record), *groups)
        if key not in self._targets:
            delta = self.configs[record.adapter].balance_delta
            self._targets[key] = balance_targets(self._samples_of(record).task_types, groups, delta)
        return self._targets[key]

    def _samples_of(self, record: _Record) -> Samples:
        key = self._key(record)
        if key not in self._samples:
            _, tokens, device, _ = key
            samples = self._batch.samples(tuple(tokens), record.layer, self._task_types(record.adapter), device)
            if not torch.compiler.is_compiling() and not samples.real.any():
                raise ValueError(
                    "The balance term was asked for in a batch without a real token: attention_mask is zero everywhere. "
                    "Leave such batches out, or set balance_loss_weight=0."
                )
            self._samples[key] = samples
        return self._samples[key]

    def _task_types(self, adapter: str) -> Tensor | None:
        if self._batch.task_types is None:
            return None
        config = self.configs[adapter]
        types = task_type_tensor(self._batch.task_types, len(config.groups_of()), config.task_type_names)
        if types.shape[0] != self._batch.rows:
            raise ValueError(f"task_types has shape {tuple(types.shape)}, but the batch has {self._batch.rows} rows.")
        return types

    def _refuse_reentrant_checkpointing(self, record: _Record) -> None:
        trained = record.experts.router.requires_grad and self._grad_enabled
        if trained and not record.probabilities.requires_grad:
            raise ValueError(
                f"The router probabilities of layer '{record.layer}' carry no gradient, so the balance term would not train "
                "the router: the layer ran inside reentrant gradient checkpointing. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set balance_loss_weight=0.'
            )

    def _share(self, module: nn.Module) -> Tensor | float:
        """This batch's part of the label tokens by which the model normalised its loss (gradient accumulation)."""
        total, labels = self._batch.inputs.get("num_items_in_batch"), self._batch.inputs.get("labels")
        if total is None or labels is None:
            return 1.0
        shifted = LOSS_MAPPING.get(getattr(module, "loss_type", None)) is ForCausalLMLoss
        return ((labels[..., 1:] if shifted and not self._batch.is_encoder_decoder else labels) != -100).sum() / total


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
    the next forward pass; it carries gradient.

    Args:
        model: the adapted model, wrapped in whatever way.

    Returns:
        A scalar, float32; zero if no adapter was active.

    Raises:
        ValueError: the model has no LoRAMoE layers, or the term cannot be computed (the message says why).
    """
    return _recorder_of(model).loss()


def balance_terms(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The unweighted balance term of each adapted linear in the last forward pass: adapter -> layer name -> scalar.

    Raises:
        ValueError: as `balance_loss`.
    """
    return _recorder_of(model).terms()


def routing(model: nn.Module) -> list[LayerRouting]:
    """How each adapted linear routed the samples of the last forward pass, in the order of the layers.

    Raises:
        ValueError: as `balance_loss`.
    """
    return _recorder_of(model).routing()
