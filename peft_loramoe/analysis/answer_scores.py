"""Score given answers by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modes import evaluation_mode
from .adapted import adds_special_tokens, device_of, takes_logits_to_keep


@dataclass(frozen=True)
class AnswerScore:
    """Score of one answer.

    Attributes:
        correct: whether greedy decoding would produce exactly the answer's tokens.
        loss: mean negative log-likelihood per token of the answer, in nats.

    Example:
        >>> AnswerScore(correct=True, loss=0.12).correct
        True
    """

    correct: bool
    loss: float


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 64,
    add_special_tokens: bool = True,
    progress: bool = False,
) -> list[AnswerScore]:
    """Score given answers from a single forward pass per text, without generation.

    Prompt and answer are joined by a space, except after whitespace and after an added token, such as the markers at
    the end of chat templates. Every token that overlaps the answer is scored; the first may include the space. The end
    of the text and any punctuation after the answer are not scored.

    The model runs in eval mode without gradients; afterwards, its modules are back in their previous modes.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: a fast tokenizer of the model.
        prompts: n texts.
        answers: n texts, one per prompt; surrounding whitespace is stripped.
        batch_size: number of texts per forward pass.
        add_special_tokens: whether the tokenizer adds its special tokens, but never a second BOS. Set it to False if
            the prompts contain them already, as those of chat templates do.
        progress: show a progress bar if the standard error output is a terminal.

    Returns:
        The n scores, in the order of the prompts.

    Raises:
        ValueError: the model is an encoder-decoder, the numbers of prompts and answers differ, `batch_size` is not
            positive, the tokenizer is not a fast one, an answer is empty or has no tokens, there is no token before an
            answer, or the logits are not finite.

    Example:
        >>> scores = score_answers(tiny_model(), tiny_tokenizer(), ["w3 w4", "w5"], ["w6", "w7 w8"])
        >>> [score.correct for score in scores]
        [False, False]
    """
    _require_decoder_only(model)
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers: each prompt needs one answer.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    texts = _encode_answers(tokenizer, prompts, answers, add_special_tokens)
    # Batch texts of similar length: less padding, fewer logits. The longest come first, so that running out of memory
    # shows at once.
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), texts[i].start), reverse=True)
    scores: dict[int, AnswerScore] = {}
    bar = tqdm(total=len(order), desc="Scoring answers", leave=False, disable=None if progress else True)
    with evaluation_mode(model), bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            scores.update(zip(batch, _score_batch(model, [texts[i] for i in batch])))
            bar.update(len(batch))
    return [scores[i] for i in range(len(texts))]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text and the span of characters of each token, (0, 0) for added special tokens.

    With `add_special_tokens`, a text gets the special tokens of the tokenizer, but no second BOS.

    Raises:
        ValueError: the tokenizer is not a fast one, so it has no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} has no character offsets (is_fast is False), which separate the answer from "
            "its prompt; load the fast tokenizer of this model."
        )
    encoded: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for special in (True, False):
        rows = [
            i
            for i, text in enumerate(texts)
            if (add_special_tokens and adds_special_tokens(tokenizer, text)) is special
        ]
        if rows:
            batch = tokenizer([texts[i] for i in rows], add_special_tokens=special, return_offsets_mapping=True)
            encoded.update(zip(rows, zip(batch["input_ids"], batch["offset_mapping"])))
    return [encoded[i] for i in range(len(texts))]


def _require_decoder_only(model: nn.Module) -> None:
    """Refuse encoder-decoders, whose decoder does not continue the prompt."""
    # Wrappers such as PEFT's need not expose the configuration of the model inside.
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if pretrained is not None and pretrained.config.is_encoder_decoder:
        raise ValueError(
            f"{type(pretrained).__name__} is an encoder-decoder; only causal language models answer questions."
        )


@dataclass(frozen=True)
class _Text:
    """Token ids of a prompt and its answer, which begins at token `start`."""

    ids: list[int]
    start: int


def _encode_answers(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], add_special_tokens: bool
) -> list[_Text]:
    markers = tuple(tokenizer.get_added_vocab())
    texts, starts = [], []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        if not answer.strip():
            raise ValueError(f"answers[{i}]={answer!r} is empty; the prompt is {prompt!r}.")
        if prompt and not prompt[-1].isspace() and not prompt.endswith(markers):
            prompt += " "
        starts.append(len(prompt))
        texts.append(prompt + answer.strip())
    encoded = encode(tokenizer, texts, add_special_tokens)
    return [_locate(i, answers[i], starts[i], *encoded[i]) for i in range(len(texts))]


def _locate(i: int, answer: str, start: int, ids: list[int], offsets: list[tuple[int, int]]) -> _Text:
    """Find the answer's tokens: those that end after character `start`."""
    inside = [position for position, (_, end) in enumerate(offsets) if end > start]
    if not inside:
        raise ValueError(f"answers[{i}]={answer!r} has no tokens in this tokenizer.")
    if inside[0] == 0:
        raise ValueError(
            f"answers[{i}]={answer!r} is the text's first token and has no likelihood; prompts[{i}] must not be empty."
        )
    return _Text(ids[: inside[-1] + 1], inside[0])


def _score_batch(model: nn.Module, texts: list[_Text]) -> list[AnswerScore]:
    device = device_of(model)
    lengths = torch.tensor([len(text.ids) - 1 for text in texts])  # the last token predicts nothing
    width = int(lengths.max())
    input_ids = torch.tensor([text.ids[:-1] + [0] * (width + 1 - len(text.ids)) for text in texts])
    attention_mask = (torch.arange(width) < lengths[:, None]).long()
    counts = [len(text.ids) - text.start for text in texts]
    rows = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(text.start - 1, len(text.ids) - 1) for text in texts])
    logits = _logits_at(model, input_ids.to(device), attention_mask.to(device), rows, positions)
    targets = torch.tensor([token for text in texts for token in text.ids[text.start :]], device=logits.device)
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"The model's logits ({logits.dtype}) are not finite: training diverged, or the model overflows in its "
            "dtype."
        )
    right = (logits.argmax(-1) == targets).cpu()
    return [
        AnswerScore(correct=bool(r.all()), loss=loss.mean().item())
        for r, loss in zip(right.split(counts), losses.split(counts))
    ]


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at (rows, positions), shape (len(rows), vocabulary).

    Other positions are skipped if the model allows it: with a large vocabulary, logits take more memory than anything
    else.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if takes_logits_to_keep(model):
        kept, columns = positions.unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=kept.to(input_ids.device)).logits
    else:
        logits = model(**inputs).logits
        columns = positions + logits.shape[1] - input_ids.shape[1]  # after the virtual tokens of prompt learning
    return logits[rows.to(logits.device), columns.to(logits.device)]
