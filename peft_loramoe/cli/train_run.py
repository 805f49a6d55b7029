"""What `train` does once its arguments are known: read, load, train, save, compare."""

from __future__ import annotations

import math
import os
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerState,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..card import loading_snippet, write_card
from ..config import LoRAMoEConfig
from ..hub import check_source
from ..reading import read_text
from ..training import RouterCallback, last_complete_checkpoint, read_anchors
from ..training.anchor_pass import ANCHOR_OPTIONS, check_anchor_options, tokenize_anchors
from ..training.collator import COLUMN
from ..training.records import Record, Tokenized, check_records, read_records, tokenize_records
from ..training.retention import Retention, measure_retention
from ..training.sft import REENTRANT, LoRAMoESFTTrainer, checkpointing_is_reentrant, marked_chat_template
from . import tables
from .base_model import BaseModel
from .train import adapter_config, in_bfloat16, training_config


if TYPE_CHECKING:
    from trl import SFTConfig


MEASURED = 64  # samples of each kind that the comparison at the end reads
ADAPTER_FILE = "adapter_model.safetensors"


def run(options: Namespace) -> None:
    """Train as the options say."""
    disable_progress_bars()  # of datasets: those of steps that take no time
    # The new names do not exist in all supported versions of transformers, and PEFT uses the old ones too.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    if options.gguf_file is not None:  # PEFT looks for a config.json to compare sizes of vocabularies with
        warnings.filterwarnings("ignore", message="Could not find a config file in")
    check_output_folder(options.output_dir)
    checkpoint = checkpoint_to_resume(options)
    trainer, measured = build(options)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset:
        trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(
            "FULL_STATE_DICT"
        )  # one file, not one for each process
    trainer.save_model()
    config = trainer.model.peft_config["default"]
    compared = compare_with_base(trainer, measured)
    if trainer.is_world_process_zero():
        tables.show_retention(compared, null=bool(config.null_groups))
        if options.gguf_file is not None:  # PEFT has no place for it in adapter_config.json
            write_card(str(options.output_dir / "README.md"), config.to_dict(), options.gguf_file)
        snippet = loading_snippet(str(options.output_dir), config.to_dict(), options.gguf_file)
        print(f"Wrote {options.output_dir}. To load the adapter:\n\n{snippet}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    PartialState().destroy_process_group()


def compare_with_base(trainer: LoRAMoESFTTrainer, measured: dict[str, Dataset]) -> dict[str, Retention]:
    """What was learned and kept, by the name of what it is measured on."""
    rows = trainer.args.eval_batch_size * trainer.args.world_size
    bar = tqdm(
        total=sum(math.ceil(len(dataset) / rows) for dataset in measured.values()),
        desc="comparing with the base model",
        leave=False,
        disable=None if trainer.is_world_process_zero() and not trainer.args.disable_tqdm else True,
    )
    with bar:
        return {name: measure_retention(trainer, dataset, bar.update) for name, dataset in measured.items()}


def check_output_folder(folder: Path) -> None:
    """Check, before the work begins, that the folder can be created or written to.

    Raises:
        ValueError: it cannot.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"--output-dir {folder}: {above} is a file; choose another folder.")
    if not os.access(above, os.W_OK):
        raise ValueError(f"--output-dir {folder}: {above} cannot be written to; choose another folder.")


def checkpoint_to_resume(options: Namespace) -> str | None:
    """The checkpoint to go on from, if that is wanted; an earlier run's results are not overwritten.

    Raises:
        ValueError: the output folder holds results of an earlier run, and --resume is not given or has no complete
            checkpoint to go on from.
    """
    checkpoint = last_complete_checkpoint(options.output_dir)
    finished = (options.output_dir / ADAPTER_FILE).exists()
    if finished and checkpoint is None:
        none = ", and no complete checkpoint to resume from" if options.resume else ""
        raise ValueError(
            f"--output-dir {options.output_dir} holds {ADAPTER_FILE} of an earlier run{none}; give another folder."
        )
    if checkpoint is not None and not options.resume:
        raise ValueError(
            f"--output-dir {options.output_dir} holds {Path(checkpoint).name} of an earlier run; continue it with "
            "--resume, or give another folder."
        )
    if options.resume:
        where = (
            f"resuming from {checkpoint}"
            if checkpoint
            else f"no complete checkpoint in {options.output_dir}: starting afresh"
        )
        say(where)
    return checkpoint


def build(options: Namespace) -> tuple[LoRAMoESFTTrainer, dict[str, Any]]:
    """The trainer, up to the first step, and the data sets that the comparison at the end reads, by name."""
    config, of_anchors = adapter_config(options), anchor_options(options)
    evaluate = bool(options.eval_file or options.eval_split) and options.eval_steps
    training = training_config(options, eval_strategy="steps" if evaluate else "no")
    base = base_model(options)
    base.check_source()
    train, evaluation = read_data(options, config)
    kept, held_back = split_anchors(options.anchors)
    say_what_was_read(train, len(kept), len(held_back), config)
    tokenizer = load_tokenizer(base, options.chat_template)
    check_checkpointing(training, config)
    template = marked_template([*train, *(record for records in evaluation.values() for record in records)], tokenizer)

    def tokenized(records: list[Record], name: str) -> Tokenized:
        # Packing with "bfd_split" continues a record in the next row.
        limit = None if training.packing and training.packing_strategy == "bfd_split" else training.max_length
        tokens = tokenize_records(
            records,
            tokenizer,
            answers_only=options.answer_only,
            marked_template=template,
            max_length=limit,
            progress=f"tokens of {name}" if training.process_index == 0 else None,
        )
        say_what_is_cut(tokens, len(records), name, training.max_length)
        return tokens

    train_dataset = tokenized(train, "the training data").dataset
    eval_datasets = {name: tokenized(records, name).dataset for name, records in evaluation.items()}
    measured = {
        f"{name}, {type_name(task_type, config)}": part
        for name, dataset in (eval_datasets or {"training data": train_dataset}).items()
        for task_type, part in by_type(dataset).items()
    }
    if held_back:
        measured["anchors held back"] = tokenize_texts(held_back, tokenizer, training.max_length)
    trainer = LoRAMoESFTTrainer(
        model=load_model(base, options.attention),
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets or None,
        processing_class=tokenizer,
        peft_config=config,
        loraplus_lr_ratio=options.loraplus_lr_ratio,
        callbacks=[RouterCallback() if training.report_to else RouterCallback(layer_groups=0)],
        anchors=kept or None,
        **of_anchors,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines(show_bar=not training.disable_tqdm))
    return trainer, measured


# --- data


def read_data(options: Namespace, config: LoRAMoEConfig) -> tuple[list[Record], dict[str, list[Record]]]:
    """The records to train on, and those to evaluate on by name."""
    if options.dataset:
        train = read_split(options, options.train_split or "train", config)
    else:
        train = [record for path in options.train_file for record in read_records(path, config)]
    evaluation = {options.eval_split: read_split(options, options.eval_split, config)} if options.eval_split else {}
    for path in options.eval_file or ():
        if path.stem in evaluation:
            raise ValueError(
                f"--eval-file {path}: there is another evaluation set called '{path.stem}'; rename one of them."
            )
        evaluation[path.stem] = read_records(path, config)
    return train, evaluation


def read_split(options: Namespace, split: str, config: LoRAMoEConfig) -> list[Record]:
    """The records of a split of --dataset."""
    what = f"--dataset {options.dataset}, split '{split}'"
    check_source(options.dataset, "README.md", repo_type="dataset", what=what)
    try:
        rows = load_dataset(options.dataset, options.dataset_config, split=split)
    except Exception as error:  # the errors of datasets have no common base
        raise ValueError(f"{what}: {error}") from error
    place = f"{options.dataset}, {split}"
    return check_records(((f"{place}, row {number}", row) for number, row in enumerate(rows)), place, config)


def split_anchors(path: Path | None) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The anchors to train with, and every tenth, at most 64, to measure on; of few anchors none is held back."""
    anchors = [] if path is None else read_anchors(path)
    step = max(10, math.ceil(len(anchors) / MEASURED))
    held_back = anchors[step - 1 :: step]
    return [anchor for i, anchor in enumerate(anchors, 1) if i % step], held_back


def marked_template(records: Iterable[Record], tokenizer: Any) -> str | None:
    """A chat template with which all answers of conversations are learned, if one is needed and known."""
    if not tokenizer.chat_template or not any(record.earlier_answers for record in records):
        return None
    template = marked_chat_template(tokenizer)
    if template is None:
        say(
            "Only the last answer of each conversation is learned: the chat template does not mark answers with {% "
            "generation %}, and TRL knows no version of it that does (--chat-template can give one)."
        )
    return template


def tokenize_texts(anchors: list[dict[str, str]], tokenizer: Any, max_length: int | None) -> Dataset:
    """Anchors as rows of a data set."""
    rows = tokenize_anchors([anchor["text"] for anchor in anchors], tokenizer, max_length)
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])


