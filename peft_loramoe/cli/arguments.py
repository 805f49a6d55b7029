"""The arguments of the command line."""

from __future__ import annotations

import argparse

from . import commands
from .analysis import add_analysis
from .anchors import add_anchors
from .evaluate import add_evaluate
from .label import add_label
from .options import (
    Command,
    Parser,
    command_adder,
    json_option,
    model_options,
    name_or_index,
    output_option,
    rank,
    text_options,
)
from .train import add_train


PROGRAM = "peft-loramoe"
DESCRIPTION = """\
Train, inspect, analyze, convert and edit LoRAMoE adapters (mixtures of LoRA experts) for Hugging Face PEFT, and run
other programs with them. An ADAPTER is a folder with adapter_config.json, or the id of such a repository on the
Hugging Face Hub."""
RUN = """\
Run another Python program with LoRAMoE registered, so that its PeftModel.from_pretrained loads LoRAMoE adapters.
COMMAND is the name of an installed program, the path of a script, or -m MODULE. LoRAMoE is also registered in
Python processes that the program starts, unless they use -S, -E or -I or drop the environment variable PYTHONPATH."""
RUN_EXAMPLES = """\
examples:
  peft-loramoe run -- lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag
  peft-loramoe run -- accelerate launch train.py
  peft-loramoe run -- -m my_package.evaluate --adapter ADAPTER"""


def build_parser() -> Parser:
    """The parser of all commands; `run` has only its help here."""
    parser = Parser(PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    add = parser.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser
    command, options = (
        command_adder(add),
        [output_option(), model_options(), text_options("--calibration"), json_option()],
    )
    add_train(command, commands.train)
    _add_files(command, options[0], options[3])
    _add_export(command, options)
    surgery = add("surgery", help="list, add, remove, reorder or merge the experts of a saved adapter")
    operations = surgery.add_subparsers(title="operations", metavar="OPERATION", required=True)
    _add_surgery(command_adder(operations.add_parser), *options)
    add_analysis(add)
    add_evaluate(command, options[3])
    add_anchors(command)
    add_label(command)
    run = add(
        "run",
        help="run another Python program (lm_eval, trl, a script) with LoRAMoE registered",
        usage=f"{PROGRAM} run -- COMMAND ...",
        description=RUN,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=lambda options: run.error("must be the first argument, and a program must follow it"))
    return parser


def _add_files(command: Command, output: Parser, as_json: Parser) -> None:
    """Commands that only need the files of adapters."""
    inspect = command(
        "inspect",
        commands.inspect,
        "show the configuration and size of an adapter, and the norms and similarity of its experts",
        "The norm of an expert is the Frobenius norm of B A times the scaling; the similarity of two experts is the "
        "cosine of "
        "their matrices B A. The base model is not needed.",
        as_json,
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")

    convert = command(
        "convert",
        commands.convert,
        "convert an adapter of the LoRAMoE authors or of MoE-PEFT, or convert to the authors' layout",
        "The layout of SOURCE is detected from its files. The values of tensors do not change.",
        output,
    )
    convert.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    convert.add_argument("--to", choices=("loramoe", "authors"), default="loramoe", help="the layout to write")

    upcycle = command(
        "upcycle",
        commands.upcycle,
        "turn plain LoRA adapters into the experts of a LoRAMoE adapter",
        "Several LoRAs become one expert each, and the mixture starts as their mean. A single LoRA with "
        "--num-experts becomes "
        "several experts, and the mixture starts as this LoRA.",
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
        commands.export_lora,
        "approximate a mixture by a plain LoRA with fixed gates, and measure the error",
        "The gates of a plain LoRA cannot depend on the token, as those of a mixture do. The error of this "
        "approximation is "
        "measured on --calibration data, printed, and saved in the folder.",
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


def _add_surgery(operation: Command, output: Parser, model: Parser, data: Parser, as_json: Parser) -> None:
    listing = operation(
        "list",
        commands.list_experts,
        "list the experts, and with --calibration data their load",
        "The load of an expert is its mean router probability over the tokens.",
        model,
        data,
        as_json,
    )
    adding = operation(
        "add",
        commands.add_experts,
        "add experts that do not contribute yet",
        "New router outputs take weight from the old ones. The output is preserved only if the number of router "
        "outputs "
        "becomes a multiple of the old number (--start exact). Any other number changes it, and the error is measured "
        "(--start nearest).",
        output,
        model,
        data,
        as_json,
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
    removing = operation("remove", commands.remove_experts, "remove experts; the others' gates are renormalized", "",
                         output, model, data, as_json)  # fmt: skip
    removing.add_argument("--experts", type=int, nargs="+", required=True, metavar="I", help="indices from `list`")
    reordering = operation("reorder", commands.reorder_experts, "reorder the experts; outputs do not change", "",
                           output, model, as_json)  # fmt: skip
    reordering.add_argument(
        "--order",
        type=int,
        nargs="+",
        required=True,
        metavar="I",
        help="old index of each new expert; groups must stay together",
    )
    merging = operation(
        "merge", commands.merge_experts, "merge two experts of a group into one", "", output, model, data, as_json
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
