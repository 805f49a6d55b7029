"""Supervised fine-tuning of a causal language model with LoRAMoE, on TRL's SFTTrainer.

    python examples/sft.py --model Qwen/Qwen3-0.6B --train-file train.jsonl --output-dir adapter

With a 4-bit model, or on several GPUs:

    python examples/sft.py --model Qwen/Qwen3-8B --train-file train.jsonl --load-in-4bit --packing
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py --model Qwen/Qwen3-8B ...

The data are JSON records (a list, or one record a line) in one of three formats. Each has a task type, which is an expert group
by index or by name (--task-type-names), or -1 for unknown. Type 0 is for questions about what the model knows already: with
--preset retain, the default, its group has no parameters.

    {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}], "task_type": 0}
    {"instruction": "What is the capital of France?", "input": "", "output": "Paris", "task_type": 0}
    {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 0}

Messages, and instructions too, go through the tokenizer's chat template; a prompt that is a string is used as it is. Only
answers are learned: all of a conversation's where the chat template marks them ({% generation %}) or TRL knows a version of it
that does, else the last. In the end --output-dir holds the adapter, the tokenizer and a model card that says how to load them.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from trl import SFTConfig, SFTTrainer, get_training_chat_template

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.card import loading_snippet
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback, last_complete_checkpoint, optimizer_groups


FORMATS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "instruction": ("instruction", "output")}
PLAIN_PROMPT = "### Instruction:\n{}\n\n### Response:\n"  # for tokenizers without a chat template
PRESETS = {"retain": LoRAMoEConfig.retain, "paper": LoRAMoEConfig.paper, "plain": LoRAMoEConfig}

# flag -> (field of SFTConfig, type, default, help)
TRAINING_OPTIONS = {
    "output-dir": ("output_dir", str, "loramoe-adapter", "For the adapter, the checkpoints and the logs."),
    "epochs": ("num_train_epochs", float, 3.0, "Passes over the training data."),
    "max-steps": ("max_steps", int, -1, "Optimizer steps, in place of --epochs; -1 for none."),
    "batch-size": ("per_device_train_batch_size", int, 8, "Samples (with --packing, rows) per device and step."),
    "gradient-accumulation-steps": ("gradient_accumulation_steps", int, 4, "Batches per optimizer step."),
    "learning-rate": ("learning_rate", float, 2e-4, "Peak learning rate; it decays along a cosine."),
    "warmup-steps": ("warmup_steps", int, 10, "Steps in which the learning rate rises."),
    "weight-decay": ("weight_decay", float, 0.0, "AdamW's weight decay."),
    "max-length": ("max_length", int, 1024, "Tokens of a sample; the rest is cut off. With --packing, tokens of a row."),
    "packing": ("packing", bool, False, "Put several samples into a row in place of padding; they do not see each other."),
    "answer-only": ("completion_only_loss", bool, True, "Learn the answers only, not the prompts."),
    "bf16": ("bf16", bool, True, "Load the model in bfloat16 and train under bfloat16 autocast."),
    "gradient-checkpointing": ("gradient_checkpointing", bool, True, "Recompute activations in the backward pass."),
    "logging-steps": ("logging_steps", float, 10, "Steps between two log entries; below 1, a share of all steps."),
    "save-steps": ("save_steps", float, 500, "The same for checkpoints, of which the last two are kept; 0 for none."),
    "eval-steps": ("eval_steps", float, 500, "The same for the loss on the evaluation data."),
    "report-to": ("report_to", str, "none", "tensorboard, wandb or another of transformers' integrations; with the routers."),
    "seed": ("seed", int, 0, "Seed of the adapter, the order of the data and dropout."),
}


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


class LoRAMoESFTTrainer(LoRAMoETrainerMixin, SFTTrainer):
    """SFTTrainer whose model gets the task types, and whose optimizer may have a learning rate for the router."""

    router_learning_rate: float | None = None
    loraplus_ratio: float | None = None

    def create_optimizer(self, *model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer of --trainer-args' `optim`; not before training, as FSDP replaces the parameters when it starts."""
        if self.router_learning_rate is not None or self.loraplus_ratio is not None:
            optimized = model[0] if model else self.model  # transformers 5 passes what FSDP made of it
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, optimized)
            options["params"] = optimizer_groups(
                optimized,
                self.args.learning_rate,
                router_lr=self.router_learning_rate,
                loraplus_lr_ratio=self.loraplus_ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer_cls_and_kwargs = (kind, options)
        return super().create_optimizer(*model)


# --- options ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="sft.py --model MODEL (--train-file FILE ... | --dataset ID) [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", required=True, help="Hub id or folder of a causal language model.")
    quantise = {"action": argparse.BooleanOptionalAction, "default": False}
    data.add_argument("--load-in-4bit", help="Quantise the model to NF4 with bitsandbytes (QLoRA). Default: False.", **quantise)
    data.add_argument("--attention", metavar="NAME", help="The model's attn_implementation, e.g. flash_attention_2.")
    data.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template, in place of the tokenizer's own.")
    data.add_argument("--train-file", type=Path, nargs="+", metavar="FILE", help="JSON or JSON lines.")
    data.add_argument("--dataset", help="Hub id or folder of a data set with these columns, in place of --train-file.")
    data.add_argument("--dataset-config", metavar="NAME", help="Configuration of --dataset, if it has several.")
    data.add_argument("--train-split", default="train", help="Split of --dataset to train on. Default: %(default)s.")
    data.add_argument("--eval-file", type=Path, nargs="+", metavar="FILE", help="Each file's loss is reported by its name.")
    data.add_argument("--eval-split", help="Split of --dataset to evaluate on.")

    training = parser.add_argument_group("training")
    for flag, (_, kind, default, text) in TRAINING_OPTIONS.items():
        parse = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        training.add_argument(f"--{flag}", default=default, help=f"{text} Default: {default}.", **parse)
    training.add_argument(
        "--router-learning-rate", type=float, help="For the routers. Default: --learning-rate times --router-lr-multiplier."
    )
    training.add_argument("--loraplus-ratio", type=float, help="B learns this many times faster than A (LoRA+). Default: 1.")
    training.add_argument("--resume", action="store_true", help="Continue from the last complete checkpoint in --output-dir.")
    training.add_argument(
        "--trainer-args",
        metavar="JSON",
        default="{}",
        help="""Any other options of trl.SFTConfig, e.g. '{"optim": "paged_adamw_8bit"}'; they overrule the options above.""",
    )
    add_config_options(parser.add_argument_group("LoRAMoE (options of LoRAMoEConfig)"))
    return parser


def add_config_options(group: argparse._ArgumentGroup) -> None:
    """Flags for the preset and for every option of `LoRAMoEConfig`, with the type and the help that stand there."""
    preset_help = (
        "LoRAMoEConfig.retain, LoRAMoEConfig.paper or the plain LoRAMoEConfig, before the options below. Default: retain."
    )
    group.add_argument("--preset", choices=PRESETS, default="retain", help=preset_help)
    hints = typing.get_type_hints(LoRAMoEConfig)
    for field in config_fields():
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            alternatives = [k for k in typing.get_args(kind) if k is not types.NoneType]
            kind = alternatives[0] if len(alternatives) == 1 else None
        if kind is bool:
            parse = {"action": argparse.BooleanOptionalAction}
        elif kind in (int, float, str):
            parse = {"type": kind}
        else:
            parse = {"type": json_or_text, "metavar": "JSON"}
        default = getattr(LoRAMoEConfig.retain(), field.name)
        text = f"{field.metadata['help']} With --preset retain: {default}.".replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **parse)


