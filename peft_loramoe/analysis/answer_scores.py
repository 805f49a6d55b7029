"""How likely a model finds given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modes import evaluation_mode
from .adapted import adds_special_tokens, device_of, takes_logits_to_keep


@dataclass(frozen=True)
class AnswerScore:
    """How well a model knows the answer that follows a prompt.

    Attributes:
        correct: whether greedy decoding would give the answer, token for token.
        loss: mean negative log likelihood per token of the answer, in nats.
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
) -> list[AnswerScore]:
    """Score given answers in one forward pass each, without generating.

    A text is its prompt, a space and its answer; no space is added after whitespace and after an added token of the tokenizer
    (the markers that chat templates end with). It gets the special tokens that the tokenizer adds, but no second BOS token
    where the prompt begins with one. The tokens that reach into the answer's characters are scored; the first of them may
    contain the space. What would follow the answer, punctuation or the end of the text, is not: that would measure the format.

    The model runs in evaluation mode without gradients, and its modules are left in the modes they were in.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer, one that says which characters its tokens cover.
        prompts: n texts.
        answers: n texts, one for each prompt; whitespace around them is dropped.
        batch_size: texts at a time.
        add_special_tokens: False where the prompts have all their special tokens, as those of chat templates do.

    Returns:
        The n scores, in the order of the prompts.

    Raises:
        ValueError: the model is an encoder-decoder, the numbers of prompts and answers differ, `batch_size` is not positive,
            the tokenizer does not say which characters its tokens cover, an answer is empty or has no tokens, a text begins
            with its answer, so that nothing predicts it, or the logits are not finite.
    """
    _require_decoder_only(model)
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers: each prompt needs one answer.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    texts = _encode(tokenizer, prompts, answers, add_special_tokens)
    # Alike texts together: little padding, and few positions whose logits are computed. The longest first: if memory is
    # short, that shows at once.
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), texts[i].start), reverse=True)
    scores: dict[int, AnswerScore] = {}
    with evaluation_mode(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            scores.update(zip(batch, _score_batch(model, [texts[i] for i in batch])))
    return [scores[i] for i in range(len(texts))]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text, and the characters that each token covers: (0, 0) for special tokens that were added.

    A text gets the special tokens that the tokenizer adds, but no second BOS token where it begins with one; none without
    `add_special_tokens`.

    Raises:
        ValueError: the tokenizer does not say which characters its tokens cover.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters its tokens cover (is_fast), which tells an answer from "
            "its prompt; load a tokenizer of this model that does."
        )
    encoded: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for special in (True, False):
        rows = [i for i, text in enumerate(texts) if (add_special_tokens and adds_special_tokens(tokenizer, text)) is special]
        if rows:
            batch = tokenizer([texts[i] for i in rows], add_special_tokens=special, return_offsets_mapping=True)
            encoded.update(zip(rows, zip(batch["input_ids"], batch["offset_mapping"])))
    return [encoded[i] for i in range(len(texts))]


def _require_decoder_only(model: nn.Module) -> None:
    """Refuse an encoder-decoder: its decoder does not continue the prompt, which the encoder reads."""
    # The outermost of them: PEFT's and other wrappers need not show its configuration.
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if pretrained is not None and pretrained.config.is_encoder_decoder:
        raise ValueError(f"{type(pretrained).__name__} is an encoder-decoder; only causal language models answer questions.")


@dataclass(frozen=True)
class _Text:
    """Token ids of a prompt and its answer; those from `start` on are the answer's."""

    ids: list[int]
    start: int


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], add_special_tokens: bool
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
    """The answer's tokens: those that reach beyond character `start`; special tokens that were added cover (0, 0)."""
    inside = [position for position, (_, end) in enumerate(offsets) if end > start]
    if not inside:
        raise ValueError(f"answers[{i}]={answer!r} has no tokens in this tokenizer.")
    if inside[0] == 0:
        raise ValueError(f"answers[{i}]={answer!r} is the text's first token, which nothing predicts; prompts[{i}] is empty.")
    return _Text(ids[: inside[-1] + 1], inside[0])


def _score_batch(model: nn.Module, texts: list[_Text]) -> list[AnswerScore]:
    device = device_of(model)
    lengths = torch.tensor([len(text.ids) - 1 for text in texts])  # nothing is predicted from the last token
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
            f"The model's logits ({logits.dtype}) are not finite: training diverged, or the model overflows in its dtype."
        )
    right = (logits.argmax(-1) == targets).cpu()
    return [
        AnswerScore(correct=bool(r.all()), loss=loss.mean().item())
        for r, loss in zip(right.split(counts), losses.split(counts))
    ]


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at (rows, positions), shape (len(rows), vocabulary).

    Where the model can, it computes no logits at other positions: those of a large vocabulary would take more memory than all
    the rest.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if takes_logits_to_keep(model):
        kept, columns = positions.unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=kept.to(input_ids.device)).logits
    else:
        logits = model(**inputs).logits
        columns = positions + logits.shape[1] - input_ids.shape[1]  # after the virtual tokens of prompt learning
    return logits[rows.to(logits.device), columns.to(logits.device)]