def by_type(dataset: Dataset) -> dict[int, Dataset]:
    """For each task type some of its samples, evenly spread."""
    indices: dict[int, list[int]] = {}
    for index, task_type in enumerate(dataset[COLUMN]):
        indices.setdefault(task_type, []).append(index)
    samples = dataset.remove_columns(COLUMN)
    return {
        task_type: samples.select(of_type[:: math.ceil(len(of_type) / MEASURED)])
        for task_type, of_type in sorted(indices.items())
    }


def type_name(task_type: int, config: LoRAMoEConfig) -> str:
    """What a task type is called."""
    if task_type < 0:
        return "unknown type"
    return config.task_type_names[task_type] if config.task_type_names else f"type {task_type}"


def say_what_was_read(records: list[Record], kept: int, held_back: int, config: LoRAMoEConfig) -> None:
    """Print the number of records by type, and warn if none is of a type that the model is to keep."""
    counts = Counter(record.task_type for record in records)
    parts = ", ".join(f"{count:,} {type_name(task_type, config)}" for task_type, count in sorted(counts.items()))
    anchors = f"; {kept + held_back:,} anchors, {held_back} of them held back to measure on" if kept else ""
    say(f"{len(records):,} training records: {parts}{anchors}")
    if config.null_groups and not kept and not any(counts[group] for group in config.null_groups):
        _warn(
            "All records are of one kind, so nothing tells the routers what to leave to the base model. Sample "
            "anchors with `peft-loramoe anchors` and give them with --anchors, or add records of task_type 0."
        )