def config_fields() -> list[dataclasses.Field]:
    """The options that `LoRAMoEConfig` adds to PEFT's, without the version that it fills in itself."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)} | {"peft_loramoe_version"}
    return [field for field in dataclasses.fields(LoRAMoEConfig) if field.name not in inherited]


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.train_file is None) == (args.dataset is None):
        parser.error("give either --train-file or --dataset.")
    if args.eval_split and args.dataset is None:
        parser.error(f"--eval-split {args.eval_split} is a split of --dataset; with --train-file, give --eval-file.")
    return args


def build_config(args: argparse.Namespace) -> LoRAMoEConfig:
    given = {field.name: getattr(args, field.name) for field in config_fields() if hasattr(args, field.name)}
    try:
        return PRESETS[args.preset](task_type="CAUSAL_LM", **given)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def build_training_config(args: argparse.Namespace, **options: Any) -> SFTConfig:
    """SFTConfig of the command line; `options` are what the data call for."""
    chosen = {name: getattr(args, flag.replace("-", "_")) for flag, (name, *_) in TRAINING_OPTIONS.items()}
    fixed = {
        "per_device_eval_batch_size": args.batch_size,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps" if args.save_steps else "no",
        "save_total_limit": 2,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # reentrant gives the balance term no gradient
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every parameter of an adapter is used in every step
    }
    try:
        return SFTConfig(**{**chosen, **fixed, **options, **parse_trainer_args(args.trainer_args)})
    except (TypeError, ValueError) as error:
        raise InputError(f"SFTConfig refuses the training options: {error}") from error


def parse_trainer_args(text: str) -> dict[str, Any]:
    options = json_or_text(text)
    if not isinstance(options, dict):
        raise InputError(f'--trainer-args {text!r} is not a JSON object; write it like \'{{"optim": "adafactor"}}\'.')
    known = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    for name in options:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{similar[0]}'?" if similar else "the documentation of trl.SFTConfig lists them."
            raise InputError(f"--trainer-args: SFTConfig has no option '{name}'; {fix}")
    return options


# --- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """What is asked and what is to be answered: texts, or turns of a conversation. `place` says where it stands."""

    place: str
    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    task_type: int

    @property
    def earlier_answers(self) -> bool:
        """Whether the prompt holds turns of the assistant."""
        return isinstance(self.prompt, list) and any(turn["role"] == "assistant" for turn in self.prompt)


def read_file(path: Path, config: LoRAMoEConfig) -> list[Record]:
    """The records of a JSON or JSON lines file, checked, with their task types as indices (-1 for unknown)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}).") from error
    return check_records(parse_records(text, path), str(path), config)


