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
LoRAMoE adapters (mixtures of LoRA experts) for Hugging Face PEFT: train them, look into them, measure what
their routers do, convert them from and to other formats, change their experts, and run other programs with them. An
ADAPTER is a folder with adapter_config.json, or the id of such a repository on the Hugging Face Hub."""
RUN = """\
Run another Python program in a process that knows LoRAMoE, so that its PeftModel.from_pretrained loads LoRAMoE adapters.
COMMAND is the name of an installed program, a script's path, or -m MODULE. Python processes that it starts know LoRAMoE
too, unless they are started with -S, -E or -I or without the environment variable PYTHONPATH."""
RUN_EXAMPLES = """\
examples:
  peft-loramoe run -- lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag
  peft-loramoe run -- accelerate launch train.py
  peft-loramoe run -- -m my_package.evaluate --adapter ADAPTER"""


def build_parser() -> Parser:
    """The parser of all commands but `run`, which has only its help here."""
    parser = Parser(PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    add = parser.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser
    command, options = command_adder(add), [output_option(), model_options(), text_options("--calibration"), json_option()]
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
        help="run another Python program (lm_eval, trl, a script) in a process that knows LoRAMoE",
        usage=f"{PROGRAM} run -- COMMAND ...",
        description=RUN,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=lambda options: run.error("must be the first argument, and a program must follow it"))
    return parser


def _add_files(command: Command, output: Parser, as_json: Parser) -> None:
    """Commands that need nothing but adapters' files."""
    inspect = command(
        "inspect",
        commands.inspect,
        "show an adapter's configuration, size and experts: how large they are and how alike",
        "The norm of an expert is the Frobenius norm of its matrix B A times the adapter's scaling; the similarity of two "
        "experts is the cosine between their matrices. Only the adapter's files are read.",
        as_json,
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")

    convert = command(
        "convert",
        commands.convert,
        "convert an adapter of the LoRAMoE authors' code or of MoE-PEFT, or one of this package to the authors' format",
        "The layout of SOURCE is recognised by its files. No value of a tensor is changed.",
        output,
    )
    convert.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    convert.add_argument("--to", choices=("loramoe", "authors"), default="loramoe", help="the format to write")

    upcycle = command(
        "upcycle",
        commands.upcycle,
        "make a LoRAMoE adapter whose experts are plain LoRA adapters",
        "Several LoRAs become one expert each, and the mixture starts as their mean. One LoRA, with --num-experts, becomes "
        "several experts, and the mixture starts as that LoRA.",
        output,
    )
    upcycle.add_argument("sources", metavar="LORA", nargs="+", help="folders or Hub ids of plain LoRA adapters")
    upcycle.add_argument("--num-experts", type=int, metavar="N", help="for one LoRA: the number of experts")
    upcycle.add_argument(
        "--method",
        choices=("replicate", "split"),
        default="replicate",
        help="for one LoRA: give every expert a copy, or a block of its rank channels (default: replicate)",
    )
    upcycle.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of LoRAMoEConfig that the LoRAs do not decide, for example expert_groups=[3,3] or "
        "freeze_experts=true; may be repeated",
    )


def _add_export(command: Command, options: list[Parser]) -> None:
    export = command(
        "export-lora",
        commands.export_lora,
        "fix the gates of a mixture and save it as a plain LoRA, with the error of that measured",
        "A plain LoRA cannot decide for each token, as the mixture's router does: so this is an approximation. How far it is "
        "from the mixture is measured on --calibration data, printed, and written to the folder.",
        *options,
    )
    export.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    export.add_argument(
        "--gates",
        choices=("uniform", "mean", "groups", "experts"),
        default="uniform",
        help="the fixed gates: all equal; their mean over the calibration data; or --weights of the groups or of the experts "
        "(default: uniform)",
    )
    export.add_argument("--weights", type=float, nargs="+", metavar="W", help="for --gates groups or experts")
    export.add_argument("--task-type", type=name_or_index, metavar="TYPE", help="for --gates mean: of this type's samples only")
    export.add_argument(
        "--rank",
        type=rank,
        metavar="R",
        help="truncate to this rank; a number like 0.9 is the share of the squared singular values to keep (default: exact)",
    )
    export.add_argument(
        "--max-kl-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="warn if the KL divergence is more than this share of the adapter's whole effect (default: 0.1)",
    )
    export.add_argument(
        "--no-each-layer", dest="each_layer", action="store_false", help="do not measure layer by layer: faster"
    )


def _add_surgery(operation: Command, output: Parser, model: Parser, data: Parser, as_json: Parser) -> None:
    listing = operation("list", commands.list_experts, "list the experts, with --calibration data their load", "The load of an "
                        "expert is its mean router probability over the tokens.", model, data, as_json)  # fmt: skip
    adding = operation(
        "add",
        commands.add_experts,
        "add experts that contribute nothing yet",
        "New router outputs take weight from the old ones. An addition can leave the outputs as they are only if the number of "
        "router outputs becomes a multiple of what it was (--start exact); any other number changes them, and by how much is "
        "measured (--start nearest).",
        output,
        model,
        data,
        as_json,
    )
    adding.add_argument("--count", type=int, metavar="N", help="number of new experts (default: as many as there are)")
    adding.add_argument("--group", type=int, metavar="G", help="index of the group that they join (default: a new group)")
    adding.add_argument("--name", help="the new group's task type, where the groups have names")
    adding.add_argument("--start", choices=("exact", "nearest"), default="exact", help="see above (default: exact)")
    adding.add_argument(
        "--fill-with-null", action="store_true", help="for --start exact: make the number a multiple with null experts"
    )
    removing = operation("remove", commands.remove_experts, "remove experts; the gates of the others are renormalised", "",
                         output, model, data, as_json)  # fmt: skip
    removing.add_argument("--experts", type=int, nargs="+", required=True, metavar="I", help="indices, as `list` gives them")
    reordering = operation("reorder", commands.reorder_experts, "number the experts anew; outputs do not change", "",
                           output, model, as_json)  # fmt: skip
    reordering.add_argument(
        "--order",
        type=int,
        nargs="+",
        required=True,
        metavar="I",
        help="the old index of each new expert; groups stay together",
    )
    merging = operation(
        "merge", commands.merge_experts, "merge two experts of a group into one", "", output, model, data, as_json
    )
    merging.add_argument(
        "--experts", type=int, nargs=2, required=True, metavar="I", help="the two; the first one's place is kept"
    )
    for parser_of_operation in (listing, adding, removing, reordering, merging):
        parser_of_operation.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
