"""The whole method on a real model, on a CPU: SmolLM2-135M-Instruct learns tasks that it cannot do.

    python -m examples.demo
    python -m examples.demo --model Qwen/Qwen3-0.6B

The model writes anchors, short texts that stand for what it knows. LoRAMoE with null experts is fine-tuned on the
tasks and the anchors, in 4 bits, as `peft-loramoe train` does it; then LoRA is, on the tasks alone. A table shows what
the base model and both adapters answer. Last, the LoRAMoE adapter is loaded in a new process, whose logits must be the
same bit by bit. Options that are not listed here are those of `peft-loramoe train`.
"""

# ruff: noqa: E402
import logging


# Said when it is imported, on Intel CPUs with AVX512-BF16; nothing to act on.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import peft_loramoe
from peft_loramoe.analysis import group_weights, plot_group_weights, router_statistics
from peft_loramoe.card import loading_snippet
from peft_loramoe.cli import train_run
from peft_loramoe.cli.arguments import build_parser
from peft_loramoe.cli.base_model import BaseModel
from peft_loramoe.modes import evaluation_mode
from peft_loramoe.training import sample_anchors
from peft_loramoe.training.sft import LoRAMoESFTTrainer
from research.retention import base_model, knowledge, tasks


TASKS = ("date", "json", "sort")
FACTS = [  # the base model knows them
    ("What is the chemical symbol for gold?", "Au"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What color is the sky?", "blue"),
]
SCORED, TEXTS, TEXT_WORDS, ANSWER_TOKENS = 39, 20, 32, 16
TRAIN_OPTIONS = [
    *("--load-in-4bit", "--dtype", "float32", "--no-bf16", "--no-gradient-checkpointing"),
    *("--epochs", "1", "--batch-size", "8", "--gradient-accumulation-steps", "1", "--learning-rate", "1e-3"),
    *("--warmup-steps", "2", "--max-length", "96"),
    *("--logging-steps", "0.25", "--save-steps", "0", "--eval-steps", "0"),
]


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The demo's options, and those for `train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="Hub id or folder. Default: SmolLM2-135M-Instruct from the package index.")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("loramoe-demo"), help="For everything. Default: %(default)s."
    )
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument("--samples", type=int, default=240, help="Of the tasks, to learn from. Default: %(default)s.")
    parser.add_argument("--anchors", type=int, default=36, help="Default: %(default)s.")
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)  # what the script calls itself with
    return parser.parse_known_args(argv)


# --- model, data and anchors


def prepare(args: argparse.Namespace) -> list[str]:
    """Write the data, and the options of `train` that name them and the model."""
    texts = [" ".join(row["text"].split()[:TEXT_WORDS]) for row in knowledge.read("texts.jsonl")]
    files = {
        "train": [record(sample) for sample in tasks.samples(args.samples, args.seed, scored=False, names=TASKS)],
        "task": [record(sample) for sample in scored_samples()],
        "text": [{"text": text} for text in texts[:: math.ceil(len(texts) / TEXTS)]],
    }
    paths = {name: args.output_dir / f"{name}.jsonl" for name in files}
    for name, records in files.items():
        paths[name].write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    options = ["--train-file", paths["train"], "--eval-file", paths["task"], paths["text"]]
    options += ["--anchors", args.output_dir / "anchors.jsonl", "--output-dir", args.output_dir / "adapter"]
    if args.model is None:
        template = args.output_dir / "chat.jinja"
        template.write_text(base_model.CHAT_TEMPLATE, encoding="utf-8")
        options += ["--model", base_model.prepare(base_model.ROOT / "model"), "--chat-template", template]
    else:
        options += ["--model", args.model]
    return [*map(str, options), *TRAIN_OPTIONS, "--seed", str(args.seed)]


def scored_samples() -> list[tasks.Sample]:
    return tasks.samples(SCORED, "scored", scored=True, names=TASKS)


