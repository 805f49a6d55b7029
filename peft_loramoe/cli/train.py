"""The arguments of `train`, and the configurations that are made of them.

torch, PEFT and TRL are imported when a configuration is made, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..fields import PRESETS, ConfigFields
from .options import DTYPES, Parser, add_gguf, json_value, positive, positive_number, steps


if TYPE_CHECKING:
    from trl import SFTConfig

    from ..config import LoRAMoEConfig


DETAILS = """\
Fine-tune a causal language model with LoRAMoE, so that it learns the tasks in your data and keeps what it knew.

The data are JSON records, in a list or one a line, in any of these formats, also mixed:

  {"messages": [{"role": "user", "content": "Capital of France?"},
                {"role": "assistant", "content": "Paris"}]}
  {"instruction": "What is the capital?", "input": "France", "output": "Paris"}
  {"prompt": "The capital of France is", "completion": " Paris."}
  {"text": "Paris is the capital of France."}

Messages and instructions go through the tokenizer's chat template; prompts and texts are used as they are. Only
answers are learned: all of a conversation's where the chat template marks them ({% generation %}) or TRL knows a
version of it that does, else the last.

--anchors names a file of texts that stand for what the model knows, which `peft-loramoe anchors` samples from the
model. They are of task type 0, your records of type 1. With a column task_type, an index, a name of
--task-type-names or -1 for unknown, the records say it themselves."""
EXAMPLES = """\
examples:
  peft-loramoe train --model Qwen/Qwen3-0.6B --train-file data.jsonl \\
      --anchors anchors.jsonl -o adapter
  peft-loramoe train --model Qwen/Qwen3-8B --train-file data.jsonl \\
      --anchors anchors.jsonl --load-in-4bit --packing
  peft-loramoe train --config train.yaml --learning-rate 5e-4
  accelerate launch -m peft_loramoe train --config train.yaml

