"""The arguments of the command line. Nothing here imports torch, so that help and errors come at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..version import __version__
from .environment import env
from .options import (
    Command,
    Parser,
    add_loading,
    command_adder,
    json_option,
    layers_option,
    model_options,
    name_or_index,
    output_option,
    positive,
    rank,
    text_options,
)
from .train import add_arguments as add_train_arguments


PROGRAM = "peft-loramoe"
DESCRIPTION = """\
Train, inspect, analyze, convert and edit LoRAMoE adapters (mixtures of LoRA experts) for Hugging Face PEFT, and run
other programs with them. An ADAPTER is a folder with adapter_config.json, or the id of such a repository on the
Hugging Face Hub."""
ANCHORS = """\
Anchors stand for what the model knows, so that nothing has to be labelled or replayed: give the file to
`peft-loramoe train` or to LoRAMoETrainerMixin. The model writes prose and, if its tokenizer has a chat template, as
many chats. A run that was interrupted goes on with the same command. With --texts or --dataset, anchors are the
beginnings of texts of your own."""
LABEL = """\
A record is of type 0 (known) if greedy decoding would give its answer, token for token, or if the mean loss per
token of the answer is at most --max-loss; otherwise of type 1 (new). Look at the records at the border before you
train with the types."""
EVALUATE = """\
The base model, alone and with each adapter, answers every question after the same prompt, so that lost and gained
answers can be counted. Adapters may be of any PEFT method."""
RUN = """\
Run another Python program with LoRAMoE registered, so that its PeftModel.from_pretrained loads LoRAMoE adapters.
COMMAND is the name of an installed program, the path of a script, or -m MODULE. LoRAMoE is also registered in
Python processes that the program starts, unless they use -S, -E or -I or drop the environment variable PYTHONPATH."""
RUN_EXAMPLES = """\
examples:
  peft-loramoe run -- lm_eval --model hf \\
      --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag
  peft-loramoe run -- accelerate launch train.py
  peft-loramoe run -- -m my_package.evaluate --adapter ADAPTER"""


def build_parser() -> Parser:
    """The parser of all commands; `run` has only its help here."""
    parser = Parser(PROGRAM, description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    add = parser.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser
    command = command_adder(add)
    output, model, as_json, layers = output_option(), model_options(), json_option(), layers_option()
    calibration = text_options("--calibration")
    _add_anchors(command)
    add_train_arguments(command("train", "commands:train", "fine-tune a model with LoRAMoE on your own data", ""))
    _add_label(command)
    _add_evaluate(command, as_json)
    _add_analysis(add, model, as_json)
    _add_files(command, output, as_json, layers)
    _add_export(command, [output, model, calibration, as_json, layers])
    surgery = add("surgery", help="list, add, remove, reorder or merge the experts of a saved adapter")
    operations = surgery.add_subparsers(title="operations", metavar="OPERATION", required=True)
    _add_surgery(command_adder(operations.add_parser), output, calibration, [model, as_json, layers])
    run = add(
        "run",
        help="run another Python program (lm_eval, trl, a script) with LoRAMoE registered",
        usage=f"{PROGRAM} run -- COMMAND ...",
        description=RUN,
        epilog=RUN_EXAMPLES,
    )
    command("env", env, "print versions of packages, platform and device, to paste into an issue", "")
    run.set_defaults(command=lambda options: run.error("must be the first argument, and a program must follow it"))
    return parser


def _add_anchors(command: Command) -> None:
    parser = command(
        "anchors", "anchors:anchors", "sample short texts from a base model, which stand for what it knows", ANCHORS
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="base model, folder or Hub id")
    parser.add_argument("--number", type=positive, default=400, metavar="N", help="how many anchors (default: 400)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file; anchors that it holds already count",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help='take texts from here: .jsonl of {"text": "..."}, or .txt, one a line',
    )
    source.add_argument(
        "--dataset", metavar="NAME", help="take texts from the column `text` of a Hub data set: NAME[:CONFIG[:SPLIT]]"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens of an anchor, without a template's (default: 32)",
    )
    parser.add_argument(
        "--chat", type=float, metavar="SHARE", help="share of chats (default: 0.5 with a chat template, else 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="texts at a time (default: 32)")
    add_loading(parser.add_argument_group("loading the model"))


def _add_label(command: Command) -> None:
    parser = command(
        "label", "label:label", "propose task types for mixed data: what the base model knows already is type 0", LABEL
    )
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="JSONL file of records with messages, with prompt and completion, or with instruction, input and output",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="base model, folder or Hub id")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="JSONL file to write; must not exist"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.5,
        metavar="NATS",
        help="answers up to this mean loss per token are known (default: 0.5, tokens of probability 0.6)",
    )
    parser.add_argument(
        "--examples",
        type=positive,
        default=3,
        metavar="N",
        help="records shown on each side of the border (default: 3)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="records at a time (default: 16)")
    add_loading(parser.add_argument_group("loading the model"))


def _add_evaluate(command: Command, as_json: Parser) -> None:
    parser = command(
        "evaluate",
        "evaluate:evaluate",
        "compare what a model knows with and without adapters",
        EVALUATE,
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
    add_loading(parser.add_argument_group("loading the model"))


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


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 0")
    return int(text)


def _add_analysis(add: Callable[..., Parser], model: Parser, as_json: Parser) -> None:
    command = command_adder(add)
    analyze = command(
        "analyze",
        "analysis:analyze",
        "measure how the routers of an adapter use its experts on a file of texts",
        "Prints the mean router weight of each expert group by task type, the entropy of the routers, dead and "
        "dominating experts, and the similarity of experts. `plot groups`, `plot load` and `plot entropy` plot the "
        "file from -o.",
        model,
        text_options("--data", required=True),
        as_json,
    )
    trace = command(
        "trace",
        "analysis:trace",
        "show the router weight of each expert group for each token of a text",
        "Prints the mean over all linears. `plot trace` plots every linear from the file from -o.",
        model,
        as_json,
    )
    trace.add_argument("--text", required=True, help="the text; special tokens are added unless it begins with BOS")
    for parser in (analyze, trace):
        parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
        parser.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="JSON file to write; replaced if it exists"
        )
    plot = add("plot", help="plot the results of `analyze` or `trace`, or compare models by learning and forgetting")
    _add_plots(command_adder(plot.add_subparsers(title="figures", metavar="KIND", required=True).add_parser))


def _add_plots(figure: Command) -> None:
    of_statistics = {
        "groups": "plot the weight of each expert group by layer and task type",
        "load": "plot the weight of each expert by layer and task type, and mark dead and dominating experts",
        "entropy": "plot the entropy of the routers by layer and task type",
    }
    for name, summary in of_statistics.items():
        parser = figure(name, f"analysis:plot_{name}", summary, "FILE was written by `analyze`.")
        parser.add_argument("--adapter", metavar="NAME", help="name of the adapter, if the statistics have several")
        _add_files_of_figure(parser)
    trace = figure(
        "trace",
        "analysis:plot_trace",
        "plot the weight of an expert group for each token",
        "FILE was written by `trace`.",
    )
    trace.add_argument("--group", type=name_or_index, default=0, help="index or name of the expert group (default: 0)")
    _add_files_of_figure(trace)
    frontier = figure(
        "frontier",
        "analysis:plot_frontier",
        "plot the downstream accuracy of models against the knowledge that they retain",
        'FILE is a JSON list with a record per model: {"label": "LoRA", "downstream": 81, "retention": 86.5}, in '
        "percent. "
        'It may also have "downstream_low", "downstream_high", "retention_low" and "retention_high" (error bars) and '
        '"series" '
        '(the models of a series are joined by a line), and "color" and "marker", matplotlib\'s names.',
    )
    _add_files_of_figure(frontier)


def _add_files_of_figure(parser: Parser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON file to read")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        required=True,
        metavar="FIGURE",
        help="file to write, .png, .svg or .pdf, replaced if it exists; may be repeated",
    )


def _add_files(command: Command, output: Parser, as_json: Parser, layers: Parser) -> None:
    """Commands that only need the files of adapters."""
    inspect = command(
        "inspect",
        "commands:inspect",
        "show the configuration and size of an adapter, and the norms and similarity of its experts",
        "The norm of an expert is the Frobenius norm of B A times the scaling; the similarity of two experts is the "
        "cosine of their matrices B A. The base model is not needed.",
        as_json,
        layers,
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")

    convert = command(
        "convert",
        "commands:convert",
        "convert an adapter of the LoRAMoE authors or of MoE-PEFT, or convert to the authors' layout",
        "The layout of SOURCE is detected from its files. The values of tensors do not change.",
        output,
    )
    convert.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    convert.add_argument("--to", choices=("loramoe", "authors"), default="loramoe", help="the layout to write")

    upcycle = command(
        "upcycle",
        "commands:upcycle",
        "turn plain LoRA adapters into the experts of a LoRAMoE adapter",
        "Several LoRAs become one expert each, and the mixture starts as their mean. A single LoRA with --num-experts "
        "becomes several experts, and the mixture starts as this LoRA.",
        output,
    )
    upcycle.add_argument("sources", metavar="LORA", nargs="+", help="folders or Hub ids of plain LoRA adapters")
    upcycle.add_argument("--num-experts", type=int, metavar="N", help="number of experts for a single LoRA")
    upcycle.add_argument(
        "--method",
        choices=("replicate", "split"),
        default="replicate",
        help="for a single LoRA: copy it to every expert, or split its rank channels (default: replicate)",
    )
    upcycle.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="set another option of LoRAMoEConfig, for example expert_groups=[3,3] or freeze_experts=true; repeatable",
    )


def _add_export(command: Command, options: list[Parser]) -> None:
    export = command(
        "export-lora",
        "commands:export_lora",
        "approximate a mixture by a plain LoRA with fixed gates, and measure the error",
        "The gates of a plain LoRA cannot depend on the token, as those of a mixture do. The error of this "
        "approximation is measured on --calibration data, printed, and saved in the folder.",
        *options,
    )
    export.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    export.add_argument(
        "--gates",
        choices=("uniform", "mean", "groups", "experts"),
        default="uniform",
        help="fixed gates: all equal, their mean over the calibration data, or --weights (default: uniform)",
    )
    export.add_argument("--weights", type=float, nargs="+", metavar="W", help="weights for --gates groups or experts")
    export.add_argument(
        "--task-type", type=name_or_index, metavar="TYPE", help="take --gates mean over the samples of this type"
    )
    export.add_argument(
        "--rank",
        type=rank,
        metavar="R",
        help="truncate to this rank, or keep this share (such as 0.9) of the squared singular values (default: exact)",
    )
    export.add_argument(
        "--max-kl-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="warn if the KL divergence exceeds this share of that without the adapter (default: 0.1)",
    )
    export.add_argument(
        "--no-each-layer",
        dest="each_layer",
        action="store_false",
        help="skip the measurement layer by layer, which is slower",
    )


def _add_surgery(operation: Command, output: Parser, data: Parser, shared: list[Parser]) -> None:
    listing = operation(
        "list",
        "commands:list_experts",
        "list the experts, and with --calibration data their load",
        "The load of an expert is its mean router probability over the tokens.",
        data,
        *shared,
    )
    adding = operation(
        "add",
        "commands:add_experts",
        "add experts that do not contribute yet",
        "New router outputs take weight from the old ones. The output is preserved only if the number of router "
        "outputs becomes a multiple of the old number (--start exact). Any other number changes it, and the error is "
        "measured (--start nearest).",
        output,
        data,
        *shared,
    )
    adding.add_argument("--count", type=int, metavar="N", help="number of new experts (default: as many as there are)")
    adding.add_argument(
        "--group", type=int, metavar="G", help="index of the group that they join (default: new group)"
    )
    adding.add_argument("--name", help="task type of the new group, if groups have names")
    adding.add_argument("--start", choices=("exact", "nearest"), default="exact", help="see above (default: exact)")
    adding.add_argument(
        "--fill-with-null", action="store_true", help="fill up to a multiple with null experts, for --start exact"
    )
    removing = operation("remove", "commands:remove_experts", "remove experts; the others' gates are renormalized", "",
                         output, data, *shared)  # fmt: skip
    removing.add_argument("--experts", type=int, nargs="+", required=True, metavar="I", help="indices from `list`")
    reordering = operation("reorder", "commands:reorder_experts", "reorder the experts; outputs do not change", "",
                           output, *shared)  # fmt: skip
    reordering.add_argument(
        "--order",
        type=int,
        nargs="+",
        required=True,
        metavar="I",
        help="old index of each new expert; groups must stay together",
    )
    merging = operation(
        "merge", "commands:merge_experts", "merge two experts of a group into one", "", output, data, *shared
    )
    merging.add_argument(
        "--experts",
        type=int,
        nargs=2,
        required=True,
        metavar="I",
        help="indices of two experts; the result takes the place of the first",
    )
    for parser_of_operation in (listing, adding, removing, reordering, merging):
        parser_of_operation.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
