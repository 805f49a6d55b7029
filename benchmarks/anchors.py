"""What anchors cost: training steps with LoRA and LoRAMoE, without and with anchors, in turns.

    python -m benchmarks.anchors        about eight minutes on one core; writes benchmarks/results/anchors.json

A Llama of SmolLM2-135M's shape with random weights, feed-forward linears adapted, float32, one thread. A step is
forward and backward pass of one micro-batch in transformers' Trainer and a step of AdamW. Samples are 26 tokens long,
as in research/retention, or twice as long; anchors 34, as its own are on average. The times are the processor's, and a
ratio compares steps of the same round, so that other programs matter little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import LoRAMoETrainerMixin

from .cases import FEED_FORWARD, SMOLLM2, share
from .environment import about
from .measure import Timer, interleave
from .rows import RESULTS


TINY = {**SMOLLM2, "vocab_size": 1000, "hidden_size": 18, "intermediate_size": 24, "num_hidden_layers": 2}
ADAPTED = {"target_modules": list(FEED_FORWARD), "task_type": "CAUSAL_LM"}
CONFIGS = {"lora": LoraConfig(r=30, **ADAPTED), "loramoe": LoRAMoEConfig.retain(r=4, **ADAPTED)}
# name -> configuration, weight of the divergence on the anchors; None for no anchors
VARIANTS = {
    "LoRA": ("lora", None),
    "LoRA, anchors": ("lora", 0.3),
    "LoRAMoE": ("loramoe", None),
    "LoRAMoE, anchors in the term only": ("loramoe", 0.0),
    "LoRAMoE, anchors": ("loramoe", 0.3),
}
BATCHES = {"20x26": (20, 26), "20x52": (20, 52)}  # samples, tokens of each
ANCHOR_TOKENS = 34
COMPARED = "LoRA"


class AnchoredTrainer(LoRAMoETrainerMixin, Trainer):
    """The trainer that is measured."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words w0 to w999."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def training_step(base: nn.Module, variant: str, samples: int, tokens: int, folder: str) -> Callable[[], None]:
    """A training step of a variant on a batch of its own. Without anchors, half of the samples are of each type."""
    method, weight = VARIANTS[variant]
    torch.manual_seed(0)
    model = get_peft_model(share(base), CONFIGS[method])
    args = TrainingArguments(folder, per_device_train_batch_size=samples, report_to="none", use_cpu=True, bf16=False)
    anchors = {}
    if weight is not None:
        texts = [" ".join(f"w{(i * 7 + k) % 999 + 1}" for k in range(ANCHOR_TOKENS)) for i in range(50)]
        anchors = {"anchors": texts, "anchor_kl_weight": weight, "processing_class": tokenizer()}
    rows = Dataset.from_dict({"input_ids": [[1]]})
    trainer = AnchoredTrainer(model=model, args=args, train_dataset=rows, **anchors)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()
    ids = torch.randint(1, 1000, (samples, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if method == "loramoe" and weight is None:
        batch["task_types"] = torch.arange(samples) % 2

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(base: nn.Module, samples: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: median seconds, and the median of the ratios to LoRA's step of the same round."""
    timer = Timer(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: training_step(base, name, samples, tokens, folder) for name in VARIANTS}
        for step in steps.values():
            step()
        times = interleave(steps, timer, rounds, float("inf"))
    rows = []
    for name, (_, weight) in VARIANTS.items():
        anchors = 0 if weight is None else max(1, round(samples / 10))
        shape = {"samples": samples, "tokens": tokens, "anchors": anchors, "anchor_tokens": ANCHOR_TOKENS}
        ratios = [mine / other for mine, other in zip(times[name].cpu, times[COMPARED].cpu)]
        measured = {
            "cpu_seconds": round(statistics.median(times[name].cpu), 4),
            "ratio": round(statistics.median(ratios), 3),
            "rounds": [round(seconds, 4) for seconds in times[name].cpu],
        }
        rows.append({"variant": name, **shape, **measured})
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """Ratios as a Markdown table, a column for each batch."""
    sizes = [BATCHES[batch] for batch in results]
    lines = [f"| CPU time of a step / {COMPARED}'s |" + "".join(f" {n} samples of {t} tokens |" for n, t in sizes)]
    lines.append("|---" * (len(results) + 1) + "|")
    for i, name in enumerate(VARIANTS):
        lines.append(f"| {name} |" + "".join(f" {result['rows'][i]['ratio']:.2f} |" for result in results.values()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure batches, write their rows and print a table of all that the file has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anchors", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES), help="others stay in the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the code out")
    parser.add_argument("--output", type=Path, default=RESULTS / "anchors.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    base = LlamaForCausalLM(LlamaConfig(**(TINY if options.smoke else SMOLLM2)))
    for batch in options.batches:
        machine = {**about(torch.device("cpu"), options.smoke), "rounds": options.rounds, "note": options.note}
        rows = measure(base, *BATCHES[batch], options.rounds)
        results[batch] = {"about": {**machine, "load_at_end": os.getloadavg()[0]}, "rows": rows}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
