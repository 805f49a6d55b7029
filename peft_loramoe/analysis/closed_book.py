"""Closed-book questions: a model answers from memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..modes import evaluation_mode
from .adapted import device_of, uses_prompt_learning
from .answer_scores import encode, score_answers
from .questions import Question


TEMPLATE = "Question: {question}\nAnswer:"
CHAT_TEMPLATE = "{question}\nGive the answer only, in as few words as possible."


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Attributes:
        question: the question.
        expected: the first of its accepted answers.
        given: the first line that the model wrote.
        exact_match: whether that is, normalised, an accepted answer.
        f1: how far its words are those of an accepted answer, in [0, 1].
        loss: mean negative log likelihood per token of the expected answer, in nats.
    """

    question: str
    expected: str
    given: str
    exact_match: bool
    f1: float
    loss: float


@dataclass(frozen=True)
class ClosedBookResult:
    """The responses to n questions, in their order, and their means."""

    responses: list[Response]

    @property
    def exact_match(self) -> float:
        """Share of the questions that were answered right, in [0, 1]."""
        return sum(response.exact_match for response in self.responses) / len(self.responses)

    @property
    def f1(self) -> float:
        """Mean over the questions, in [0, 1]."""
        return sum(response.f1 for response in self.responses) / len(self.responses)

    @property
    def loss(self) -> float:
        """Mean over the questions, in nats per token."""
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
    show: bool = False,
) -> ClosedBookResult:
    """Let a model answer questions by greedy decoding, and score what it answers.

    The prompt is the shots, each with its first accepted answer, and the question, as `build_prompts` describes. The model's
    answer is the first line that it writes. Of the model's own `generation_config`, the end and BOS tokens count and
    nothing else. The loss is that of the first accepted answer after the same prompt, from `score_answers`.

    The model runs in evaluation mode without gradients, and its modules are left in the modes they were in.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer, one that says which characters its tokens cover.
        questions: what is asked.
        shots: questions that the prompt shows with their answers; none of them may be asked.
        template: how a question is put, with `{question}` for its text; None for `TEMPLATE`, with `chat` for `CHAT_TEMPLATE`.
        chat: put questions and answers as turns of a conversation, by the tokenizer's chat template.
        max_new_tokens: the longest answer, in tokens.
        batch_size: questions at a time.
        show: show a progress bar on the standard error output, if that is a terminal.

    Returns:
        The responses, in the order of the questions.

    Raises:
        ValueError: no questions, a question that is also a shot, a number that is not positive, a template without
            `{question}` or with a space at its end, `chat` without a chat template, or what `score_answers` refuses.
    """
    if not questions:
        raise ValueError("questions is empty: there is nothing to ask.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    shown = {shot.question for shot in shots}
    if leaked := [question.question for question in questions if question.question in shown]:
        raise ValueError(f"A shot gives its answer away, so it cannot be asked: {leaked[0]!r} ({len(leaked)} in all).")
    prompts = build_prompts(tokenizer, [question.question for question in questions], shots, template, chat)
    special = not chat  # the chat template has put all that belong there
    # First what takes less time and refuses more.
    scores = score_answers(model, tokenizer, prompts, [question.answers[0] for question in questions], batch_size, special)
    given = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size, special, show)
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
    """The text before each answer.

    Without `chat`, the shots and the question follow each other with an empty line between them, and an answer follows its
    question after a space, or after the line break that the template ends with. With `chat`, they are the turns of a
    conversation, and the prompt ends where the model's turn begins; models that can think before they answer are told not to.

    Raises:
        ValueError: a template without `{question}` or with a space at its end, or `chat` without a chat template.
    """
    template = template if template is not None else (CHAT_TEMPLATE if chat else TEMPLATE)
    if "{question}" not in template:
        raise ValueError(f"template={template!r} must contain {{question}}.")
    if template.endswith(" "):  # it belongs to the answer's first token
        raise ValueError(f"template={template!r} must not end with a space: a space is put before the answer.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template, so questions cannot be put as a conversation; "
            "choose another tokenizer (--tokenizer), or leave out --chat."
        )

    def put(question: str) -> str:
        return template.replace("{question}", question)

    if not chat:
        gap = "" if template[-1].isspace() else " "
        shown = "".join(f"{put(shot.question)}{gap}{shot.answers[0]}\n\n" for shot in shots)
        return [shown + put(question) for question in questions]
    turns = [
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", put(shot.question)), ("assistant", shot.answers[0]))
    ]
    return [
        tokenizer.apply_chat_template(
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
    show: bool = False,
) -> list[str]:
    """The first line that greedy decoding gives after each prompt, without whitespace around it."""
    ids = [_without_end(*encoded) for encoded in encode(tokenizer, prompts, add_special_tokens)]
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True):
        # Padding would come between virtual tokens and prompt, and PEFT ignores the positions that tell it from tokens.
        unlike = batches and uses_prompt_learning(model) and len(ids[i]) != len(ids[batches[-1][0]])
        if not batches or len(batches[-1]) == batch_size or unlike:
            batches.append([])
        batches[-1].append(i)
    answers: dict[int, str] = {}
    console = Console(stderr=True)
    hidden = not (show and console.is_terminal)  # elsewhere nothing but an empty line would come of it
    with evaluation_mode(model):
        for batch in track(batches, "answering", console=console, transient=True, disable=hidden):
            answers.update(zip(batch, _generate(model, tokenizer, [ids[i] for i in batch], max_new_tokens)))
    return [answers[i] for i in range(len(ids))]


def _without_end(ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """The tokens of a prompt up to its last character: some tokenizers put an end-of-text token after it."""
    return ids[: max((position for position, (_, end) in enumerate(offsets) if end), default=len(ids) - 1) + 1]


def _generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
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
    # A row that ended before the others is filled up with padding, which may be any token.
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in output[:, width:].tolist()]
    return [_first_line(tokenizer, row) for row in rows]


@contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Another generation config for a while; `generate` fills in from the model's own what a given one leaves open."""
    own = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    try:
        for module in own:
            module.generation_config = config
        yield
    finally:
        for module, before in own.items():
            module.generation_config = before


class _FirstLine(StoppingCriteria):
    """Ends a row when its first line is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _first_line(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip().partition("\n")[0].strip()
