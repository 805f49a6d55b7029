"""Hooks that record the calls of a base model and add the balance term to its loss.

Two hooks on the base model serve every way of calling it: `PeftModelFor*`, plain `PeftModel`,
`inject_adapter_in_model` and transformers' `add_adapter`. The first takes `task_types` out of the arguments and begins
a recording; the second ends it and adds the balance term to the loss. Layers that run again in the backward pass
(gradient checkpointing) find no recording. The same hooks on the model below the head serve trainers that apply the
head themselves.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..config import LoRAMoEConfig
from ..gradients import UnpackedWeights
from ..groups import ExpertGroups
from ..streams import MEDIA, Streams, streams_of
from .recording import Record, Recording
from .samples import Batch, label_tokens, number_of_rows
from .task_types import is_of_all_rows, repeat_for_rows
from .terms import Terms, compute_terms, deleted_adapter


@dataclass(frozen=True)
class LayerRouting:
    """How one adapted linear routed the samples of the last forward pass. Tensors are detached.

    Attributes:
        adapter: name of the adapter.
        layer: name of the linear inside the base model.
        importance: sum of the router probabilities over each sample's real tokens, shape (M, N), floating point.
        entropy: sum of the entropies of the router probabilities over the same tokens, shape (M,), floating point, in
            nats.
        token_counts: real tokens of each sample, shape (M,), int64; 0 marks an unused slot.
        task_types: shape (M,), int64, -1 for unknown.
        groups: the expert groups, N experts in all.
        probabilities: of each token that the layer read, padding included, shape (..., N), floating point.

    Example:
        >>> import torch
        >>> from peft_loramoe import layer_routing
        >>> model = tiny_model()
        >>> output = model(input_ids=torch.tensor([[5, 6, 7]]), task_types=[1])
        >>> routing = layer_routing(model)[0]
        >>> weights = routing.importance / routing.token_counts[:, None]  # mean weight of each expert
        >>> bool(torch.isclose(weights.sum(), torch.tensor(1.0)))
        True
    """

    adapter: str
    layer: str
    importance: Tensor
    entropy: Tensor
    token_counts: Tensor
    task_types: Tensor
    groups: ExpertGroups
    probabilities: Tensor


@dataclass
class _Call:
    """A call of a hooked module that has not returned yet.

    Attributes:
        module: the module.
        recording: what its layers record.
        frame: the Python frame that runs the call; None in compiled code. A call that raised has left the stack.
        below_head: whether the model below the head is running as a part of this call.
    """

    module: nn.Module
    recording: Recording
    frame: FrameType | None
    below_head: bool = False


@dataclass
class _Thread:
    """What the calls of one thread recorded.

    Attributes:
        calls: calls that have not returned, the innermost last.
        recordings: what `balance_loss`, `balance_terms` and `layer_routing` are about: the last call, or those
            collected.
        terms: their balance terms, once computed.
        unread: a training pass whose term was neither added to a loss nor read.
        collecting: whether `collect_balance` is open.
        collected_types: the task types of calls inside it that are given none.
        in_blocks: whether a call inside it may have the rows of the batch several times over, block after block.
        adds_term: whether the one who opened it adds the term to the loss.
    """

    calls: list[_Call] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    terms: list[Terms] | None = None
    unread: Recording | None = None
    collecting: bool = False
    collected_types: Any = None
    in_blocks: bool = True
    adds_term: bool = False


class Recorder:
    """Records the router probabilities of a base model's calls; one per base model, shared by its adapted layers.

    Each call has a recording of its own, from the first hook to the second. Threads do not see each other's.

    Args:
        adapters: configurations of the base model's adapters by name, shared with PEFT, which adds and deletes them.
    """

    def __init__(self, adapters: dict[str, Any]) -> None:
        self.adapters = adapters
        self.streams = Streams()
        self.handles: list[RemovableHandle | UnpackedWeights] = []  # hooks that leave the base model with the recorder
        self._warned: set[str] = set()
        # This thread's entry is made here: made in the first call, if that is compiled, it would have the second one
        # compiled anew.
        self._threads = {threading.get_ident(): _Thread()}

    def __getstate__(self) -> dict[str, Any]:
        # A recording belongs to the graph of its call: copies and pickles start empty.
        copy = Recorder(self.adapters)
        copy.streams, copy.handles, copy._warned = self.streams, self.handles, self._warned
        return copy.__dict__

    @property
    def configs(self) -> dict[str, LoRAMoEConfig]:
        """Of the LoRAMoE adapters; `add_adapter` of transformers may have put other methods' beside them."""
        return {name: config for name, config in self.adapters.items() if isinstance(config, LoRAMoEConfig)}

    def install(self, model: nn.Module) -> None:
        """Hook into the base model, and into the model below its head."""
        self.streams = streams_of(model)
        self._hook(model, self._begin)
        below_head = getattr(model, "base_model", None)
        if isinstance(below_head, nn.Module) and below_head is not model:
            self._hook(below_head, self._begin_below_head)

    def _hook(self, module: nn.Module, begin: Callable[..., Any]) -> None:
        self.handles += [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(self._end, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the base model and forget what was recorded."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._threads = {}

    @contextmanager
    def collect(self, task_types: Any = None, in_blocks: bool = True, adds_term: bool = False) -> Generator[None]:
        """See `collect_balance`.

        Args:
            task_types: for calls that are given none.
            in_blocks: whether a call may have the rows of the batch several times over, block after block. Otherwise
                a call with another number of rows is refused.
            adds_term: whether the caller adds the term itself, so that code inside must not.
        """
        thread = self._thread
        if thread.collecting:
            raise RuntimeError(
                "collect_balance is open already, and a pass inside two of them would count twice. "
                "LoRAMoETrainerMixin opens one around compute_loss: leave collect_balance and balance_loss out of a "
                "compute_loss of your own."
            )
        thread.recordings, thread.terms = [], None
        thread.collecting, thread.collected_types, thread.in_blocks = True, task_types, in_blocks
        thread.adds_term = adds_term
        try:
            yield
        finally:
            thread.collecting, thread.collected_types, thread.adds_term = False, None, False

    def record(self, adapter: str, layer: str, groups: ExpertGroups, trained: bool, probabilities: Tensor) -> None:
        """Called by each adapted layer with its router probabilities, shape (..., N).

        Without effect outside of a call.
        """
        if not (calls := self._thread.calls):
            return
        recording = calls[-1].recording
        if self.streams.kind(layer) == MEDIA:
            recording.left_out.append(layer)
        else:
            recording.records.append(Record(adapter, layer, groups, trained, probabilities))

    def entries_per_row(self, tokens: tuple[int, ...], layer: str) -> int | None:
        """How many neighbours in the first dimension of a layer's input belong to each row of the batch.

        Args:
            tokens: leading dimensions of the input.
            layer: name of the layer.

        Returns:
            None if nothing tells. Outside of a call, as in an encoder that is called on its own, 1.
        """
        calls = self._thread.calls
        return calls[-1].recording.batch.entries_per_row(tokens, layer) if calls else 1

    @property
    def recorded(self) -> bool:
        """Whether an adapted layer was called in the passes that are read next."""
        return any(recording.records or recording.left_out for recording in self._thread.recordings)

    def terms(self) -> dict[str, dict[str, Tensor]]:
        """The balance term of each layer, unweighted, by adapter and layer name."""
        found = {
            (terms.adapter, layer): value
            for terms in self._terms()
            for layer, value in zip(terms.layers, terms.values)
        }
        by_adapter: dict[str, dict[str, Tensor]] = {}
        for recording in self._thread.recordings:
            for record in recording.records:  # in the order of the layers
                # A copy: a view of the others would be changed by writing to one of them.
                by_adapter.setdefault(record.adapter, {})[record.layer] = found[record.adapter, record.layer].clone()
        return by_adapter

    def loss(self) -> Tensor:
        """The sum of all terms, each weighted by its adapter's `balance_loss_weight`: a scalar."""
        if self._thread.adds_term and torch.is_grad_enabled():
            raise RuntimeError(
                "balance_loss was read in a compute_loss to whose loss LoRAMoETrainerMixin adds it: it would count "
                "twice. Leave it out; to look at it, read it under torch.no_grad()."
            )
        return self._weighted_sum(self._terms())

    @torch.no_grad()
    def routing(self) -> list[LayerRouting]:
        """What the last forward pass recorded, summed over the tokens of each sample."""
        return [
            LayerRouting(
                adapter=record.adapter,
                layer=record.layer,
                importance=(importance := recording.importance([record]))[0].squeeze(0),
                entropy=recording.entropy(record),
                token_counts=importance[1],
                task_types=recording.task_types(record),
                groups=record.groups,
                probabilities=record.probabilities.detach(),
            )
            for recording in self._thread.recordings
            for record in recording.records
        ]

    @property
    def _thread(self) -> _Thread:
        ident = _thread_ident()
        if ident not in self._threads:
            if not torch.compiler.is_compiling():
                alive = {thread.ident for thread in threading.enumerate()}
                self._threads = {known: thread for known, thread in self._threads.items() if known in alive}
            self._threads[ident] = _Thread()
        return self._threads[ident]

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._begin_call(module, args, kwargs, None if torch.compiler.is_compiling() else sys._getframe(1))

    def _begin_below_head(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        calls = self._calls_of(frame, module)
        if calls and calls[-1].module is not module and not calls[-1].below_head:
            calls[-1].below_head = True
            return args, kwargs
        return self._begin_call(module, args, kwargs, frame)

    def _calls_of(self, frame: FrameType | None, module: nn.Module) -> list[_Call]:
        """The calls around a new one, without those that an exception (or Ctrl-C) has ended."""
        calls = self._thread.calls
        if not calls:
            return calls
        if frame is None:  # compiled: a call inside itself does not occur
            while calls and calls[-1].module is module:
                calls.pop()
            return calls
        running = []
        while frame is not None:
            running.append(frame)
            frame = frame.f_back
        while calls and calls[-1].frame is not None and not any(calls[-1].frame is other for other in running):
            calls.pop()
        return calls

    def _begin_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "The model runs inside nn.DataParallel, whose threads would mix up their batches. Start one process "
                "for each GPU instead (torchrun, accelerate launch), or make one GPU visible with "
                "CUDA_VISIBLE_DEVICES."
            )
        thread, calls = self._thread, self._calls_of(frame, module)
        kwargs = dict(kwargs)
        task_types = kwargs.pop("task_types", None)
        if not thread.collecting and not calls:
            self._warn_of_unread_term(thread, module)
            thread.recordings = []  # frees the graph of the call before
        thread.terms = None
        names = inspect.signature(module.forward).parameters if args else ()
        inputs = {**dict(zip(names, args)), **kwargs}
        if task_types is None and thread.collected_types is not None:
            rows = number_of_rows(inputs)
            if not thread.in_blocks:
                _check_rows(thread.collected_types, rows)
            task_types = repeat_for_rows(thread.collected_types, rows)
        frames = getattr(module, "_get_feat_extract_output_lengths", None)
        batch = Batch(inputs, task_types, self.streams, frames)
        calls.append(_Call(module, Recording(batch, module.training), frame))
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        thread = self._thread
        calls = thread.calls
        if not calls or calls[-1].module is not module:
            if calls:
                calls[-1].below_head = False
            return output
        recording = calls.pop().recording
        recording.check_task_types()
        if thread.collecting:
            if recording.carries_gradient and (recording.records or recording.left_out):
                thread.recordings = [*thread.recordings, recording]
        elif not calls:  # a call inside another one leaves no trace
            thread.recordings = [recording]
        self._warn_of_left_out(recording)
        configs = self.configs
        balanced = {r.adapter for r in recording.records if configs[r.adapter].balance_loss_weight > 0}
        if not recording.training or not balanced:
            return output
        untyped = recording.carries_gradient and recording.batch.task_types is None
        if untyped and any(configs[name].num_groups > 1 for name in balanced):
            self._warn(
                "balance_loss_weight > 0, but the model was called without task_types: every sample counts as of "
                "unknown type, so the balance term only spreads the load evenly over the experts. Pass task_types "
                "(with Trainer or TRL: a column task_type and peft_loramoe.training.LoRAMoETrainerMixin), or set "
                "balance_loss_weight=0."
            )
        if thread.collecting:
            return output
        return self._add_to_loss(output, recording, module)

    def _add_to_loss(self, output: Any, recording: Recording, module: nn.Module) -> Any:
        """Add the recording's term to the loss in the model's output.

        An output without a loss is returned as it is.
        """
        thread = self._thread
        if isinstance(output, dict):  # ModelOutput is one too
            loss = output.get("loss")
        else:
            has_labels = recording.batch.has_labels and isinstance(output, tuple)
            loss = output[0] if has_labels and isinstance(output[0], Tensor) and output[0].dim() == 0 else None
        if loss is None:
            if recording.grad_enabled:
                thread.unread = recording
            return output
        tokens = _label_tokens(module, recording)
        if tokens is not None:  # the mean over no labels is not a number
            loss = torch.where((tokens == 0).to(loss.device) & loss.isnan(), torch.zeros_like(loss), loss)
        loss = loss + (self._weighted(recording) * _label_share(tokens, recording)).to(loss.device, loss.dtype)
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def _weighted(self, recording: Recording) -> Tensor:
        if self._thread.recordings == [recording]:
            return self.loss()
        return self._weighted_sum(compute_terms([recording], self.configs))  # of a call inside another one

    def _weighted_sum(self, terms: list[Terms]) -> Tensor:
        weights = [(self.configs[of_adapter.adapter].balance_loss_weight, of_adapter.values) for of_adapter in terms]
        # A gradient of zeros would still be added, and would round the others differently.
        weighted = [weight * values.sum() for weight, values in weights if weight > 0]
        return torch.stack([term.to(weighted[0].device) for term in weighted]).sum() if weighted else torch.zeros(())

    def _terms(self) -> list[Terms]:
        thread = self._thread
        if thread.unread is not None and any(thread.unread is recording for recording in thread.recordings):
            thread.unread = None
        if thread.terms is None:  # kept, so that one process may read what all of them computed together
            thread.terms = compute_terms(thread.recordings, self.configs)
        for terms in thread.terms:
            if terms.adapter not in self.configs:
                raise deleted_adapter(terms.adapter)
        return thread.terms

    def _warn_of_unread_term(self, thread: _Thread, module: nn.Module) -> None:
        if thread.unread is not None and module.training and torch.is_grad_enabled():
            thread.unread = None
            self._warn(
                "The balance term of the last training pass reached no loss: the model computed none itself, and "
                "balance_loss(model) was not read before the next pass. With Trainer or TRL use "
                "peft_loramoe.training.LoRAMoETrainerMixin; in a loop of your own add balance_loss(model) to the "
                "loss, or set balance_loss_weight=0."
            )

    def _warn_of_left_out(self, recording: Recording) -> None:
        if not recording.left_out or not recording.training:
            return
        if any(config.balance_loss_weight > 0 for config in self.configs.values()):
            self._warn(
                f"The balance term leaves out the {len(set(recording.left_out))} adapted layers that read images or "
                f"sound, such as '{recording.left_out[0]}': nothing tells for every model which of their tokens "
                "belong to which row of the batch. The loss alone trains them; exclude_modules leaves them unadapted."
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _emit(message)


@torch.compiler.assume_constant_result  # emitted while tracing, so that the graph does not break
def _emit(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# torch.compile cannot trace it: compiled code belongs to the thread that compiled it.
@torch.compiler.assume_constant_result
def _thread_ident() -> int:
    return threading.get_ident()


def _check_rows(task_types: Any, rows: int) -> None:
    if not is_of_all_rows(task_types) and len(task_types) != rows:
        raise ValueError(
            f"The model was called with {rows} rows, but the batch has {len(task_types)} task types, and nothing "
            "tells which row is of which type. Have compute_loss call the model with the rows of the batch. If it "
            "calls it with all of them several times over, first all chosen, then all rejected answers, set "
            "task_types_in_blocks = True in the trainer's class."
        )


def _label_tokens(module: nn.Module, recording: Recording) -> Tensor | None:
    """Number of labels in the loss of a call of the model; None if it was given none."""
    batch = recording.batch
    causal = LOSS_MAPPING.get(getattr(module, "loss_type", "")) is ForCausalLMLoss
    shifted = causal and not batch.streams.is_encoder_decoder
    return label_tokens(batch.inputs, shifted)


def _label_share(tokens: Tensor | None, recording: Recording) -> Tensor | float:
    """This batch's part of the label tokens by which the model normalised its loss (gradient accumulation)."""
    inputs = recording.batch.inputs
    total = inputs.get("num_items_in_batch")
    if total is None or tokens is None:
        return 1.0
    # A batch without a label would have no part: it counts as if all its tokens were labelled, at most once.
    labels = inputs["labels"] if inputs.get("shift_labels") is None else inputs["shift_labels"]
    return torch.where(tokens > 0, tokens / total, (torch.full_like(tokens, labels.numel()) / total).clamp(max=1.0))
