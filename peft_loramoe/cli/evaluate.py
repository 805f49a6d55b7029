"""Command `evaluate`: closed-book questions and lm-eval tasks, with and without adapters."""

from __future__ import annotations

import argparse
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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from ..analysis import ClosedBookResult, Question, answer_questions, compare_results, read_questions
from ..writing import write_whole
from . import tables
from .options import Command, Parser, positive


DETAILS = """\
The base model, alone and with each adapter, answers every question after the same prompt, so that lost and gained
answers can be counted. Adapters may be of any PEFT method."""
# Option -> its default and the option that it requires.
DEPENDENT = {
    "shots": (5, "questions"),
    "shots_file": (None, "questions"),
    "template": (None, "questions"),
    "max_new_tokens": (32, "questions"),
    "include_path": (None, "lm_eval"),
}
LmEval = Callable[[nn.Module, PreTrainedTokenizerBase], dict[str, Any]]


def add_evaluate(command: Command, as_json: Parser) -> None:
    """Add the command to a parser."""
    parser = command(
        "evaluate",
        evaluate,
        "compare what a model knows with and without adapters",
        DETAILS,
        as_json,
    )
    parser.add_argument(
        "--model",
        "--base-model",
        metavar="MODEL",
        help="base model, folder or Hub id (default: from the adapters)",
    )
    parser.add_argument(
        "--adapter", nargs="+", default=[], metavar="ADAPTER", help="adapters to compare with the base model"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON file to write; replaced if it exists")
    _add_question_options(parser.add_argument_group("closed-book questions"))
    tasks = parser.add_argument_group("lm-eval")
    tasks.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="lm-eval tasks, for example arc_easy")
    tasks.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with additional lm-eval tasks")
    running = parser.add_argument_group("running the model")
    running.add_argument(
        "--limit", type=positive, metavar="N", help="only use the first N questions of each file and task"
    )
    running.add_argument("--tokenizer", metavar="TOKENIZER", help="folder or Hub id (default: the base model's)")
    running.add_argument(
        "--chat",
        action="store_true",
        help="format questions as a conversation with the chat template of the tokenizer",
    )
    running.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="questions per batch (default: 16)"
    )
    running.add_argument(
        "--load-in-4bit", action="store_true", help="quantize the base model to NF4 (needs bitsandbytes)"
    )
    running.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the base model (default: auto, as saved)",
    )
    running.add_argument("--device", help="device, for example cpu or cuda:1 (default: the GPU, if any)")


def _add_question_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--questions",
        nargs="+",
        default=[],
        metavar="FILE",
        help='.json or .jsonl files of {"question": "...", "answer": ...}, or the formats of TriviaQA and NQ-open, or '
        "hub:NAME[:CONFIG[:SPLIT]] for datasets of the Hub, for example hub:google-research-datasets/nq_open",
    )
    group.add_argument(
        "--shots",
        type=_count,
        metavar="K",
        help="use the first K questions as examples in the prompt instead of asking them (default: 5)",
    )
    group.add_argument("--shots-file", metavar="FILE", help="take the examples from this file")
    group.add_argument(
        "--template",
        type=lambda text: text.replace("\\n", "\n"),
        help=r"text of a question, with \n for a line break (default: 'Question: {question}\nAnswer:', with --chat "
        "the question and a sentence that asks for the answer only)",
    )
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum length of an answer, in tokens (default: 32)"
    )


@dataclass(frozen=True)
class QuestionSet:
    """The questions to ask from a source, and the examples in their prompt."""

    source: str
    shots: list[Question]
    questions: list[Question]


def evaluate(options: Namespace) -> None:
    """Evaluate a model with and without adapters, print tables or JSON, and write JSON."""
    _check_options(options)
    if options.output is not None:  # before hours of work
        _check_output(options.output)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base, revision = _base_model(options.model, options.adapter)
    sets = [_question_set(source, options) for source in options.questions]
    lm_eval = _lm_eval(options) if options.lm_eval else None
    tokenizer = AutoTokenizer.from_pretrained(
        options.tokenizer or base, revision="main" if options.tokenizer else revision
    )
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(options),
        "options": {**_recorded(options), "model": base, "revision": revision},
    }
    answered: list[list[ClosedBookResult]] = []
    measured: list[dict[str, Any]] = []
    for adapter in (None, *options.adapter):
        # Reloaded for each adapter, since some methods change the weights of the base model.
        model = _load(base, revision, adapter, options)
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


def _check_output(file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(f"The output file '{file}' cannot be written: it is a folder.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The output file '{file}' cannot be written: there is no folder '{file.parent}'.")


def _base_model(model: str | None, adapters: list[str]) -> tuple[str, str]:
    """The base model and its revision, from the option or the adapters' configurations."""
    named = set()
    for adapter in adapters:
        config = PeftConfig.from_pretrained(adapter)
        if config.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(
                f"'{adapter}' has task_type={config.task_type!r}; only causal language models answer questions."
            )
        base = config.base_model_name_or_path
        if base:
            named.add((base, config.revision or "main"))
        if model and base and not _same_model(base, model):
            warnings.warn(f"'{adapter}' names '{base}' as its base model; it is evaluated on '{model}'.")
    if model:
        return model, "main"
    if len(named) != 1:
        several = " and ".join(f"'{base}' ({revision})" for base, revision in sorted(named))
        found = f"the adapters name {several}" if named else "no adapter names one"
        raise ValueError(f"Name the base model with --model: {found}.")
    return named.pop()


def _same_model(first: str, second: str) -> bool:
    return first == second or (Path(first).is_dir() and Path(first).resolve() == Path(second).resolve())


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


def _load(base: str, revision: str, adapter: str | None, options: Namespace) -> nn.Module:
    quantization = None
    if options.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        revision=revision,
        dtype=options.dtype,
        device_map={"": options.device},
        quantization_config=quantization,
    )
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


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
        show=not options.json,
    )


def _lm_eval(options: Namespace) -> LmEval:
    """A function that runs the tasks, whose names are checked first."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("--lm-eval needs lm-eval: pip install lm_eval[hf]") from error
    if options.include_path is not None and not options.include_path.is_dir():
        raise NotADirectoryError(f"--include-path {options.include_path} is not a folder.")
    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    if unknown := [task for task in options.lm_eval if task not in manager.all_tasks]:
        raise ValueError(f"--lm-eval: {unknown[0]} is not an lm-eval task (lm_eval ls tasks lists them).")

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
        name: value for name, value in vars(options).items() if name not in ("command", "traceback", "json", "output")
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 0")
    return int(text)
