"""`peft-loramoe label`: task types for mixed data, proposed by what the base model answers already."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..analysis.answer_scores import AnswerScore, score_answers
from ..config import LoRAMoEConfig
from ..console import print_table
from ..reading import read_json_lines
from ..training.records import PLAIN_PROMPT, Record, check_records, refusals_of_template
from ..writing import write_whole
from .base_model import BaseModel
from .options import check_output


BINS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # nats per token


def label(options: argparse.Namespace) -> None:
    """Write the records with a column `task_type`, and show how their losses are distributed."""
    if options.output.exists():
        raise FileExistsError(f"The file '{options.output}' exists already. Remove it, or choose another one.")
    check_output(options.output)
    if not options.max_loss >= 0:
        raise ValueError(f"--max-loss {options.max_loss} must be zero or more.")
    records = _read(options.data)
    placed = [(f"{options.data}, record {i}", record) for i, record in enumerate(records, start=1)]
    checked = check_records(placed, str(options.data), LoRAMoEConfig())
    base = BaseModel.of(options, options.model)
    tokenizer = base.tokenizer()
    pairs = [_question(record, tokenizer) for record in checked]
    model = base.load()
    scores: dict[int, AnswerScore] = {}
    for rendered in (False, True):  # a chat template writes the special tokens itself
        rows = [
            i
            for i, r in enumerate(checked)
            if (not isinstance(r.prompt, str) and bool(tokenizer.chat_template)) is rendered
        ]
        prompts, answers = [pairs[i][0] for i in rows], [pairs[i][1] for i in rows]
        found = score_answers(model, tokenizer, prompts, answers, options.batch_size, not rendered, progress=True)
        scores.update(zip(rows, found))
    _write_and_show(records, checked, [scores[i] for i in range(len(records))], options)


def _write_and_show(
    records: list[dict[str, Any]], checked: list[Record], scores: list[AnswerScore], options: argparse.Namespace
) -> None:
    types = [0 if score.correct or score.loss <= options.max_loss else 1 for score in scores]
    lines = [json.dumps({**record, "task_type": kind}, ensure_ascii=False) for record, kind in zip(records, types)]
    write_whole(options.output, "".join(f"{line}\n" for line in lines))
    _show(checked, scores, types, options)


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    for place, record in read_json_lines(path):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: {record!r} is not a record.")
        if "task_type" in record:
            raise ValueError(f"{place}: has a task_type already; remove the column to have types proposed.")
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no record.")
    return records


def _question(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the model reads, and the answer."""
    if not record.prompt:
        raise ValueError(
            f"{record.place}: nothing is asked, so there is no answer to label; leave it out, or use it as an anchor."
        )
    if isinstance(record.prompt, str):
        return record.prompt, record.completion
    turns = [*record.prompt, *record.completion]
    if not tokenizer.chat_template:
        return PLAIN_PROMPT.format("\n".join(turn["content"] for turn in turns[:-1])), turns[-1]["content"]
    with refusals_of_template(record.place):
        asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    return asked, turns[-1]["content"]


def _show(records: list[Record], scores: list[AnswerScore], types: list[int], options: argparse.Namespace) -> None:
    known = types.count(0)
    right = sum(score.correct for score in scores)
    print(
        f"Wrote {options.output}: {known} of {len(types)} records are of type 0, {right} of them answered right, and "
        f"{len(types) - known} of type 1."
    )
    rows, lower = [], 0.0
    for upper in (*BINS, float("inf")):
        inside = [s for s in scores if lower <= s.loss < upper]
        bar = "#" * round(40 * len(inside) / len(scores))
        rows.append((f"up to {upper:g}", str(len(inside)), str(sum(s.correct for s in inside)), bar.ljust(40)))
        lower = upper
    print_table("Loss of the answers, nats per token", ("loss", "records", "answered right", ""), rows)
    unsure = sorted((i for i, s in enumerate(scores) if not s.correct), key=lambda i: scores[i].loss)
    below = [i for i in unsure if types[i] == 0][-options.examples :]
    above = [i for i in unsure if types[i] == 1][: options.examples]
    if below or above:
        print(f"At the border ({options.max_loss:g} nats per token):")
    for i in (*below, *above):
        asked, answered = (_last_words(text) for text in (records[i].prompt, records[i].completion))
        print(f"  type {types[i]}  {scores[i].loss:.2f}  {asked[-36:]!r} -> {answered[:24]!r}")


def _last_words(said: str | list[dict[str, str]]) -> str:
    """A text, or the last turn of a conversation, on one line."""
    return " ".join((said if isinstance(said, str) else said[-1]["content"]).split())
