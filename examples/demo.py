"""The whole method on a toy: a small model that knows the countries of the earth learns exercises with digits.

    python -m examples.demo

builds the model and the data (research/toy/countries.py), fine-tunes as `peft-loramoe train` does, and measures what
was learned and what was forgotten. Half of the facts are replayed as questions of task type 0; the other half is never
shown in fine-tuning. In the end the adapter is loaded in a new process, which checks that it gives the same logits bit
by bit. Options that are not listed here are those of `train`.
"""

import argparse
import gc
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import peft_loramoe
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import group_weights, plot_group_weights, router_statistics
from peft_loramoe.card import loading_snippet
from peft_loramoe.cli import train_run
from peft_loramoe.cli.arguments import build_parser
from peft_loramoe.cli.base_model import BaseModel
from peft_loramoe.training.sft import LoRAMoESFTTrainer
from research.toy import countries


EVALUATION = {  # name of the file -> what it is called in the table
    "shown": "facts shown in fine-tuning",
    "kept-back": "facts never shown",
    "exercises": "digit exercises (new ones)",
}
TRAIN_OPTIONS = [
    *("--load-in-4bit", "--no-bf16", "--no-gradient-checkpointing"),
    *("--epochs", "4", "--batch-size", "32", "--gradient-accumulation-steps", "1", "--learning-rate", "2e-3"),
    *("--max-length", "128", "--logging-steps", "0.1", "--save-steps", "0", "--eval-steps", "0"),
    *("--task-type-names", json.dumps(countries.TASK_TYPE_NAMES)),
]
INPUTS = ("input_ids", "attention_mask", "task_types")


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The demo's options, and those for `train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("loramoe-demo"), help="For everything. Default: %(default)s."
    )
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument("--countries", type=int, default=120, help="Countries of the toy world. Default: %(default)s.")
    parser.add_argument("--pretrain-steps", type=int, default=220, help="Default: %(default)s.")
    parser.add_argument("--exercises", type=int, default=1800, help="Exercises to learn from. Default: %(default)s.")
    parser.add_argument(
        "--threads", type=int, default=1, help="Two that share cores are slower. Default: %(default)s."
    )
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)  # what the script calls itself with
    return parser.parse_known_args(argv)