In the file of --config, flags are keys: `learning-rate: 1e-3`, `train-file: [a.jsonl, b.jsonl]`, `packing: true`."""

# flag -> (field of SFTConfig, type, default, help)
TRAINING_OPTIONS = {
    "epochs": ("num_train_epochs", positive_number, 3.0, "passes over the training data"),
    "max-steps": ("max_steps", steps, -1, "optimizer steps, in place of --epochs; -1 for none"),
    "batch-size": ("per_device_train_batch_size", positive, 8, "samples (with --packing, rows) per device and step"),
    "gradient-accumulation-steps": ("gradient_accumulation_steps", positive, 4, "batches per optimizer step"),
    "learning-rate": (
        "learning_rate",
        positive_number,
        2e-4,
        "peak learning rate of the experts; it decays along a cosine",
    ),
    "warmup-steps": ("warmup_steps", int, 10, "steps in which the learning rate rises"),
    "weight-decay": ("weight_decay", float, 0.0, "AdamW's weight decay"),
    "max-length": (
        "max_length",
        positive,
        1024,
        "tokens of a sample; the rest is cut off. With --packing, tokens of a row",
    ),
    "packing": (
        "packing",
        bool,
        False,
        "put several samples into a row in place of padding; they do not see each other",
    ),
    "bf16": ("bf16", bool, None, "load the model in bfloat16 and train under bfloat16 autocast"),
    "gradient-checkpointing": ("gradient_checkpointing", bool, True, "recompute activations in the backward pass"),
    "logging-steps": ("logging_steps", float, 10, "steps between two log entries; below 1, a share of all steps"),
    "save-steps": ("save_steps", float, 500, "the same for checkpoints, of which the last two are kept; 0 for none"),
    "eval-steps": ("eval_steps", float, 500, "the same for the loss on the evaluation data; 0 for the end only"),
    "report-to": ("report_to", str, "none", "tensorboard, wandb or another of transformers' integrations"),
    "seed": ("seed", int, 0, "seed of the adapter, the order of the data and dropout"),
}
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
# Options of LoRAMoEConfig that most runs are about.
MAIN_OPTIONS = (
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "num_experts",
        "expert_groups",
        "null_groups",
        "task_type_names",
        "target_modules",
    ),
    *("balance_loss_weight", "balance_delta", "router_lr_multiplier"),
)

# --- arguments


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command to its parser."""
    parser.description, parser.epilog = DETAILS, EXAMPLES
    parser.usage = "%(prog)s --model MODEL (--train-file FILE ... | --dataset ID)\n           [options]"
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with values of the options; flags override them"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="Hub id or folder of a causal language model")
    model.add_argument(
        "--load-in-4bit",
        action=switch,
        default=False,
        help="quantise it to NF4 with bitsandbytes (QLoRA) (default: off)",
    )
    model.add_argument("--dtype", choices=DTYPES, help="of its weights (default: bfloat16 with --bf16, else float32)")
    model.add_argument("--device", choices=("cpu",), help="train on the CPU even if there is a GPU")
    add_gguf(model)
    model.add_argument("--attention", metavar="NAME", help="its attn_implementation, e.g. flash_attention_2")
    model.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template, in place of the tokenizer's own"
    )
    model.add_argument(
        *("-o", "--output-dir"),
        type=Path,
        default=Path("loramoe-adapter"),
        metavar="FOLDER",
        help="for the adapter, the checkpoints and the logs (default: %(default)s)",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--train-file", type=Path, nargs="+", metavar="FILE", help="JSON or JSON lines")
    data.add_argument("--dataset", metavar="ID", help="Hub id or folder of a data set with these columns, instead")
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of --dataset, if it has several")
    data.add_argument("--train-split", metavar="NAME", help="split of --dataset to train on (default: train)")
    data.add_argument(
        "--eval-file", type=Path, nargs="+", metavar="FILE", help="each file's loss is reported by its name"
    )
    data.add_argument("--eval-split", metavar="NAME", help="split of --dataset to evaluate on")
    data.add_argument(
        "--answer-only", action=switch, default=True, help="learn the answers only, not the prompts (default: on)"
    )

    anchors = parser.add_argument_group("what the model is to keep")
    anchors.add_argument(
        "--anchors", type=Path, metavar="FILE", help="anchors, JSON lines; a tenth is held back to measure on"
    )
    anchors.add_argument(
        "--anchor-loss-weight",
        type=float,
        metavar="N",
        help="weight of the language-modelling loss on anchors (default: 0)",
    )
    anchors.add_argument(
        "--anchor-kl-weight",
        type=float,
        metavar="N",
        help="weight of the divergence from the base model on anchors (default: 0.3)",
    )
    anchors.add_argument(
        "--anchors-per-batch",
        type=positive,
        metavar="N",
        help="anchors of each batch (default: a tenth of its samples)",
    )
    anchors.add_argument(
        "--anchors-every",
        type=positive,
        metavar="N",
        help="draw anchors for every n-th batch only (default: 1)",
    )

    training = parser.add_argument_group("training")
    for flag, (_, kind, default, text) in TRAINING_OPTIONS.items():
        parse = {"action": switch} if kind is bool else {"type": kind, "metavar": "N" if kind is not str else "NAME"}
        shown = "not on CPUs, many of which are slow in it" if default is None else _shown(default)
        training.add_argument(f"--{flag}", default=default, help=f"{text} (default: {shown})", **parse)
    training.add_argument(
        "--loraplus-lr-ratio",
        type=positive_number,
        metavar="N",
        help="B learns this many times faster than A (LoRA+)",
    )
    training.add_argument(
        "--resume", action="store_true", help="continue from the last complete checkpoint in --output-dir"
    )
    training.add_argument(
        "--trainer-args",
        type=json_value,
        metavar="JSON",
        default={},
        help="""any other options of trl.SFTConfig, e.g. '{"optim": "paged_adamw_8bit"}'; they overrule those above""",
    )
    _add_config_options(
        parser.add_argument_group("LoRAMoE", "The preset and what to change of it."),
        parser.add_argument_group("more of LoRAMoE"),
    )


def _add_config_options(main: argparse._ArgumentGroup, more: argparse._ArgumentGroup) -> None:
    """A flag for every option of `LoRAMoEConfig`, with its type and help."""
    main.add_argument(
        "--preset",
        choices=(*PRESETS, "plain"),
        default="retain",
        help="retain: null experts leave what the model knows to the base model; paper: the published method; "
        "plain: the defaults of LoRAMoEConfig (default: retain)",
    )
    hints, defaults = typing.get_type_hints(ConfigFields), ConfigFields()
    for field in config_fields():
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            alternatives = [k for k in typing.get_args(kind) if k is not types.NoneType]
            kind = alternatives[0] if len(alternatives) == 1 else None
        if kind is bool:
            parse = {"action": argparse.BooleanOptionalAction}
        elif kind in (int, float, str):
            parse = {"type": kind, "metavar": "NAME" if kind is str else "N"}
        else:
            parse = {"type": json_value, "metavar": "JSON"}
        default = getattr(defaults, field.name)
        show = json.dumps if parse.get("type") is json_value else _shown
        ours, papers = (show(PRESETS[preset].get(field.name, default)) for preset in ("retain", "paper"))
        text = field.metadata["help"].rstrip(".").replace("LoRAMoEConfig.retain", "--preset retain")
        text = re.sub(r"(?<![\w=])(None|True|False)\b", lambda word: JSON_WORDS[word[0]], text)
        text = f"{text[0].lower()}{text[1:]} (default: {ours if ours == papers else f'{ours}; paper: {papers}'})"
        group = main if field.name in MAIN_OPTIONS else more
        flag = f"--{field.name.replace('_', '-')}"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **parse)


