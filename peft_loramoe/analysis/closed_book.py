"""Closed-book question answering: a model answers from memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..modes import evaluation_mode
from .adapted import device_of, uses_prompt_learning
from .answer_scores import encode, score_answers
from .questions import Question


TEMPLATE = "Question: {question}\nAnswer:"
CHAT_TEMPLATE = "{question}\nGive the answer only, in as few words as possible."


@dataclass(frozen=True)
class Response:
    """A model's response to a question.

    Attributes:
        question: the question.
        expected: the first accepted answer.
        given: the first line that the model generated.
        exact_match: whether `given` equals an accepted answer after normalization.
        f1: word overlap of `given` with the best accepted answer, in [0, 1].
        loss: mean negative log-likelihood per token of the expected answer, in nats.

    Example:
        >>> result = answer_questions(tiny_model(), tiny_tokenizer(), [Question("w3 w4", ("w5",))], max_new_tokens=2)
        >>> result.responses[0].expected
        'w5'
    """

    question: str
    expected: str
    given: str
    exact_match: bool
    f1: float
    loss: float


@dataclass(frozen=True)
class ClosedBookResult:
    """The responses to n questions, in the order of the questions, and their mean scores.

    Example:
        >>> result = ClosedBookResult([Response("2 + 2?", "4", "four", exact_match=False, f1=0.0, loss=1.5)])
        >>> result.exact_match, result.loss
        (0.0, 1.5)
    """

    responses: list[Response] = field(repr=False)

    @property
    def exact_match(self) -> float:
        """Share of questions answered with an exact match, in [0, 1]."""
        return sum(response.exact_match for response in self.responses) / len(self.responses)

    @property
    def f1(self) -> float:
        """Mean F1 over the questions, in [0, 1]."""
        return sum(response.f1 for response in self.responses) / len(self.responses)

    @property
    def loss(self) -> float:
        """Mean loss over the questions, in nats per token."""
        return sum(response.loss for response in self.responses) / len(self.responses)


def answer_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    shots: Sequence[Question] = (),
    template: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: bool = False,
) -> ClosedBookResult:
    """Generate answers to questions by greedy decoding and score them.

    The prompt consists of the shots, each with its first accepted answer, and the question (see `build_prompts`). The
    answer is the first generated line. Only the EOS and BOS tokens of the model's `generation_config` are used. The
    loss is that of the first accepted answer after the same prompt, from `score_answers`.

    The model runs in eval mode without gradients; afterwards, its modules are back in their previous modes.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: a fast tokenizer of the model.
        questions: the questions to ask.
        shots: solved examples in the prompt; they must not be among `questions`.
        template: text of a question, with the placeholder `{question}`; None for `TEMPLATE`, or `CHAT_TEMPLATE` with
            `chat`.
        chat: format questions and answers as a conversation with the tokenizer's chat template.
        max_new_tokens: maximum length of an answer, in tokens.
        batch_size: number of questions per batch.
        progress: show a progress bar if the standard error output is a terminal.

    Returns:
        The responses, in the order of the questions.

    Raises:
        ValueError: there are no questions, a question is also a shot, a number is not positive, the template has no
            `{question}` or ends with a space, the tokenizer has no chat template, or `score_answers` refuses its
            input.

    Example:
        >>> questions = [Question("w3 w4", ("w5", "w6")), Question("w7", ("w8",))]
        >>> result = answer_questions(tiny_model(), tiny_tokenizer(), questions, max_new_tokens=2)
        >>> len(result.responses)
        2
    """
    if not questions:
        raise ValueError("questions is empty; pass at least one question.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    shown = {shot.question for shot in shots}
    if leaked := [question.question for question in questions if question.question in shown]:
        raise ValueError(
            f"{len(leaked)} of the questions are also shots, which give their answers away, for example {leaked[0]!r}."
        )
    prompts = build_prompts(tokenizer, [question.question for question in questions], shots, template, chat)
    special = not chat  # chat templates contain them
    # Scoring is faster and checks more, so it comes first.
    scores = score_answers(
        model, tokenizer, prompts, [question.answers[0] for question in questions], batch_size, special, progress
    )
    given = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size, special, progress)
    return ClosedBookResult(
        [
            Response(q.question, q.answers[0], text, exact_match=q.exact_match(text), f1=q.f1(text), loss=score.loss)
            for q, text, score in zip(questions, given, scores)
        ]
    )


def build_prompts(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    shots: Sequence[Question] = (),
    template: str | None = None,
    chat: bool = False,
) -> list[str]:
    """The prompt of each question.

    Without `chat`, shots and question are separated by empty lines. An answer follows its question after a space, or
    directly if the template ends with a line break. With `chat`, shots and question are turns of a conversation that
    ends where the model's turn begins; thinking is disabled.

    Raises:
        ValueError: the template has no `{question}` or ends with a space, or the tokenizer has no chat template.
    """
    template = template if template is not None else (CHAT_TEMPLATE if chat else TEMPLATE)
    if "{question}" not in template:
        raise ValueError(f"template={template!r} must contain {{question}}.")
    if template.endswith(" "):  # the space belongs to the first token of the answer
        raise ValueError(f"template={template!r} must not end with a space: one is added before the answer.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template, which chat=True (--chat) needs; choose "
            "another tokenizer (--tokenizer)."
        )

    def put(question: str) -> str:
        return template.replace("{question}", question)

    if not chat:
        gap = "" if template[-1].isspace() else " "
        shown = "".join(f"{put(shot.question)}{gap}{shot.answers[0]}\n\n" for shot in shots)
        return [shown + put(question) for question in questions]
    render: Any = tokenizer.apply_chat_template  # annotated with all that it may return
    turns = [
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", put(shot.question)), ("assistant", shot.answers[0]))
    ]
    return [
        render(
            [*turns, {"role": "user", "content": put(question)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for question in questions
    ]


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    add_special_tokens: bool = True,
    progress: bool = False,
) -> list[str]:
    """The first line that greedy decoding generates after each prompt, stripped."""
    ids = [_without_end(*encoded) for encoded in encode(tokenizer, prompts, add_special_tokens)]
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True):
        # With prompt learning, padding would stand between virtual tokens and prompt, and PEFT ignores position ids.
        other_length = batches and uses_prompt_learning(model) and len(ids[i]) != len(ids[batches[-1][0]])
        if not batches or len(batches[-1]) == batch_size or other_length:
            batches.append([])
        batches[-1].append(i)
    answers: dict[int, str] = {}
    with evaluation_mode(model):
        for batch in tqdm(batches, "Answering", leave=False, disable=None if progress else True):
            answers.update(zip(batch, _generate(model, tokenizer, [ids[i] for i in batch], max_new_tokens)))
    return [answers[i] for i in range(len(ids))]


def _without_end(ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """Drop the end-of-text token that some tokenizers append."""
    return ids[: max((position for position, (_, end) in enumerate(offsets) if end), default=len(ids) - 1) + 1]


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    device = device_of(model)
    width = len(max(prompts, key=len))
    padding = tokenizer.pad_token_id or 0
    input_ids = torch.tensor([[padding] * (width - len(ids)) + ids for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=own.eos_token_id,
        bos_token_id=own.bos_token_id,
        pad_token_id=padding,
    )
    with _generation_config(model, greedy):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=(torch.arange(width, device=device) >= width - lengths[:, None]).long(),
            stopping_criteria=StoppingCriteriaList([_FirstLine(tokenizer, width)]),
        )
    # Rows that end early are padded, possibly with an ordinary token.
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in output[:, width:].tolist()]
    return [_first_line(tokenizer, row) for row in rows]


@contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig) -> Generator[None]:
    """Temporarily replace the generation config: `generate` would fill unset options from the model's own."""
    having: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    own = {module: module.generation_config for module in having}
    try:
        for module in own:
            module.generation_config = config
        yield
    finally:
        for module, before in own.items():
            module.generation_config = before


class _FirstLine(StoppingCriteria):
    """Stop a row when its first line is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _first_line(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip().partition("\n")[0].strip()