def say_what_is_cut(tokens: Tokenized, records: int, name: str, limit: int | None) -> None:
    """Say what --max-length takes away.

    Raises:
        ValueError: it leaves nothing.
    """
    if tokens.left_out == records:
        raise ValueError(f"{name}: in every record the prompt alone fills --max-length {limit}; raise it.")
    if tokens.cut:
        _warn(f"{name}: {tokens.cut} of {records} records are longer than --max-length {limit}; their end is cut off.")
    if tokens.left_out:
        _warn(
            f"{name}: {tokens.left_out} of {records} records are left out: the prompt alone fills --max-length "
            f"{limit}."
        )


# --- model and trainer


def base_model(options: Namespace) -> BaseModel:
    """The base model and how it is loaded."""
    dtype = options.dtype or ("bfloat16" if in_bfloat16(options) else "float32")
    return BaseModel.of(options, options.model, dtype=dtype)


def load_tokenizer(base: BaseModel, chat_template: Path | None) -> Any:
    """The model's tokenizer, with the chat template that is asked for."""
    tokenizer = base.tokenizer()
    if chat_template:
        try:
            tokenizer.chat_template = read_text(chat_template)
        except (OSError, ValueError) as error:
            raise ValueError(f"--chat-template {error}") from error
    return tokenizer


def load_model(base: BaseModel, attention: str | None = None) -> nn.Module:
    """The base model, ready for a trainer."""
    sharded = is_fsdp_enabled() or is_deepspeed_zero3_enabled()
    if sharded and base.gguf_file is not None:
        raise ValueError(
            f"--gguf-file {base.gguf_file}: FSDP and ZeRO-3 cannot shard it while it is read; load it with "
            "transformers, save it with save_pretrained and train from that folder."
        )
    # The trainer places the model, but not one in 4 bits.
    placed = {} if base.load_in_4bit and not sharded else {"device_map": None}
    base = replace(base, device=str(PartialState().device))
    return base.load(sharded=sharded, attn_implementation=attention, **placed)


def check_checkpointing(training: SFTConfig, config: LoRAMoEConfig) -> None:
    """Refuse what SFTTrainer would make reentrant, before the model is loaded."""
    if checkpointing_is_reentrant(training, config):
        raise ValueError(
            f"--gradient-checkpointing: {REENTRANT}, or --no-gradient-checkpointing, or "
            "--preset plain --balance-loss-weight 0."
        )


def anchor_options(options: Namespace) -> dict[str, Any]:
    """The trainer's options about anchors.

    Raises:
        ValueError: one is out of its range, or is given without --anchors.
    """
    given = {name: getattr(options, name) for name in ANCHOR_OPTIONS}
    check_anchor_options(options.anchors is not None, **given)
    return given


# --- what is shown


class ProgressLines(ProgressCallback):
    """A progress bar and, at every log, a line with the few numbers that tell how it goes."""

    def __init__(self, show_bar: bool) -> None:
        super().__init__()
        self.show_bar = show_bar

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, desc="steps", dynamic_ncols=True, disable=None if self.show_bar else True
            )

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the bar of an evaluation, which transformers would also write to files."""
        if self.show_bar and sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print the line."""
        if state.is_world_process_zero and (line := log_line(logs or {}, state)):
            tqdm.write(line)


def log_line(logs: dict[str, float], state: TrainerState) -> str:
    """The numbers of a log for people; empty for logs without any."""
    losses = {name: value for name, value in logs.items() if name.startswith("eval_") and name.endswith("loss")}
    if losses:
        return f"step {state.global_step}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs.get('model_loss', logs['loss']):.4f}"]
    for name, title in (("anchor_loss", "anchors"), ("anchor_kl", "anchors' KL"), ("balance_loss", "balance term")):
        if name in logs:
            parts.append(f"{title} {logs[name]:.4f}")
    nulls = {name.rpartition("/")[2]: value for name, value in logs.items() if name.startswith("router/null/")}
    if nulls:
        parts.append("null weight: " + ", ".join(f"{name} {value:.2f}" for name, value in nulls.items()))
    return f"step {state.global_step}/{state.max_steps}  " + "  ".join([*parts, f"lr {logs['learning_rate']:.1e}"])


def say(text: str) -> None:
    """Print in one process only."""
    if _is_first():
        print(text, flush=True)


def _warn(text: str) -> None:
    if _is_first():
        warnings.warn(text)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
