"""Anchors as batches of token ids, drawn anew for every micro-batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .anchor_files import check_anchor, comparable, read_anchors


# How special tokens look: <|im_start|>, the same with DeepSeek's wide bars, <start_of_turn>, <bos>; <s> and </s> at the ends.
SPECIAL = re.compile(
    "<\\|[^|<>\\s]+\\|>|<\uff5c[^\uff5c<>\\s]+\uff5c>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|^<s>|</s>$"
)


class AnchorBatches:
    """Anchors, tokenized once.

    Args:
        anchors: texts or records with a `text`: a JSONL file of them, a data set with a column `text`, or any iterable.
        tokenizer: the model's tokenizer. A text that begins with one of its special tokens, as those of chat templates do, is
            given no further ones.
        max_length: the most tokens that an anchor may have; None for any number.
        seed: of the order.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there is no anchor, all are the same, or one is empty, too short, too long, or has another tokenizer's
            special tokens.
    """

    def __init__(
        self,
        anchors: str | Path | Iterable[str | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        given = read_anchors(anchors) if isinstance(anchors, (str, Path)) else anchors
        texts = [check_anchor(anchor, f"anchors[{i}]")["text"] for i, anchor in enumerate(given)]
        if not texts:
            raise ValueError("anchors is empty; sample some with sample_anchors or `peft-loramoe anchors`, or pass None.")
        distinct = list({comparable(text): text for text in reversed(texts)}.values())[::-1]
        if len(distinct) == 1 < len(texts):
            raise ValueError(f"All {len(texts)} anchors are the same text, {texts[0][:60]!r}; sample distinct ones.")
        if len(distinct) < len(texts):
            warnings.warn(f"{len(texts) - len(distinct)} of {len(texts)} anchors repeat another one and are left out.")
        _check_special_tokens(distinct, tokenizer)
        special = tuple(_special_tokens(tokenizer))
        rows = [tokenizer(text, add_special_tokens=not text.startswith(special))["input_ids"] for text in distinct]
        for text, row in zip(distinct, rows):
            if len(row) < 2:
                raise ValueError(f"The anchor {text!r} has {len(row)} token; an anchor needs two or more to be learned from.")
            if max_length is not None and len(row) > max_length:
                raise ValueError(
                    f"The anchor {text[:60]!r}... has {len(row)} tokens, more than max_length={max_length}: shorten it "
                    "(anchors_from_texts cuts texts), or raise max_length."
                )
        self._rows = [torch.tensor(row) for row in rows]
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, number: int, step: int, slot: int = 0) -> dict[str, Tensor]:
        """Some anchors as arguments of the model.

        Each step has a random order of its own, in which its slots, the micro-batches on all processes, take turns: they get
        distinct anchors as long as there are enough.

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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _check_special_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    for text in texts:
        if foreign := sorted({token for token in SPECIAL.findall(text) if token not in vocabulary}):
            raise ValueError(
                f"The anchor {text[:60]!r} contains {', '.join(foreign)}, which the tokenizer does not know: the anchors "
                "are of another model. Sample them from this one with sample_anchors or `peft-loramoe anchors`."
            )