def _shown(value: Any) -> Any:
    """A default of a switch, a number or a name as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value)


def config_fields() -> list[dataclasses.Field]:
    """The options that `LoRAMoEConfig` adds to PEFT's, without the version that it fills in itself.

    The main ones first.
    """
    fields = {field.name: field for field in dataclasses.fields(ConfigFields)}
    del fields["peft_loramoe_version"]
    return [fields.pop(name) for name in MAIN_OPTIONS] + list(fields.values())


# --- what they ask for


def adapter_config(options: Namespace) -> LoRAMoEConfig:
    """The preset with what the flags change of it."""
    from ..config import LoRAMoEConfig

    given = {field.name: getattr(options, field.name) for field in config_fields() if hasattr(options, field.name)}
    make = LoRAMoEConfig if options.preset == "plain" else getattr(LoRAMoEConfig, options.preset)
    try:
        return make(task_type="CAUSAL_LM", **given)
    except ValueError as error:
        message = str(error).replace("LoRAMoEConfig(...)", "--preset plain")
        raise ValueError(
            message.replace(f"LoRAMoEConfig.{options.preset}(", f"--preset {options.preset} (")
        ) from error


def on_cpu(options: Namespace) -> bool:
    """Whether there is no accelerator, or it is not to be used."""
    import torch

    accelerator = getattr(torch, "accelerator", torch.cuda)  # torch 2.5 has none
    return options.device == "cpu" or not accelerator.is_available()


def in_bfloat16(options: Namespace) -> bool:
    """Whether the model is loaded and trained in bfloat16."""
    return options.bf16 if options.bf16 is not None else not on_cpu(options)


def training_config(options: Namespace, **more: Any) -> SFTConfig:
    """SFTConfig of the flags; `more` is what the data call for."""
    import torch
    from trl import SFTConfig

    cpu = on_cpu(options)
    chosen = {name: getattr(options, flag.replace("-", "_")) for flag, (name, *_) in TRAINING_OPTIONS.items()}
    chosen["bf16"] = in_bfloat16(options)
    fixed = {
        "output_dir": str(options.output_dir),
        "per_device_eval_batch_size": options.batch_size,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps" if options.save_steps else "no",
        "save_total_limit": 2,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # reentrant gives the balance term no gradient
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu and torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every parameter of an adapter is used in every step
    }
    known = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    try:
        config = SFTConfig(**{**chosen, **fixed, **more, **_checked(options.trainer_args, known)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"SFTConfig refuses the training options: {error}") from error
    _check_integrations(config.report_to)
    return config


def _check_integrations(names: str | list[str]) -> None:
    """The trainer looks them up when the model has been loaded."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = [*get_available_reporting_integrations(), "flyte"]  # transformers does not look for Flyte's package
    for name in [names] if isinstance(names, str) else names:
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
            raise ValueError(f"--report-to {name}: transformers has no such integration; choose from {choices}.")
        if name not in installed:
            raise ValueError(
                f"--report-to {name}: its package is not installed here; install it (pip install {name})."
            )


def _checked(trainer_args: Any, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(trainer_args, dict):
        raise ValueError(
            f'--trainer-args {trainer_args!r} is not a JSON object; write it like \'{{"optim": "adafactor"}}\'.'
        )
    for name in trainer_args:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{similar[0]}'?" if similar else "the documentation of trl.SFTConfig lists them."
            raise ValueError(f"--trainer-args: SFTConfig has no option '{name}'; {fix}")
    return trainer_args
