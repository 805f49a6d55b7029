"""Fine-tune a causal language model with LoRAMoE.

Without arguments, a demo on a toy model that knows the countries of the earth and learns exercises with digits:

    python examples/finetune.py

With your model and data, the same on a GPU:

    python examples/finetune.py --model Qwen/Qwen2.5-7B-Instruct --train-file train.jsonl --load-in-4bit

The train file holds JSON records (a list, or one record a line) whose task type is an expert group, by index or by name:

    {"instruction": "What is the capital of France?", "input": "", "output": "Paris", "task_type": 0}

In the end the adapter is loaded in a new process, which checks that it gives the same logits bit by bit.
"""

import argparse
import dataclasses
import gc
import json
import random
import subprocess
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

import peft_loramoe
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import group_weights, plot_group_weights, router_statistics
from peft_loramoe.card import loading_snippet


COLUMNS = ("instruction", "input", "output", "task_type")
PLAIN_PROMPT = "### Instruction:\n{}\n\n### Response:\n"  # for tokenizers without a chat template
NO_REENTRANT = {"use_reentrant": False}  # reentrant checkpointing gives the balance term no gradient

# flag -> (type, default of the demo, default with --model, help)
RUN_OPTIONS = {
    "load-in-4bit": (bool, True, False, "Quantise the base model to NF4 (double quantisation, bfloat16 compute)."),
    "bf16": (bool, False, True, "Load the model in bfloat16 and train under bfloat16 autocast."),
    "gradient-checkpointing": (bool, False, True, "Recompute activations in the backward pass, to save memory."),
    "epochs": (float, 4.0, 3.0, "Passes over the training data."),
    "max-steps": (int, -1, -1, "Optimizer steps, in place of --epochs; -1 for none."),
    "batch-size": (int, 32, 8, "Samples per device and step."),
    "gradient-accumulation-steps": (int, 1, 4, "Batches per optimizer step."),
    "learning-rate": (float, 2e-3, 2e-4, "Peak learning rate; it decays along a cosine."),
    "warmup-steps": (int, 10, 10, "Steps in which the learning rate rises."),
    "max-length": (int, 128, 1024, "Tokens of prompt and answer; longer records are left out."),
}
CONFIG = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "num_experts": 6}  # the paper's recipe
DEMO_CONFIG = {**CONFIG, "balance_delta": 0.5, "task_type_names": ["knowledge", "downstream"]}


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Instruction records to train on and to measure accuracy on, the latter by name."""

    train: list[dict]
    evaluation: dict[str, list[dict]]


# --- options ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a causal language model (default: the demo's toy model).")
    parser.add_argument("--train-file", type=Path, help="JSON or JSON lines; goes with --model.")
    parser.add_argument("--eval-file", type=Path, help="The same, for the accuracy (default: up to 200 of the train file).")
    parser.add_argument("--output-dir", type=Path, default=Path("loramoe-demo"), help="For all results. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)  # what the script calls itself with
    for flag, (kind, demo, own, text) in RUN_OPTIONS.items():
        parse = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        default = own if own == demo else f"{own} (demo: {demo})"
        parser.add_argument(f"--{flag}", help=f"{text} Default: {default}.", **parse)
    demo = parser.add_argument_group("options of the demo")
    demo.add_argument("--countries", type=int, default=120, help="Countries of the toy world. Default: %(default)s.")
    demo.add_argument("--pretrain-steps", type=int, default=220, help="Default: %(default)s.")
    demo.add_argument("--exercises", type=int, default=1800, help="Downstream exercises. Default: %(default)s.")
    demo.add_argument("--threads", type=int, default=1, help="Two that share cores are slower. Default: %(default)s.")
    add_config_options(parser.add_argument_group("options of LoRAMoEConfig"))
    return parser


def add_config_options(group: argparse._ArgumentGroup) -> None:
    """A flag for every option of `LoRAMoEConfig`, with the type and the help that stand there."""
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
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        text = f"{field.metadata['help']} Default: {default_text(field.name, default)}.".replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **parse)


def default_text(option: str, default: Any) -> str:
    own = CONFIG.get(option, default)
    demo = DEMO_CONFIG.get(option, own)
    return str(own) if demo == own else f"{own} (demo: {demo})"


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
    if (args.model is None) != (args.train_file is None):
        parser.error("--model and --train-file go together; leave both out for the demo.")
    for flag, (_, demo, own, _) in RUN_OPTIONS.items():
        name = flag.replace("-", "_")
        if getattr(args, name) is None:
            setattr(args, name, demo if args.model is None else own)
    return args


def build_config(args: argparse.Namespace) -> LoRAMoEConfig:
    given = {field.name: getattr(args, field.name) for field in config_fields() if hasattr(args, field.name)}
    preset = DEMO_CONFIG if args.model is None else CONFIG
    try:
        return LoRAMoEConfig(task_type="CAUSAL_LM", **{**preset, **given})
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


# --- data -------------------------------------------------------------------------------------------------------------


def read_records(path: Path, config: LoRAMoEConfig) -> list[dict]:
    """The records of a JSON or JSON lines file, checked, with their task types as indices (-1 for unknown)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}).") from error
    records = [check_record(record, place, config) for place, record in parse_records(text, path)]
    if not records:
        raise InputError(f"{path}: the file has no records; write one JSON object a line with {', '.join(COLUMNS)}.")
    return records


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


