"""Command `evaluate`: closed-book questions and lm-eval tasks, with and without adapters."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..analysis import ClosedBookResult, Question, answer_questions, compare_results, read_questions
from ..hub import check_source
from ..writing import write_whole
from . import tables
from .base_model import BaseModel, same_model
from .options import check_output


# Option -> its default and the option that it requires.
DEPENDENT = {
    "shots": (5, "questions"),
    "shots_file": (None, "questions"),
    "template": (None, "questions"),
    "max_new_tokens": (32, "questions"),
    "include_path": (None, "lm_eval"),
}
LmEval = Callable[[nn.Module, PreTrainedTokenizerBase], dict[str, Any]]


@dataclass(frozen=True)
class QuestionSet:
    """The questions to ask from a source, and the examples in their prompt."""

    source: str
    shots: list[Question]
    questions: list[Question]


def evaluate(options: Namespace) -> None:
    """Evaluate a model with and without adapters, print tables or JSON, and write JSON."""
    _check_options(options)
    check_output(options.output)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, revision = _base_model(options.model, options.adapter)
    base = BaseModel.of(options, name, revision=revision)
    sets = [_question_set(source, options) for source in options.questions]
    lm_eval = _lm_eval(options) if options.lm_eval else None
    tokenizer = (
        BaseModel.of(options, options.tokenizer, flag="--tokenizer", gguf_file=None).tokenizer()
        if options.tokenizer
        else base.tokenizer()
    )
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(options),
        "options": {**_recorded(options), "model": name, "revision": revision},
    }
    answered: list[list[ClosedBookResult]] = []
    measured: list[dict[str, Any]] = []
    for adapter in (None, *options.adapter):
        # Reloaded for each adapter, since some methods change the weights of the base model.
        model = base.load()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        answered.append([_ask(model, tokenizer, asked, options) for asked in sets])
        if lm_eval is not None:
            measured.append(lm_eval(model, tokenizer))
        del model  # free its memory
        gc.collect()
        torch.cuda.empty_cache()
        report = {
            **described,
            "closed_book": [_records(asked, options.adapter, results) for asked, results in zip(sets, zip(*answered))],
            "lm_eval": [
                {"adapter": adapter, **results} for adapter, results in zip((None, *options.adapter), measured)
            ],
        }
        text = json.dumps(report, indent=1, allow_nan=False)
        if options.output is not None:  # already now: the next model may fail
            write_whole(options.output, text + "\n")
    if options.json:
        print(text)
    else:
        tables.show_evaluation(report)
        if options.output is not None:
            print(f"Wrote {options.output}.")


def _check_options(options: Namespace) -> None:
    """Refuse options without effect and set the defaults of the others."""
    if not options.questions and not options.lm_eval:
        raise ValueError("There is nothing to evaluate: pass --questions or --lm-eval tasks.")
    for name, (default, needed) in DEPENDENT.items():
        value = getattr(options, name)
        if value is not None and not getattr(options, needed):
            raise ValueError(f"{_flag(name)} {value} has no effect without {_flag(needed)}.")
        if value is None and getattr(options, needed):
            setattr(options, name, default)
    if options.shots_file and options.shots == 0:
        raise ValueError(f"--shots-file {options.shots_file} has no effect with --shots 0; drop one of them.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _base_model(model: str | None, adapters: list[str]) -> tuple[str, str]:
    """The base model and its revision, from the option or the adapters' configurations."""
    named = set()
    for adapter in adapters:
        check_source(adapter, "adapter_config.json", what=f"--adapter {adapter}")
        config = PeftConfig.from_pretrained(adapter)
        if config.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(
                f"'{adapter}' has task_type={config.task_type!r}; only causal language models answer questions."
            )
        base = config.base_model_name_or_path
        if base:
            named.add((base, config.revision or "main"))
        if model and base and not same_model(base, model):
            warnings.warn(f"'{adapter}' names '{base}' as its base model; it is evaluated on '{model}'.")
    if model is None:
        bases = sorted({base for base, _ in named})
        if len(bases) != 1:
            found = "the adapters name " + " and ".join(map(repr, bases)) if bases else "no adapter names one"
            raise ValueError(f"Name the base model with --model: {found}.")
        model = bases[0]
    revisions = sorted({revision for base, revision in named if same_model(base, model)}) or ["main"]
    if len(revisions) > 1:
        raise ValueError(
            f"The adapters name the revisions {' and '.join(map(repr, revisions))} of '{model}'; evaluate those of "
            "each revision in a run of their own."
        )
    return model, revisions[0]


def _question_set(source: str, options: Namespace) -> QuestionSet:
    questions = read_questions(source)
    examples = read_questions(options.shots_file) if options.shots_file else questions
    if len(examples) < options.shots:
        raise ValueError(
            f"--shots {options.shots}: {options.shots_file or source} has {len(examples)} questions only."
        )
    shots = examples[: options.shots]
    shown = {shot.question for shot in shots}
    asked = [question for question in questions if question.question not in shown]
    if not asked:
        raise ValueError(
            f"{source}: all questions are among the {options.shots} examples; lower --shots, or use --shots-file."
        )
    return QuestionSet(source, shots, asked[: options.limit])


def _ask(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: QuestionSet, options: Namespace
) -> ClosedBookResult:
    return answer_questions(
        model,
        tokenizer,
        asked.questions,
        asked.shots,
        template=options.template,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=not options.json,
    )


def _lm_eval(options: Namespace) -> LmEval:
    """A function that runs the tasks, whose names are checked first."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('--lm-eval needs lm-eval: pip install "lm-eval[hf]"') from error
    if options.include_path is not None and not options.include_path.is_dir():
        raise NotADirectoryError(f"--include-path {options.include_path} is not a folder.")
    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    if unknown := [task for task in options.lm_eval if task not in manager.all_tasks]:
        raise ValueError(f"--lm-eval: {unknown[0]} is not an lm-eval task (`lm-eval ls tasks` lists them).")

    def run(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        evaluated = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=options.lm_eval,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=manager,
            log_samples=False,
        )
        kept = {"results": evaluated["results"], "task_versions": evaluated["versions"], "shots": evaluated["n-shot"]}
        # Some metrics are NumPy scalars, and metrics of few samples may be NaN, which becomes null.
        return json.loads(json.dumps(kept, default=float), parse_constant=lambda _: None)

    return run


def _records(asked: QuestionSet, adapters: list[str], results: tuple[ClosedBookResult, ...]) -> dict[str, Any]:
    """A question set in the report: the answers of the base model, and of each adapter with its comparison."""
    models = []
    for adapter, result in zip((None, *adapters), results):
        compared = None if adapter is None else dataclasses.asdict(compare_results(results[0], result))
        models.append(
            {
                "adapter": adapter,
                **{name: getattr(result, name) for name in ("exact_match", "f1", "loss")},
                "comparison": compared,
                "responses": [dataclasses.asdict(response) for response in result.responses],
            }
        )
    return {
        "questions": asked.source,
        "count": len(asked.questions),
        "shots": [dataclasses.asdict(shot) for shot in asked.shots],
        "models": models,
    }


def _versions(options: Namespace) -> dict[str, str]:
    packages = ["peft_loramoe", "peft", "transformers", "torch"]
    packages += ["bitsandbytes"] * options.load_in_4bit + ["lm_eval"] * bool(options.lm_eval)
    return {package: version(package) for package in packages}


def _recorded(options: Namespace) -> dict[str, Any]:
    """The options as JSON values."""
    kept = {
        name: value
        for name, value in vars(options).items()
        if name not in ("command", "parser", "traceback", "json", "output")
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