def build_world(args: argparse.Namespace) -> list[str]:
    """Model and data as files, and the options of `train` that name them."""
    try:
        facts = countries.build_facts(args.countries)
    except ValueError as error:
        raise ValueError(f"--countries: {error}") from error
    model = args.output_dir / "toy-model"
    countries.build_world(model, facts, args.pretrain_steps, args.seed)
    questions = countries.knowledge_records(facts)
    random.Random(args.seed).shuffle(questions)
    new = max(1, args.exercises // 6)
    exercises = countries.downstream_records(args.exercises + new, args.seed)
    evaluation = dict(zip(EVALUATION, (questions[::2], questions[1::2], exercises[:new])))
    files = {"train": questions[::2] + exercises[new:], **evaluation}
    for name, records in files.items():
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (args.output_dir / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train, *held_back = (str(args.output_dir / f"{name}.jsonl") for name in files)
    adapter = str(args.output_dir / "adapter")
    return ["--model", str(model), "--train-file", train, "--eval-file", *held_back, "--output-dir", adapter]


# --- measurements


@torch.no_grad()
def accuracies(trainer: LoRAMoESFTTrainer) -> dict[str, float]:
    """Share of samples whose answer greedy decoding would give token for token, which one forward pass tells."""
    trainer.model.eval()
    shares = {}
    for name, title in EVALUATION.items():
        correct = 0
        for batch in batches(trainer, name):
            labels = batch["labels"][:, 1:]
            predicted = logits_of(trainer.model, batch)[:, :-1].argmax(-1)
            correct += ((predicted == labels) | (labels == -100)).all(-1).sum().item()
        shares[title] = correct / len(trainer.eval_dataset[name])
    return shares


def batches(trainer: LoRAMoESFTTrainer, *names: str) -> Iterator[dict[str, torch.Tensor]]:
    for name in names:
        yield from tqdm(trainer.get_eval_dataloader(name), desc=EVALUATION[name], leave=False)


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@torch.no_grad()
def save_check(trainer: LoRAMoESFTTrainer, args: argparse.Namespace, train_args: argparse.Namespace) -> None:
    """What a new process needs to check the saved adapter."""
    batch = next(batches(trainer, "exercises"))
    loading = asdict(train_run.base_model(train_args))
    logits = logits_of(trainer.model.eval(), batch)
    torch.save(
        {"loading": loading, "threads": args.threads, "batch": batch, "logits": logits}, args.output_dir / "verify.pt"
    )


@torch.no_grad()
def verify(output_dir: Path) -> int:
    """Load the saved adapter and compare its logits with the saved ones; the exit code of the new process."""
    saved = torch.load(output_dir / "verify.pt", map_location=PartialState().device)
    torch.set_num_threads(saved["threads"])  # sums over threads round differently
    model = train_run.load_model(BaseModel(**saved["loading"])).to(PartialState().device)
    logits = logits_of(PeftModel.from_pretrained(model, output_dir / "adapter").eval(), saved["batch"])
    if torch.equal(logits, saved["logits"]):
        print("same logits, bit by bit")
        return 0
    print(f"logits differ by up to {(logits - saved['logits']).abs().max().item():.3g}", file=sys.stderr)
    return 1


# --- report


def accuracy_table(sizes: dict[str, int], before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table("questions", title="Accuracy (answer right token for token)", title_justify="left")
    for column in ("number", "before", "after", "change"):
        table.add_column(column, justify="right")
    for name, size in sizes.items():
        change = 100 * (after[name] - before[name])
        table.add_row(name, str(size), f"{before[name]:.1%}", f"{after[name]:.1%}", f"{change:+.1f}")
    return table


def router_table(weights: list[dict], config: LoRAMoEConfig) -> Table:
    table = Table("task type", title="Router weight of each expert group, mean over layers", title_justify="left")
    for group, name in enumerate(config.task_type_names):
        table.add_column(f"group {group} ({name})", justify="right")
    for task_type, name in enumerate(config.task_type_names):
        by_group = {row["group"]: row["weight"] for row in weights if row["task_type"] == task_type}
        table.add_row(name, *(f"{by_group[group]:.3f}" for group in sorted(by_group)))
    return table


def write_results(path: Path, **results: Any) -> None:
    modules = (peft_loramoe, peft, transformers, trl, torch)
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "device": str(PartialState().device),
        "versions": {module.__name__: str(module.__version__) for module in modules},
    }
    text = json.dumps({**header, **results}, indent=1, default=sorted)  # sets of module names become lists
    path.write_text(text + "\n", encoding="utf-8")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    options = [*build_world(args), *TRAIN_OPTIONS, "--seed", str(args.seed), *rest]
    print(f"fine-tuning as with\n\npeft-loramoe train {shlex.join(options)}\n")
    train_args = build_parser().parse_args(["train", *options])

    trainer, _ = train_run.build(train_args)
    config = trainer.model.peft_config["default"]
    trainable, total = trainer.model.get_nb_trainable_parameters()
    before = accuracies(trainer)
    trainer.train()
    trainer.save_model()
    after = accuracies(trainer)
    inputs = ({name: batch[name] for name in INPUTS} for batch in batches(trainer, *EVALUATION))
    statistics = router_statistics(trainer.model, inputs)
    weights = group_weights(statistics.experts)
    plot_group_weights(statistics, args.output_dir / "router.png")
    sizes = {title: len(trainer.eval_dataset[name]) for name, title in EVALUATION.items()}
    save_check(trainer, args, train_args)

    del trainer  # the new process may need its memory
    gc.collect()
    torch.cuda.empty_cache()
    print("loading the adapter in a new process")
    command = [sys.executable, "-m", "examples.demo", "--verify", "--output-dir", str(args.output_dir)]
    check = subprocess.run(command, capture_output=True, text=True)

    console = Console()
    console.print(accuracy_table(sizes, before, after))
    console.print(router_table(weights, config))
    print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.1%})")
    print(f"adapter: {args.output_dir / 'adapter'}, router plot: {args.output_dir / 'router.png'}")
    if check.returncode:
        print(
            f"error: the adapter was loaded in a new process to compare its logits:\n{check.stderr.strip()}",
            file=sys.stderr,
        )
        return 1
    print(f"adapter loaded in a new process: {check.stdout.strip()}")
    seconds = round(time.perf_counter() - started)
    write_results(
        args.output_dir / "results.json",
        seconds=seconds,
        options=options,
        config=config.to_dict(),
        samples=sizes,
        accuracy={"before": before, "after": after},
        router_weights=weights,
        trainable_parameters=trainable,
        parameters=total,
    )
    print(
        f"time: {seconds} s\n\nTo load the adapter:\n\n{loading_snippet(str(train_args.output_dir), config.to_dict())}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_arguments(argv)
    if args.verify:
        return verify(args.output_dir)
    try:
        return run(args, rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
