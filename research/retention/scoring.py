"""Scoring what a model knows: likelihoods of answers and texts, without generating anything.

An answer is greedy if each of its tokens is the likeliest after the ones before, which is what greedy decoding would
give.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peft_loramoe


@dataclass(frozen=True)
class Item:
    """Token ids to be scored after those before them; `options` are first tokens of wrong answers."""

    before: list[int]
    answer: list[int]
    options: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """Of one item: sum of the log-likelihoods (nats); whether it is greedy.

    Whether it is likelier than all options.
    """

    log_likelihood: float
    greedy: bool
    ranked: bool


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and their attention mask, shape (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def answer_logits(model: nn.Module, items: list[Item], types: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Logits at the positions that predict the items' answers, and the answers' tokens, from a padded batch.

    The head is applied to those positions only: it is a third of a small model's arithmetic.

    Args:
        model: PEFT model or base model.
        items: what is scored.
        types: task type of each item, for a LoRAMoE model.

    Returns:
        Logits, shape (all answers' tokens, vocabulary), float32; the tokens, shape (all answers' tokens,), int64.
    """
    base = base_of(model)
    ids, mask = pad([item.before + item.answer for item in items])
    ids, mask = ids.to(base.device), mask.to(base.device)
    arguments = {} if types is None else {"task_types": torch.tensor(types, device=base.device)}
    hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments).last_hidden_state
    rows = torch.tensor([row for row, item in enumerate(items) for _ in item.answer])
    columns = torch.tensor([len(item.before) - 1 + i for item in items for i in range(len(item.answer))])
    return nn.functional.linear(hidden[rows, columns], base.lm_head.weight).float(), _answers(items, base)


def packed_answer_logits(
    model: nn.Module, items: list[Item], types: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """As `answer_logits`, from one row without padding.

    That saves a third of the arithmetic of a small training step. The attention grows with the square of the row.
    """
    base = base_of(model)
    rows = [item.before + item.answer for item in items]
    arguments = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row))]]),
    }
    if types is not None:
        arguments["task_types"] = torch.tensor([[kind for row, kind in zip(rows, types) for _ in row]])
    arguments = {name: tensor.to(base.device) for name, tensor in arguments.items()}
    hidden = base.model(use_cache=False, **arguments).last_hidden_state[0]
    ends = itertools.accumulate(len(row) for row in rows)
    positions = [end - 1 - len(item.answer) + i for end, item in zip(ends, items) for i in range(len(item.answer))]
    return nn.functional.linear(hidden[positions], base.lm_head.weight).float(), _answers(items, base)


def _answers(items: list[Item], base: PreTrainedModel) -> Tensor:
    return torch.tensor([token for item in items for token in item.answer], device=base.device)


@torch.no_grad()
def score(model: nn.Module, items: list[Item], batch_size: int = 48) -> tuple[list[Score], Tensor | None]:
    """Score items in batches of similar length.

    Returns:
        A score for each item; for a LoRAMoE model the mean router weight of the first expert group, shape (items,
        linears).
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i].before) + len(items[i].answer))
    scores: dict[int, Score] = {}
    weights: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        logits, tokens = answer_logits(model, [items[i] for i in indices])
        log_likelihoods = logits.log_softmax(-1)
        greedy = log_likelihoods.argmax(-1) == tokens
        sizes = [len(items[i].answer) for i in indices]
        for i, table, hits, answer in zip(
            indices, log_likelihoods.split(sizes), greedy.split(sizes), tokens.split(sizes)
        ):
            right = table.gather(1, answer[:, None])
            ranked = bool((table[0, list(items[i].options)] < right[0]).all())
            scores[i] = Score(float(right.sum()), bool(hits.all()), ranked)
        if (first := first_group_weight(model)) is not None:
            weights.update(zip(indices, first))
    stacked = torch.stack([weights[i] for i in range(len(items))]) if weights else None
    return [scores[i] for i in range(len(items))], stacked


def first_group_weight(model: nn.Module) -> Tensor | None:
    """Mean router weight of expert group 0 for each sample of the last forward pass, shape (samples, linears)."""
    if not any(isinstance(module, peft_loramoe.LoRAExperts) for module in model.modules()):
        return None
    shares = [
        layer.importance[:, layer.groups.slices[0]].sum(-1) / layer.token_counts
        for layer in peft_loramoe.layer_routing(model)
    ]
    return torch.stack(shares, dim=1).cpu()