def record(sample: tasks.Sample) -> dict[str, str]:
    return {"instruction": sample.prompt, "output": sample.answer}


def write_anchors(number: int, seed: int, train_args: argparse.Namespace) -> None:
    """Let the model write its anchors, a quarter of them chats; without 4 bits this is faster."""
    base = replace(train_run.base_model(train_args), load_in_4bit=False)
    tokenizer = train_run.load_tokenizer(base, train_args.chat_template)
    chat = 0.25 if tokenizer.chat_template else 0.0
    train_args.anchors.unlink(missing_ok=True)  # of an earlier run
    sample_anchors(base.load(), tokenizer, number, max_tokens=24, chat=chat, seed=seed, path=train_args.anchors)


# --- fine-tuning with LoRA


def lora_trainer(base: nn.Module, like: LoRAMoESFTTrainer) -> trl.SFTTrainer:
    """A trainer for LoRA with as many parameters, the same start, data and settings, on the bare base model."""
    config = like.model.peft_config["default"]
    lora = LoraConfig(r=30, lora_alpha=40, target_modules=config.target_modules, task_type="CAUSAL_LM")
    torch.manual_seed(like.args.seed)
    trainer = trl.SFTTrainer(
        model=get_peft_model(base, lora),
        args=replace(like.args, output_dir=f"{like.args.output_dir}-lora"),
        train_dataset=like.train_dataset.remove_columns("task_type"),
        processing_class=like.processing_class,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # SFTTrainer makes the adapter of a 4-bit model bfloat16
            parameter.data = parameter.data.float()
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.add_callback(train_run.ProgressLines(show_bar=True))
    return trainer


# --- measurements


@torch.no_grad()
def measure(
    model: nn.Module, name: str, batches: dict[str, list], tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> dict[str, Any]:
    """Answers to the prompts, share of task items solved, and loss on the texts in nats per token.

    An item is solved if greedy decoding would give its answer token for token, which one forward pass tells.
    """
    with evaluation_mode(model), tqdm(total=sum(map(len, batches.values())) + 1, desc=f"asking {name}") as bar:
        solved, losses = [], []
        for kind, found in batches.items():
            for batch in found:
                labels, logits = batch["labels"][:, 1:], logits_of(model, batch)[:, :-1]
                learned = labels != -100
                if kind == "task":
                    solved += ((logits.argmax(-1) == labels) | ~learned).all(-1).tolist()
                else:
                    losses += nn.functional.cross_entropy(logits[learned], labels[learned], reduction="none").tolist()
                bar.update()
        answers = answer(model, tokenizer, prompts)
        bar.update()
    return {"answers": answers, "solved": sum(solved) / len(solved), "loss": sum(losses) / len(losses)}


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The beginning of the model's answer to each prompt, by greedy decoding."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, padding=True, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    output = model.generate(
        **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def verify(output_dir: Path) -> int:
    """In a new process: load the saved adapter and compare its logits with the saved ones; the exit code."""
    saved = torch.load(output_dir / "verify.pt")
    model = train_run.load_model(BaseModel(**saved["loading"]))
    model = PeftModel.from_pretrained(model, output_dir / "adapter").eval().to(saved["logits"].device)
    logits = logits_of(model, saved["batch"])
    if torch.equal(logits, saved["logits"]):
        print("same logits, bit by bit")
        return 0
    print(f"logits differ by up to {(logits - saved['logits']).abs().max().item():.3g}", file=sys.stderr)
    return 1


# --- report


def plot_routers(model: nn.Module, batches: dict[str, list], path: Path) -> dict[str, float]:
    """Plot the router weights on ordinary text, of type 0, and on the task, of type 1; returns those of group 0."""
    typed = [
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "task_types": [kind] * len(batch["labels"]),
        }
        for kind, name in enumerate(("text", "task"))
        for batch in batches[name]
    ]
    statistics = router_statistics(model, typed)
    plot_group_weights(statistics, path)
    found = {(row["task_type"], row["group"]): row["weight"] for row in group_weights(statistics.experts)}
    return {"ordinary text": found[0, 0], "the tasks": found[1, 0]}


def results_table(questions: list[tuple[str, str]], results: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "", *results, title="What the models answer (first column: prompt and right answer)", title_justify="left"
    )
    for i, (question, right) in enumerate(questions):
        answers = (found["answers"][i].strip() or "(nothing)" for found in results.values())
        table.add_row(
            f"{question}\n[dim]{right}[/dim]", *answers, end_section=i in (len(TASKS) - 1, len(questions) - 1)
        )
    table.add_row("tasks: new items solved", *(f"{found['solved']:.0%}" for found in results.values()))
    table.add_row("loss on ordinary text", *(f"{found['loss']:.3f}" for found in results.values()))
    return table


def write_results(path: Path, **results: Any) -> None:
    modules = (peft_loramoe, peft, transformers, trl, torch)
    versions = {module.__name__: str(module.__version__) for module in modules}
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "versions": versions, **results}, indent=1, default=sorted)
    path.write_text(text + "\n", encoding="utf-8")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    started = time.perf_counter()
    disable_progress_bars()  # of datasets: those of steps that take no time
    # PEFT and TRL use the old names, which transformers 4 knows alone.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    options = [*prepare(args), *rest]
    train_args = build_parser().parse_args(["train", *options])
    print(f"The model writes {args.anchors} anchors.")
    write_anchors(args.anchors, args.seed, train_args)
    print(f"Fine-tuning as with\n\npeft-loramoe train {shlex.join(options)}\n")

    trainer, _ = train_run.build(train_args)
    batches = {name: list(trainer.get_eval_dataloader(name)) for name in ("task", "text")}
    of_each_task = {sample.task: (sample.prompt, sample.answer) for sample in scored_samples()}
    questions = [*of_each_task.values(), *FACTS]
    common = (batches, trainer.processing_class, [question for question, _ in questions])
    with trainer.model.disable_adapter():
        results = {"base model": measure(trainer.model, "the base model", *common)}
    trainer.train()
    trainer.save_model()
    moe = measure(trainer.model, "LoRAMoE", *common)
    config = trainer.model.peft_config["default"]
    weights = plot_routers(trainer.model, batches, args.output_dir / "router.png")
    with evaluation_mode(trainer.model), torch.no_grad():
        check = {"batch": batches["task"][0], "logits": logits_of(trainer.model, batches["task"][0])}
    torch.save({"loading": asdict(train_run.base_model(train_args)), **check}, args.output_dir / "verify.pt")

    lora = lora_trainer(trainer.model.unload(), trainer)
    lora.train()
    results |= {"LoRA": measure(lora.model, "LoRA", *common), "LoRAMoE": moe}

    print("Loading the LoRAMoE adapter in a new process.")
    command = [sys.executable, "-m", "examples.demo", "--verify", "--output-dir", str(args.output_dir)]
    verified = subprocess.run(command, capture_output=True, text=True)
    seconds = round(time.perf_counter() - started)
    write_results(
        args.output_dir / "results.json",
        seconds=seconds,
        options=options,
        config=config.to_dict(),
        results=results,
        null_weight=weights,
    )
    Console().print(results_table(questions, results))
    shares = " and ".join(f"{weight:.2f} on {name}" for name, weight in weights.items())
    print(f"Router weight of LoRAMoE's null experts: {shares}. By depth: {args.output_dir / 'router.png'}")
    if verified.returncode:
        print(f"error: the adapter in a new process: {verified.stderr.strip()}", file=sys.stderr)
        return 1
    print(f"The adapter loaded in a new process: {verified.stdout.strip()}. Time: {seconds} s. To load it:\n")
    print(loading_snippet(str(train_args.output_dir), config.to_dict()))
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
