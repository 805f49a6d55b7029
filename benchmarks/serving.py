"""What serving costs in vLLM: the base model, a plain LoRA, a mixture and its export, in turns.

    python -m benchmarks.serving        needs vLLM (`make test-vllm`); writes benchmarks/results/serving.json

A Llama of SmolLM2-135M's shape with random weights, feed-forward linears adapted, float32, one thread. Four engines
in one process: without LoRAs, for plain LoRAs, and two for mixtures. Greedy decoding of all requests in one batch. The
times are the processor's, and a ratio compares calls of the same round, so that other programs matter little.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import export_lora

from .cases import FEED_FORWARD, SMOLLM2
from .environment import about
from .measure import quantiles
from .rows import RESULTS


TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM takes no smaller ones
ADAPTED = {"target_modules": list(FEED_FORWARD), "task_type": "CAUSAL_LM"}
EXPERTS, R = 6, 4
# engine -> rank of its slots; None for an engine without LoRAs
ENGINES = {"base": None, "lora": 32, "loramoe": 32, "retain": 64}
# name -> engine, adapter. Each has the parameters of six experts of rank 4; six more of retain's are null.
VARIANTS = {
    "base model": ("base", None),
    "LoRA": ("lora", "lora"),
    "LoRAMoE, exported": ("lora", "export"),
    "LoRAMoE": ("loramoe", "loramoe"),
    "LoRAMoE, retain": ("retain", "retain"),
}
COMPARED = "LoRA"
BATCHES = (1, 16)
PROMPT_TOKENS, NEW_TOKENS = 4, 17
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def save_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """The plain LoRA, the mixtures and an export, random."""
    torch.manual_seed(0)
    paths = {name: folder / name for name in ("lora", "loramoe", "export", "retain")}
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = get_peft_model(base, LoraConfig(r=EXPERTS * R, init_lora_weights=False, **ADAPTED))
    lora.save_pretrained(paths["lora"])
    mixture = get_peft_model(lora.unload(), LoRAMoEConfig(r=R, num_experts=EXPERTS, init_weights=False, **ADAPTED))
    mixture.save_pretrained(paths["loramoe"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the export's error is not what is measured here
        export_lora(mixture, paths["export"], show=False)
    retain = get_peft_model(mixture.unload(), LoRAMoEConfig.retain(r=R, init_weights=False, **ADAPTED))
    retain.save_pretrained(paths["retain"])
    return paths


def start_engines(model: Path) -> dict[str, Any]:
    """An engine of each kind, all in this process."""
    from vllm import LLM

    engines = {}
    for name, rank in ENGINES.items():
        slots = {} if rank is None else {"enable_lora": True, "max_loras": 2, "max_lora_rank": rank}
        engines[name] = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            max_model_len=128,
            max_num_seqs=max(BATCHES),
            skip_tokenizer_init=True,
            **slots,
        )
    return engines


class Generation:
    """Greedy answers to a batch of requests, timed.

    Args:
        engine: of `start_engines`.
        adapter: its folder; None for the base model.
        number: of the adapter, for the engine.
        batch: requests at once.
    """

    def __init__(self, engine: Any, adapter: Path | None, number: int, batch: int) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(1, TINY["vocab_size"], (batch, PROMPT_TOKENS), generator=generator).tolist()
        self.sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        self.lora = adapter and LoRARequest(adapter.name, number, str(adapter))
        self.engine = engine.llm_engine

    def __call__(self) -> dict[str, float]:
        """CPU seconds until every request has its first token, and of each step that gives all of them the next."""
        start = time.process_time()
        for i, prompt in enumerate(self.prompts):
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, self.sampling, lora_request=self.lora)
        if len(self.engine.step()) != len(self.prompts):
            raise RuntimeError("The engine did not read all prompts in its first step.")
        first = time.process_time()
        steps = 0
        while self.engine.has_unfinished_requests():
            self.engine.step()
            steps += 1
        end = time.process_time()
        return {"first_token": first - start, "next_token": (end - first) / steps}


def measure(engines: dict[str, Any], adapters: dict[str, Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: quantiles of the seconds, and of the ratios to the plain LoRA's of the same round."""
    generations = {
        name: Generation(engines[engine], adapter and adapters[adapter], number, batch)
        for number, (name, (engine, adapter)) in enumerate(VARIANTS.items(), 1)
    }
    for generation in generations.values():
        generation()
    measured = {name: {"first_token": [], "next_token": []} for name in VARIANTS}
    order, shuffle = list(VARIANTS), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            for quantity, seconds in generations[name]().items():
                measured[name][quantity].append(seconds)
    rows = []
    for name, quantities in measured.items():
        row = {"variant": name, "batch": batch, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
        for quantity, values in quantities.items():
            ratios = [mine / other for mine, other in zip(values, measured[COMPARED][quantity])]
            row[quantity] = {"seconds": _rounded(quantiles(values)), "ratio": _rounded(quantiles(ratios))}
            row[quantity]["rounds"] = _rounded(values)
        rows.append(row)
    return rows


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| batch | served | tokens per CPU second | next token / {COMPARED}'s | first token, ms | / {COMPARED}'s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, following = row["first_token"], row["next_token"]
        low, ratio, high = following["ratio"]
        lines.append(
            f"| {row['batch']} | {row['variant']} | {row['batch'] / following['seconds'][1]:.1f} "
            f"| {ratio:.2f} ({low:.2f}-{high:.2f}) | {1e3 * first['seconds'][1]:.0f} | {first['ratio'][1]:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the rows and print them as a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES, help="others stay in the file"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the code out")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args(arguments)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, shape = folder / "model", {**TINY, **HEADS} if options.smoke else SMOLLM2
        LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128)).save_pretrained(model)
        adapters = save_adapters(model, folder)
        engines = start_engines(model)
        for batch in options.batches:
            machine = {**about(torch.device("cpu"), options.smoke), "rounds": options.rounds, "note": options.note}
            machine["versions"]["vllm"] = importlib.import_module("vllm").__version__
            rows = measure(engines, adapters, batch, options.rounds)
            results[str(batch)] = {"about": {**machine, "load_at_end": os.getloadavg()[0]}, "rows": rows}
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table([row for batch in sorted(results, key=int) for row in results[batch]["rows"]]))


if __name__ == "__main__":
    main()
