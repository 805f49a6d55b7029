"""Mixture-of-experts backbones: a mixture beside each sparse block against PEFT's LoRA of the routed experts.

    python -m benchmarks.moe        about four minutes on one core; writes benchmarks/results/moe.json

A Qwen3-MoE with random weights, float32, one thread, and routed experts of different numbers. PEFT's LoRA adapts their
3-D parameters (`target_parameters`). A training step is forward and backward pass and a step of AdamW; decoding is
greedy at batch 1. The times are the processor's, and a ratio compares calls of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_loramoe import LoRAMoEConfig

from .cases import share
from .environment import about
from .measure import Timer, interleave, peak_bytes, saved_bytes
from .rows import RESULTS


SHAPE = dict(
    vocab_size=8192,
    hidden_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts_per_tok=4,
)
TINY = {**SHAPE, "vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
EXPERTS = (8, 64)
ROWS, WIDTH, NEW_TOKENS = 4, 128, 16
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "LoRA of the routed experts, rank 8": LoraConfig(r=8, target_modules=[], target_parameters=PARAMETERS),
    "LoRA of the routed experts, rank 1": LoraConfig(r=1, target_modules=[], target_parameters=PARAMETERS),
    "LoRAMoE beside the block, 6 null and 6 LoRA experts of rank 4": LoRAMoEConfig.retain(r=4),
}
COMPARED = next(iter(CONFIGS))


def measure(base: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """A row for each method: parameters, CPU seconds of a training step and of decoding, their ratios, memory."""
    torch.manual_seed(0)
    device, timer = torch.device("cpu"), Timer(torch.device("cpu"))
    ids = torch.randint(1, base.config.vocab_size, (ROWS, WIDTH))
    models = {name: get_peft_model(share(base), config) for name, config in CONFIGS.items()}
    training, decoding, memory = {}, {}, {}
    for name, model in models.items():
        inputs = {"input_ids": ids, "labels": ids}
        if isinstance(CONFIGS[name], LoRAMoEConfig):
            inputs["task_types"] = torch.arange(ROWS) % 2
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def train(model=model, inputs=inputs, optimizer=optimizer) -> None:
            model.train()(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def decode(model=model) -> None:
            model.eval().generate(ids[:1, :8], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)

        train(), decode()
        own = [*model.parameters(), *model.buffers()]
        saved = saved_bytes(lambda model=model, inputs=inputs: model.train()(**inputs).loss, own)
        memory[name] = {"peak_bytes": peak_bytes(train, device), "saved_bytes": saved}
        training[name], decoding[name] = train, decode
    times = {"train": interleave(training, timer, rounds, 1.0), "decode": interleave(decoding, timer, rounds, 1.0)}
    rows = []
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = {"method": name, "routed_experts": base.config.num_experts, "parameters": trained, **memory[name]}
        for kind, of_method in times.items():
            pairs = zip(of_method[name].cpu, of_method[COMPARED].cpu)
            row[f"{kind}_cpu_seconds"] = round(statistics.median(of_method[name].cpu), 4)
            row[f"{kind}_ratio"] = round(statistics.median(mine / other for mine, other in pairs), 3)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| routed experts | method | parameters | training step | its peak memory | decoding |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        parameters, peak = row["parameters"] / 1e6, row["peak_bytes"] / 2**20
        lines.append(
            f"| {row['routed_experts']} | {row['method']} | {parameters:.2f} M | {row['train_ratio']:.2f} | "
            f"{peak:.0f} MiB | {row['decode_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the rows and print them as a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the code out")
    parser.add_argument("--output", type=Path, default=RESULTS / "moe.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for experts in EXPERTS:
        config = Qwen3MoeConfig(**(TINY if options.smoke else SHAPE), num_experts=experts, pad_token_id=0)
        rows += measure(Qwen3MoeForCausalLM(config), options.rounds)
    machine = {**about(torch.device("cpu"), options.smoke), "rounds": options.rounds, "note": options.note}
    results = {"about": {**machine, "load_at_end": os.getloadavg()[0]}, "rows": rows}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