def read_split(args: argparse.Namespace, split: str, config: LoRAMoEConfig) -> list[Record]:
    """The same for a split of --dataset."""
    try:
        rows = load_dataset(args.dataset, args.dataset_config, split=split)
    except Exception as error:  # the errors of datasets have no common base
        raise InputError(f"--dataset {args.dataset}, split '{split}': {error}") from error
    place = f"{args.dataset}, {split}"
    return check_records(((f"{place}, row {number}", row) for number, row in enumerate(rows)), place, config)


def parse_records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The values in `text`, each with a description of its place."""
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, path, 1), 1):
            yield f"{path}, record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(line, path, number)


def parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}); write a list of "
            "objects, or one object a line."
        ) from error


def check_records(values: Iterable[tuple[str, Any]], source: str, config: LoRAMoEConfig) -> list[Record]:
    records = [check_record(place, value, config) for place, value in values]
    if not records:
        raise InputError(f"{source}: there are no records; each is an object with task_type and {formats()}.")
    for record in records:
        if isinstance(record.prompt, str) != isinstance(records[0].prompt, str):
            kinds = ("text", "a conversation") if isinstance(record.prompt, str) else ("a conversation", "text")
            raise InputError(
                f"{record.place}: the prompt is {kinds[0]}, but in {records[0].place} it is {kinds[1]}; write all prompts of "
                "a data set in the same way."
            )
    return records


def check_record(place: str, value: Any, config: LoRAMoEConfig) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{place}: {value!r} is not an object; write one with task_type and {formats()}.")
    columns = FORMATS[next((name for name in ("messages", "prompt") if name in value), "instruction")]
    for column in (*columns, "task_type"):
        if column not in value:
            raise InputError(
                f"{place}: the column '{column}' is missing (found: {', '.join(value) or 'nothing'}); every record needs "
                f"task_type and {formats()}."
            )
    if "messages" in value:
        turns = check_turns(value["messages"], f"{place}: messages")
        prompt, completion = turns[:-1], turns[-1:]
    elif "prompt" in value:
        if isinstance(value["prompt"], list) and isinstance(value["completion"], list):
            prompt, completion = (check_turns(value[name], f"{place}: {name}") for name in columns)
        else:
            prompt, completion = (check_text(value[name], f"{place}: {name}") for name in columns)
    else:
        names = ("instruction", "input", "output")
        instruction, extra, output = (check_text(value.get(name) or "", f"{place}: {name}") for name in names)
        prompt = [{"role": "user", "content": "\n".join(text for text in (instruction, extra) if text)}]
        completion = [{"role": "assistant", "content": output}]
    check_answer(prompt, completion, f"{place}: {columns[-1]}")
    return Record(place, prompt, completion, check_task_type(value["task_type"], place, config))


def formats() -> str:
    return ", or ".join(" and ".join(columns) for columns in FORMATS.values())


def check_turns(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InputError(f'{name} is {value!r}; write a list of turns like {{"role": "user", "content": "..."}}.')
    for number, turn in enumerate(value, 1):
        keys = {key for key, content in turn.items() if content is not None} if isinstance(turn, dict) else {}
        if keys != {"role", "content"} or not all(isinstance(turn[key], str) for key in keys):
            raise InputError(f"{name}: turn {number} is {turn!r}; write an object with the strings role and content, no more.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r}; write it as a string.")
    return value


def check_answer(prompt: str | list[dict], completion: str | list[dict], name: str) -> None:
    if isinstance(completion, list):
        if completion[-1]["role"] != "assistant":
            raise InputError(f"{name} ends with a turn of '{completion[-1]['role']}'; end with the assistant's answer.")
        if not prompt:
            raise InputError(f"{name} has one turn only; write what is asked before the answer.")
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    if not answer.strip():
        raise InputError(f"{name} is {answer!r}; give the answer to learn, or leave the record out.")


def check_task_type(task_type: Any, place: str, config: LoRAMoEConfig) -> int:
    names, count = config.task_type_names or [], config.num_groups
    if task_type in names:
        return names.index(task_type)
    if isinstance(task_type, int) and not isinstance(task_type, bool) and -1 <= task_type < count:
        return task_type
    known = f"one of {', '.join(map(repr, names))}, " if names else ""
    fix = "" if names else "; to use names, give them with --task-type-names"
    raise InputError(
        f"{place}: unknown task_type {task_type!r}; write {known}an integer from 0 to {count - 1} (one for each expert group), "
        f"or -1 for unknown{fix}."
    )


def read_data(args: argparse.Namespace, config: LoRAMoEConfig) -> tuple[list[Record], dict[str, list[Record]]]:
    """The records to train on, and those to evaluate on by name."""
    if args.dataset:
        train = read_split(args, args.train_split, config)
    else:
        train = [record for path in args.train_file for record in read_file(path, config)]
    evaluation = {args.eval_split: read_split(args, args.eval_split, config)} if args.eval_split else {}
    for path in args.eval_file or ():
        if path.stem in evaluation:
            raise InputError(f"--eval-file {path}: there is another evaluation set called '{path.stem}'; rename one of them.")
        evaluation[path.stem] = read_file(path, config)
    return train, evaluation


def learns_every_answer(records: list[Record], tokenizer: Any) -> bool:
    """Whether SFTTrainer is to learn all answers of a conversation, not only the last."""
    if not tokenizer.chat_template or not any(record.earlier_answers for record in records):
        return False  # a prompt and its completion say the same, and are rendered as in use
    try:
        get_training_chat_template(tokenizer)  # SFTTrainer will use it; None if the tokenizer's own has the markers
    except ValueError:
        say(
            "only the last answer of each conversation is learned: the chat template does not mark answers with "
            "{% generation %}, and TRL knows no version of it that does (--chat-template can give one)"
        )
        return False
    return True


def to_dataset(records: list[Record], tokenizer: Any, every_answer: bool) -> Dataset:
    """The columns that SFTTrainer knows, and the task types."""
    return Dataset.from_list([{**to_columns(r, tokenizer, every_answer), "task_type": r.task_type} for r in records])


def to_columns(record: Record, tokenizer: Any, every_answer: bool) -> dict[str, Any]:
    prompt, completion = record.prompt, record.completion
    if isinstance(prompt, list) and not tokenizer.chat_template:
        if [turn["role"] for turn in [*prompt, *completion]] != ["user", "assistant"]:
            raise InputError(
                f"{record.place}: the tokenizer has no chat template, without which a conversation can be one question and "
                "its answer only; give a template with --chat-template."
            )
        prompt, completion = PLAIN_PROMPT.format(prompt[0]["content"]), completion[0]["content"]
    return {"messages": prompt + completion} if every_answer else {"prompt": prompt, "completion": completion}


def report_lengths(dataset: Dataset, records: int, name: str, training: SFTConfig) -> None:
    """Say what --max-length takes away, which SFTTrainer does without a word."""
    limit, packed = training.max_length, "seq_lengths" in dataset.column_names
    if not len(dataset):
        raise InputError(f"{name}: in every record the prompt alone fills --max-length {limit}; raise it.")
    column = dataset.select_columns(["seq_lengths" if packed else "input_ids"])
    rows = (row for batch in column.iter(1000) for row in next(iter(batch.values())))
    lengths = [length for row in rows for length in row] if packed else [len(row) for row in rows]
    full = sum(length >= limit for length in lengths) if limit else 0
    if full and not (packed and training.packing_strategy == "bfd_split"):  # which goes on in the next row
        say(f"{name}: {full} of {records} records fill --max-length {limit}; what they have beyond it is cut off")
    if len(lengths) < records:
        say(f"{name}: {records - len(lengths)} of {records} records are left out: the prompt alone fills --max-length {limit}")


# --- model and training -----------------------------------------------------------------------------------------------


def load_tokenizer(args: argparse.Namespace) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no tokenizer could be loaded ({error})") from error
    if args.chat_template:
        try:
            tokenizer.chat_template = args.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {args.chat_template}: cannot be read as text ({error}).") from error
    return tokenizer


def load_model(name: str, load_in_4bit: bool, bf16: bool, attention: str | None = None) -> torch.nn.Module:
    dtype = torch.bfloat16 if bf16 else torch.float32
    sharded = is_fsdp_enabled() or is_deepspeed_zero3_enabled()
    options = {"dtype": dtype, "attn_implementation": attention}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,  # shards have one dtype
        )
        options["device_map"] = None if sharded else {"": PartialState().device}
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--model {name}: it could not be loaded ({error})") from error


def build_trainer(args: argparse.Namespace) -> LoRAMoESFTTrainer:
    """Everything that the command line asks for, up to the first step."""
    # The new names do not exist in all supported versions of transformers, and PEFT uses the old ones too.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    config = build_config(args)
    train, evaluation = read_data(args, config)
    tokenizer = load_tokenizer(args)
    every_answer = args.answer_only and learns_every_answer([*train, *(r for rs in evaluation.values() for r in rs)], tokenizer)
    training = build_training_config(
        args, assistant_only_loss=every_answer, eval_strategy="steps" if evaluation and args.eval_steps else "no"
    )
    zero_3 = training.deepspeed_plugin is not None and training.deepspeed_plugin.zero_stage == 3
    if zero_3 and training.gradient_checkpointing and config.balance_loss_weight:
        raise InputError(
            "--gradient-checkpointing: with DeepSpeed ZeRO-3, SFTTrainer makes it reentrant, which gives the balance term no "
            "gradient; use ZeRO-2 or FSDP, or --no-gradient-checkpointing, or --balance-loss-weight 0."
        )
    model = load_model(args.model, args.load_in_4bit, training.bf16, args.attention)
    try:
        trainer = LoRAMoESFTTrainer(
            model=model,
            args=training,
            train_dataset=to_dataset(train, tokenizer, every_answer),
            eval_dataset={name: to_dataset(records, tokenizer, every_answer) for name, records in evaluation.items()} or None,
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[RouterCallback()] if training.report_to else [],  # too many numbers for the terminal
        )
    except ValueError as error:  # a target that the model does not have, or that SFTTrainer cannot train
        if isinstance(error, InputError):
            raise
        raise InputError(str(error)) from error
    report_lengths(trainer.train_dataset, len(train), "training data", training)
    for name, records in evaluation.items():
        report_lengths(trainer.eval_dataset[name], len(records), name, training)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        # SFTTrainer casts the adapter of a quantised model to bfloat16, which rounds AdamW's small steps away.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.router_learning_rate, trainer.loraplus_ratio = args.router_learning_rate, args.loraplus_ratio
    return trainer


def checkpoint_to_resume(args: argparse.Namespace) -> str | None:
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint and not args.resume:
        raise InputError(
            f"--output-dir {args.output_dir} holds {Path(checkpoint).name} of an earlier run; continue it with --resume, or "
            "give another folder."
        )
    if args.resume:
        say(f"resuming from {checkpoint}" if checkpoint else f"no complete checkpoint in {args.output_dir}: starting afresh")
    return checkpoint


def run(args: argparse.Namespace) -> None:
    checkpoint = checkpoint_to_resume(args)
    trainer = build_trainer(args)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset:
        trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # one file, not one for each process
    trainer.save_model()
    say(f"To load the adapter:\n\n{loading_snippet(args.output_dir, trainer.model.peft_config['default'].to_dict())}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def say(text: str) -> None:
    """Print in one process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
