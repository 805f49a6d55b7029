"""Anchors as batches, and the forward pass of a few of them that `LoRAMoETrainerMixin` adds to every micro-batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState

from ..balance.samples import number_of_rows
from ..config import LoRAMoEConfig
from ..modes import INITS_THAT_KEEP_BASE, base_model, switchable
from ..options import Kind, number, shown
from .anchors import COUNT, check_anchor, comparable, read_anchors


# How special tokens look: <|im_start|>, the same with DeepSeek's wide bars, <start_of_turn>, <bos>; <s> and </s> at
# the ends.
SPECIAL = re.compile(
    "<\\|[^|<>\\s]+\\|>|<\uff5c[^\uff5c<>\\s]+\uff5c>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|^<s>|</s>$"
)


@dataclass(frozen=True)
class AnchorOptions:
    """How anchors are trained on.

    Attributes:
        loss_weight: weight of the language-modelling loss.
        kl_weight: weight of the divergence from the base model.
        per_batch: anchors of a micro-batch; None for a tenth of its samples, at least one.
        every: draw anchors for every n-th micro-batch only.
    """

    loss_weight: float
    kl_weight: float
    per_batch: int | None
    every: int


# The mixin's names of these, in this order: what each takes, and the default.
ANCHOR_OPTIONS: dict[str, tuple[Kind, Any]] = {
    "anchor_loss_weight": (number(0, 1e6), 0.0),
    "anchor_kl_weight": (number(0, 1e6), 0.3),
    "anchors_per_batch": (COUNT, None),
    "anchors_every": (COUNT, 1),
}


class AnchorBatches:
    """Anchors, tokenized once.

    Args:
        anchors: texts or records with a `text`: a JSONL file of them, a data set with a column `text`, or any
            iterable.
        tokenizer: the model's tokenizer.
        max_length: the most tokens that an anchor may have; None for any number.
        seed: of the order.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: the anchors are a mapping, such as a dictionary of splits.
        ValueError: there is no anchor, all are the same, one is empty, or `tokenize_anchors` refuses one.
    """

    def __init__(
        self,
        anchors: str | Path | Iterable[str | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(anchors, Mapping):  # a DatasetDict too; its keys are no texts
            raise TypeError(
                f"anchors is a {type(anchors).__name__}; give one list or split, such as anchors['train']."
            )
        given = read_anchors(anchors) if isinstance(anchors, (str, Path)) else anchors
        texts = [check_anchor(anchor, f"anchors[{i}]")["text"] for i, anchor in enumerate(given)]
        if not texts:
            raise ValueError(
                "anchors is empty; sample some with sample_anchors or `peft-loramoe anchors`, or pass None."
            )
        distinct = list({comparable(text): text for text in reversed(texts)}.values())[::-1]
        if len(distinct) == 1 < len(texts):
            raise ValueError(f"All {len(texts)} anchors are the same text, {texts[0][:60]!r}; sample distinct ones.")
        if len(distinct) < len(texts):
            warnings.warn(f"{len(texts) - len(distinct)} of {len(texts)} anchors repeat another one and are left out.")
        self._rows = [torch.tensor(row) for row in tokenize_anchors(distinct, tokenizer, max_length)]
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, number: int, step: int, slot: int = 0) -> dict[str, Tensor]:
        """Some anchors as arguments of the model.

        Each step has a random order of its own, in which its slots, the micro-batches on all processes, take turns:
        they get distinct anchors as long as there are enough.

        Args:
            number: how many.
            step: the optimizer step, from 0.
            slot: which of the step's micro-batches, from 0.

        Returns:
            `input_ids` and `attention_mask`, int64, shape (number, longest), padded on the right.
        """
        generator = torch.Generator().manual_seed(hash((self._seed, step)) % 2**63)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        rows = [self._rows[order[(slot * number + i) % len(order)]] for i in range(number)]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }


def tokenize_anchors(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[list[int]]:
    """Token ids of anchors, of those to train on and of those to measure on.

    Args:
        texts: the anchors.
        tokenizer: the model's tokenizer. A text that begins with one of its special tokens, as those of chat templates
            do, is given no further ones.
        max_length: the most tokens that an anchor may have; None for any number.

    Raises:
        ValueError: an anchor is too short, too long, or has another tokenizer's special tokens.
    """
    _check_special_tokens(texts, tokenizer)
    special = tuple(_special_tokens(tokenizer))
    rows = [tokenizer(text, add_special_tokens=not text.startswith(special))["input_ids"] for text in texts]
    for text, row in zip(texts, rows):
        if len(row) < 2:
            raise ValueError(
                f"The anchor {text!r} has {len(row)} token; an anchor needs two or more to be learned from."
            )
        if 2 * row.count(tokenizer.unk_token_id) > len(row):
            raise ValueError(
                f"More than half of the tokens of the anchor {text[:60]!r} are unknown to the tokenizer; sample "
                "anchors from this model."
            )
        if max_length is not None and len(row) > max_length:
            raise ValueError(
                f"The anchor {text[:60]!r}... has {len(row)} tokens, more than max_length={max_length}: shorten it "
                "(anchors_from_texts cuts texts), or raise max_length."
            )
    return rows


class AnchorPass:
    """Draws anchors for the micro-batches of a trainer and runs the model on them.

    Which anchors a micro-batch gets depends on the seed, the optimizer step, its place in the step and the process
    alone, so that a resumed run goes on as it would have.

    Args:
        trainer: the trainer, initialised.
        config: of the model's adapter; None for a model without LoRAMoE layers.
        anchors: what `AnchorBatches` takes.
        options: how they are trained on.

    Raises:
        ValueError: the trainer has no tokenizer, the model is of a kind that anchors are not for, or it has no adapter
            that leaves the base model as it was, which `kl_weight` needs.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: LoRAMoEConfig | None,
        anchors: str | Path | Iterable[str | Mapping[str, Any]],
        options: AnchorOptions,
    ) -> None:
        self._trainer = trainer
        self._typed = config is not None
        loss_weight, kl_weight = options.loss_weight, options.kl_weight
        self._loss_weight, self._kl_weight = loss_weight, kl_weight
        self._per_batch, self._every = options.per_batch, options.every
        self._state: TrainerState | None = None  # of the run, which each call of `train` begins anew
        self._step, self._micro_batches = -1, 0  # the optimizer step, and how many of its micro-batches had their turn
        self._losses: dict[str, list[Tensor]] = {}  # unweighted, by their names in the log, since they were taken
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if not callable(tokenizer):
            raise ValueError(
                "anchors are texts: pass the model's tokenizer to the trainer, processing_class=tokenizer."
            )
        model_config = getattr(trainer.model, "config", None)
        if getattr(model_config, "is_encoder_decoder", False):
            raise ValueError(
                "anchors are texts that a decoder continues, but the model is an encoder-decoder: pass anchors=None."
            )
        if config is not None and loss_weight + kl_weight > 0 and config.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(
                f"The adapter has task_type={config.task_type!r}, whose outputs are not the anchors' tokens: set "
                "anchor_loss_weight=0 and anchor_kl_weight=0."
            )
        if kl_weight > 0 and trainer.model is not None:
            _check_base_model(trainer.model, kl_weight)
        self._has_effect = loss_weight + kl_weight > 0 or (config is not None and config.balance_loss_weight > 0)
        # These engines gather a layer's parameters for the backward pass where its output has a gradient.
        self._needs_gradient = trainer.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
        if not self._has_effect:
            warnings.warn(
                "The anchors have no effect: anchor_loss_weight=0, anchor_kl_weight=0, and there is no balance term "
                "(balance_loss_weight=0, or a model without LoRAMoE layers)."
            )
        max_length = getattr(trainer.args, "max_length", None)
        max_length = max_length or getattr(model_config, "max_position_embeddings", None)
        self._batches = AnchorBatches(
            anchors, cast("PreTrainedTokenizerBase", tokenizer), max_length=max_length, seed=trainer.args.seed
        )

    def draw(self, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The anchors of the next micro-batch as arguments of the model; None if it has none.

        Args:
            inputs: the micro-batch.
        """
        if not self._has_effect:
            return None
        trainer = self._trainer
        if trainer.state is not self._state or trainer.state.global_step != self._step:
            self._state, self._step, self._micro_batches = trainer.state, trainer.state.global_step, 0
        place, accumulation = self._micro_batches, trainer.args.gradient_accumulation_steps
        self._micro_batches += 1
        # Counted from 1: the last micro-batch of a step, which RouterCallback reads, is a multiple more often then.
        if (self._step * accumulation + place + 1) % self._every:
            return None
        replicas = getattr(trainer, "get_tp_size", lambda: 1)()  # processes that see the same samples
        processes = trainer.accelerator.num_processes // replicas
        slot = place * processes + trainer.accelerator.process_index // replicas
        number = self._per_batch or max(1, round(_number_of_samples(inputs) / 10))
        batch = self._batches.draw(number, self._step, slot)
        return {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}

    def expected(self, model: nn.Module, anchors: dict[str, Tensor]) -> Tensor | None:
        """What the base model predicts for anchors, without dropout.

        Args:
            model: the model, wrapped in whatever way.
            anchors: what `draw` returned.

        Returns:
            Logits, as `predictions` gives them; None if `kl_weight` is zero.
        """
        if self._kl_weight == 0:
            return None
        with base_model(model):
            logits = model(**anchors)["logits"]
        return predictions(logits, anchors)[0]

    def loss(self, model: nn.Module, anchors: dict[str, Tensor], expected: Tensor | None) -> Tensor | None:
        """Run the model on anchors.

        Args:
            model: the model, wrapped in whatever way.
            anchors: what `draw` returned.
            expected: what `expected` returned for them.

        Returns:
            The weighted sum of their mean loss per token and of KL(base model || model) per token, a scalar; with
            weights of zero None, or a zero that has a gradient.
        """
        arguments = dict(anchors)
        # With labels, fused losses give no logits.
        if self._loss_weight > 0 and expected is None:
            arguments["labels"] = anchors["input_ids"].masked_fill(anchors["attention_mask"] == 0, -100)
        if self._typed:
            arguments["task_types"] = anchors["input_ids"].new_zeros(len(anchors["input_ids"]))
        # Dropout of the tasks must not depend on whether there are anchors.
        device = self._trainer.args.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            outputs = model(**arguments)
        if expected is None and self._loss_weight == 0:
            return outputs["logits"].flatten()[0] * 0 if self._needs_gradient else None
        losses = {}
        if expected is not None:
            predicted, tokens = predictions(outputs["logits"], anchors)
            losses["anchor_kl"] = divergence(expected, predicted)
            if self._loss_weight > 0:
                losses["anchor_loss"] = F.cross_entropy(predicted, tokens)
        else:
            losses["anchor_loss"] = outputs["loss"]
        for name, loss in losses.items():
            self._losses.setdefault(name, []).append(loss.detach())
        weights = {"anchor_loss": self._loss_weight, "anchor_kl": self._kl_weight}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def take_losses(self) -> dict[str, float]:
        """The mean unweighted losses since the last call, over the processes, which have to call this together."""
        means: Any = {name: torch.stack(losses).mean() for name, losses in self._losses.items()}
        self._losses = {}
        return {name: mean.item() for name, mean in self._trainer.accelerator.reduce(means, reduction="mean").items()}


def predictions(logits: Tensor, anchors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits that predict the tokens after the first of each anchor, and these tokens.

    Args:
        logits: the model's, shape (B, T, vocabulary).
        anchors: what the model was given: `input_ids` and `attention_mask`, shape (B, T).

    Returns:
        Logits, at least float32, shape (N, vocabulary), and token ids, shape (N,), of the N tokens that are no
        padding.
    """
    real = anchors["attention_mask"][:, 1:] != 0
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits[:, :-1][real].to(precise), anchors["input_ids"][:, 1:][real]


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """KL(base || model) in nats, the mean over tokens, from logits of shape (N, vocabulary)."""
    return F.kl_div(model.log_softmax(-1), base.log_softmax(-1), reduction="batchmean", log_target=True)


def _check_base_model(model: nn.Module, kl_weight: float) -> None:
    """Refuse a model whose base model cannot be seen by disabling adapters."""
    adapted = switchable(model)
    if not adapted:
        raise ValueError(
            f"anchor_kl_weight={kl_weight} compares the model with its base model, but it has no adapter that can be "
            "disabled: give it one with get_peft_model, or set anchor_kl_weight=0."
        )
    for name, config in getattr(model, "peft_config", {}).items():
        if (kind := getattr(config, "init_lora_weights", True)) not in INITS_THAT_KEEP_BASE:
            raise ValueError(
                f"anchor_kl_weight={kl_weight} compares the model with its base model, whose weights "
                f"init_lora_weights={kind!r} of the adapter '{name}' may have changed: choose "
                "init_lora_weights=True, or set anchor_kl_weight=0."
            )
    parts = [getattr(module, name, None) for module in adapted for name in module.adapter_layer_names]
    of_adapters = {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # PEFT's mark of a tuner's own parameters
    for name, parameter in model.named_parameters():
        own = parameter in of_adapters or (prefix is not None and prefix in name)
        if parameter.requires_grad and not own:
            raise ValueError(
                f"anchor_kl_weight={kl_weight} compares the model with its base model, but {name!r} is trained in the "
                "base model itself: set bias='none' in the adapter's configuration, list modules in modules_to_save "
                "instead of unfreezing them, or set anchor_kl_weight=0."
            )


def check_anchor_options(given: bool, **options: Any) -> AnchorOptions:
    """Check the mixin's options about anchors, and put in what None stands for.

    Args:
        given: whether there are anchors.
        **options: those of `ANCHOR_OPTIONS`; None for the default.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of its range, or is given without anchors.
    """
    values = {}
    for name, (kind, default) in ANCHOR_OPTIONS.items():
        value = options.get(name)
        if value is not None and not given:
            raise ValueError(f"{name}={shown(value)} has no effect without anchors; give some, or leave it out.")
        values[name] = default if value is None else kind(name, value)
    return AnchorOptions(*values.values())


def _number_of_samples(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch, or, where rows are packed, the samples in them."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        second = positions == 1  # every sample has one such token, padding at the end of a packed row none
        return int((second if mask is None else second & (mask != 0)).sum())
    return number_of_rows(inputs)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _check_special_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    for text in texts:
        if foreign := sorted({token for token in SPECIAL.findall(text) if token not in vocabulary}):
            raise ValueError(
                f"The anchor {text[:60]!r} contains {', '.join(foreign)}, which the tokenizer does not know: the "
                "anchors are of another model. Sample them from this one with sample_anchors or `peft-loramoe "
                "anchors`."
            )