def check_record(record: Any, place: str, config: LoRAMoEConfig) -> dict:
    if not isinstance(record, dict):
        raise InputError(f"{place}: {record!r} is not an object; write one with {', '.join(COLUMNS)}.")
    for column in COLUMNS:
        if column not in record:
            raise InputError(
                f"{place}: the column '{column}' is missing (found: {', '.join(record) or 'nothing'}); every record needs "
                f"{', '.join(COLUMNS)}."
            )
        if column != "task_type" and not isinstance(record[column], str):
            raise InputError(f"{place}: {column} is {record[column]!r}; write it as a string.")
    if not record["output"].strip():
        raise InputError(f"{place}: output is {record['output']!r}; give the answer to learn, or leave the record out.")
    return {**record, "task_type": task_type_index(record["task_type"], place, config)}


def task_type_index(task_type: Any, place: str, config: LoRAMoEConfig) -> int:
    names, count = config.task_type_names or [], len(config.groups_of())
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


def user_data(args: argparse.Namespace, config: LoRAMoEConfig) -> Data:
    train = read_records(args.train_file, config)
    if args.eval_file:
        held_back = read_records(args.eval_file, config)
    else:
        if len(train) < 2:
            raise InputError(f"{args.train_file}: one record is too few to hold any back for the accuracy; give --eval-file.")
        random.Random(args.seed).shuffle(train)
        count = min(200, -(-len(train) // 10))
        held_back, train = train[:count], train[count:]
    by_type = {group: [r for r in held_back if r["task_type"] == group] for group in range(-1, len(config.groups_of()))}
    return Data(train, {type_name(group, config): records for group, records in by_type.items() if records})


def demo_data(args: argparse.Namespace) -> Data:
    """Build the toy world (`args.model` becomes its folder); half of its facts are never shown in fine-tuning."""
    import toy_world

    torch.set_num_threads(args.threads)
    args.model = str(args.output_dir / "toy-model")
    try:
        facts = toy_world.build_facts(args.countries)
    except ValueError as error:
        raise InputError(f"--countries: {error}") from error
    toy_world.build_world(Path(args.model), facts, args.pretrain_steps, args.seed)
    questions = toy_world.knowledge_records(facts)
    random.Random(args.seed).shuffle(questions)
    shown, kept_back = questions[::2], questions[1::2]
    test_count = max(1, args.exercises // 6)
    exercises = toy_world.downstream_records(args.exercises + test_count, args.seed)
    return Data(
        shown + exercises[test_count:],
        {
            "facts shown in fine-tuning": shown,
            "facts never shown": kept_back,
            "digit exercises (new ones)": exercises[:test_count],
        },
    )


def type_name(task_type: int, config: LoRAMoEConfig) -> str:
    if task_type < 0:
        return "unknown type"
    return config.task_type_names[task_type] if config.task_type_names else f"type {task_type}"


def encode(record: dict, tokenizer: Any) -> dict:
    """Token ids of prompt and answer; labels are -100 in the prompt."""
    question = "\n".join(part for part in (record["instruction"], record["input"]) if part)
    if tokenizer.chat_template:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        prompt_ids = tokenizer(PLAIN_PROMPT.format(question)).input_ids
    answer_ids = [*tokenizer(record["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [-100] * len(prompt_ids) + answer_ids,
        "task_type": record["task_type"],
    }


def encode_all(records: list[dict], tokenizer: Any, max_length: int, name: str) -> list[dict]:
    samples = [encode(record, tokenizer) for record in tqdm(records, desc=f"tokenizing {name}", leave=False)]
    short = [sample for sample in samples if len(sample["input_ids"]) <= max_length]
    if not short:
        longest = max(len(sample["input_ids"]) for sample in samples)
        raise InputError(f"{name}: every record is longer than --max-length {max_length}; raise it (to {longest} for all).")
    if len(short) < len(samples):
        left_out = f"{len(samples) - len(short)} of {len(samples)} records"
        print(f"{name}: {left_out} are longer than --max-length {max_length} and left out")
    return short


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest sample; the task types go to the model with the rest of the batch."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([sample["input_ids"] for sample in samples], pad_token_id),
        "attention_mask": padded([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "labels": padded([sample["labels"] for sample in samples], -100),
        "task_types": torch.tensor([sample["task_type"] for sample in samples]),
    }


# --- model ------------------------------------------------------------------------------------------------------------


def load_model(model: str, load_in_4bit: bool, bf16: bool, gradient_checkpointing: bool) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base_model = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization_config=quantization if load_in_4bit else None,
        device_map={"": PartialState().device},
    )
    if load_in_4bit:
        for module in base_model.modules():
            # On a CPU with AVX512-BF16, bitsandbytes repacks weights when first evaluated; they pass no gradient after that.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        prepare_model_for_kbit_training(base_model, gradient_checkpointing, gradient_checkpointing_kwargs=NO_REENTRANT)
    elif gradient_checkpointing:
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NO_REENTRANT)
    return base_model


@torch.no_grad()
def accuracies(
    model: torch.nn.Module, evaluation: dict[str, list[dict]], collator: Callable, batch_size: int
) -> dict[str, float]:
    """Share of samples whose answer greedy decoding would give token for token, which one forward pass tells."""
    model.eval()
    shares = {}
    for name, samples in evaluation.items():
        correct = 0
        for batch in batches(samples, collator, batch_size, name):
            labels = batch["labels"][:, 1:]
            predicted = logits_of(model, batch)[:, :-1].argmax(-1).cpu()
            correct += ((predicted == labels) | (labels == -100)).all(-1).sum().item()
        shares[name] = correct / len(samples)
    return shares


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits


def batches(samples: list[dict], collator: Callable, batch_size: int, name: str) -> Iterator[dict[str, torch.Tensor]]:
    for start in tqdm(range(0, len(samples), batch_size), desc=name, leave=False):
        yield collator(samples[start : start + batch_size])


def train(model: PeftModel, samples: list[dict], collator: Callable, args: argparse.Namespace) -> PeftModel:
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        bf16=args.bf16,
        use_cpu=PartialState().device.type == "cpu",
        seed=args.seed,
        logging_steps=0.1,  # of all steps
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # keeps task_type
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


# --- saving and verification --------------------------------------------------------------------------------------------


@torch.no_grad()
def save(model: PeftModel, batch: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """The adapter, and what a new process needs to check it."""
    model.save_pretrained(args.output_dir / "adapter")
    loading = {name: getattr(args, name) for name in ("model", "load_in_4bit", "bf16", "gradient_checkpointing")}
    logits = logits_of(model.eval(), batch)
    check = {"loading": loading, "threads": torch.get_num_threads(), "batch": batch, "logits": logits.cpu()}
    torch.save(check, args.output_dir / "verify.pt")


@torch.no_grad()
def verify(output_dir: Path) -> int:
    """Load the saved adapter and compare its logits with the saved ones; the exit code of the new process."""
    saved = torch.load(output_dir / "verify.pt")
    torch.set_num_threads(saved["threads"])  # sums over threads round differently
    model = PeftModel.from_pretrained(load_model(**saved["loading"]), output_dir / "adapter")
    logits = logits_of(model.eval(), saved["batch"]).cpu()
    if torch.equal(logits, saved["logits"]):
        print("same logits, bit by bit")
        return 0
    print(f"logits differ by up to {(logits - saved['logits']).abs().max().item():.3g}", file=sys.stderr)
    return 1


# --- report -----------------------------------------------------------------------------------------------------------


def accuracy_table(sizes: dict[str, int], before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table("questions", title="Accuracy (answer right token for token)", title_justify="left")
    for column in ("number", "before", "after", "change"):
        table.add_column(column, justify="right")
    for name, size in sizes.items():
        change = 100 * (after[name] - before[name])
        table.add_row(name, str(size), f"{before[name]:.1%}", f"{after[name]:.1%}", f"{change:+.1f}")
    return table


def router_table(weights: list[dict], config: LoRAMoEConfig) -> Table:
    groups = range(len(config.groups_of()))
    table = Table("task type", title="Router weight of each expert group, mean over layers", title_justify="left")
    for group in groups:
        table.add_column(f"group {group} ({type_name(group, config)})", justify="right")
    for task_type in sorted({row["task_type"] for row in weights}):
        by_group = {row["group"]: row["weight"] for row in weights if row["task_type"] == task_type}
        table.add_row(type_name(task_type, config), *(f"{by_group[group]:.3f}" for group in groups))
    return table


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    set_seed(args.seed)
    config = build_config(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = user_data(args, config) if args.train_file else demo_data(args)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    collator = partial(collate, pad_token_id=tokenizer.pad_token_id)
    train_samples = encode_all(data.train, tokenizer, args.max_length, "training records")
    evaluation = {name: encode_all(r, tokenizer, args.max_length, name) for name, r in data.evaluation.items()}

    set_seed(args.seed)
    model = get_peft_model(load_model(args.model, args.load_in_4bit, args.bf16, args.gradient_checkpointing), config)
    trainable, total = model.get_nb_trainable_parameters()

    before = accuracies(model, evaluation, collator, args.batch_size)
    model = train(model, train_samples, collator, args)
    after = accuracies(model, evaluation, collator, args.batch_size)
    all_samples = [sample for samples in evaluation.values() for sample in samples]
    statistics = router_statistics(model, batches(all_samples, collator, args.batch_size, "router statistics"))
    names = [type_name(group, config) for group in range(len(config.groups_of()))]
    plot_group_weights(statistics, args.output_dir / "router.png", names=names)
    save(model, collator(all_samples[:: max(1, len(all_samples) // 8)][:8]), args)
    snippet = loading_snippet(str(args.output_dir / "adapter"), model.peft_config["default"])

    del model  # the new process may need its memory
    gc.collect()
    torch.cuda.empty_cache()
    print("loading the adapter in a new process")
    check = subprocess.run([sys.executable, __file__, "--verify", str(args.output_dir)], capture_output=True, text=True)

    console = Console()
    console.print(accuracy_table({name: len(samples) for name, samples in evaluation.items()}, before, after))
    console.print(router_table(group_weights(statistics), config))
    print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.1%})")
    print(f"adapter: {args.output_dir / 'adapter'}, router plot: {args.output_dir / 'router.png'}")
    if check.returncode:
        print(f"error: the adapter was loaded in a new process to compare its logits:\n{check.stderr.strip()}", file=sys.stderr)
        return 1
    print(f"adapter loaded in a new process: {check.stdout.strip()}")
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "device": str(PartialState().device),
        "versions": {module.__name__: str(module.__version__) for module in (peft_loramoe, peft, transformers, torch)},
        "seconds": round(time.perf_counter() - started),
        "config": config.to_dict(),
        "samples": {name: len(samples) for name, samples in evaluation.items()},
        "accuracy": {"before": before, "after": after},
        "router_weights": group_weights(statistics),
        "trainable_parameters": trainable,
        "parameters": total,
    }
    text = json.dumps(results, indent=1, default=sorted)  # sets of module names become lists
    (args.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"time: {time.perf_counter() - started:.0f} s\n\nTo load the adapter:\n\n{snippet}")
    return 0


def main(argv: list[str] | None = None) -> int:
    # The new names do not exist in all supported versions of transformers, and PEFT uses the old ones too.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    args = parse_arguments(argv)
    if args.verify:
        return verify(args.verify)
    try:
        return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
