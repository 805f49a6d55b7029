"""What serving costs in vLLM: the base model, a plain LoRA, a mixture and its export, in turns.

    python -m benchmarks.serving        needs vLLM (`make test-vllm`); writes benchmarks/results/serving.json

A Llama of SmolLM2-135M's shape with random weights, feed-forward linears adapted, float32, one thread. Three engines
in one process: without LoRAs, for plain LoRAs, for mixtures. Greedy decoding of all requests in one batch. The times
are the processor's, and a ratio compares calls of the same round, so that other programs matter little.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import export_lora

from .__main__ import RESULTS, about
from .cases import FEED_FORWARD, SMOLLM2
from .measure import Timer, interleave, quantiles


TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM takes no smaller ones
ADAPTED = {"target_modules": list(FEED_FORWARD), "task_type": "CAUSAL_LM"}
EXPERTS, R = 6, 4
# engine -> rank of its slots; None for an engine without LoRAs
ENGINES = {"base": None, "lora": 32, "loramoe": 32}
# name -> engine, adapter. A plain LoRA has as many parameters as the experts.
VARIANTS = {
    "base model": ("base", None),
    "LoRA": ("lora", "lora"),
    "LoRAMoE, exported": ("lora", "export"),
    "LoRAMoE": ("loramoe", "loramoe"),
}
COMPARED = "LoRA"
BATCHES = (1, 16)
PROMPT_TOKENS, NEW_TOKENS = 16, 17
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def save_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """The plain LoRA, the mixture and its export, random."""
    torch.manual_seed(0)
    paths = {name: folder / name for name in ("lora", "loramoe", "export")}
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = get_peft_model(base, LoraConfig(r=EXPERTS * R, init_lora_weights=False, **ADAPTED))
    lora.save_pretrained(paths["lora"])
    mixture = get_peft_model(lora.unload(), LoRAMoEConfig(r=R, num_experts=EXPERTS, init_weights=False, **ADAPTED))
    mixture.save_pretrained(paths["loramoe"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the export's error is not what is measured here
        export_lora(mixture, paths["export"], show=False)
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
            max_model_len=128,
            max_num_seqs=max(BATCHES),
            skip_tokenizer_init=True,
            **slots,
        )
    return engines


def generation(engine: Any, adapter: Path | None, number: int, batch: int, tokens: int) -> Callable[[], None]:
    """A call that generates `tokens` tokens for each of `batch` requests."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, TINY["vocab_size"], (batch, PROMPT_TOKENS), generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    request = adapter and LoRARequest(adapter.name, number, str(adapter))
    return lambda: engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)


def measure(engines: dict[str, Any], adapters: dict[str, Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: quantiles of the seconds, and of the ratios to the plain LoRA's of the same round."""
    calls = {}
    for number, (name, (engine, adapter)) in enumerate(VARIANTS.items(), 1):
        path = adapter and adapters[adapter]
        calls[name, 1] = generation(engines[engine], path, number, batch, 1)
        calls[name, NEW_TOKENS] = generation(engines[engine], path, number, batch, NEW_TOKENS)
    for call in calls.values():
        call()
    times = interleave(calls, Timer(torch.device("cpu")), rounds, float("inf"))
    seconds = {}
    for name in VARIANTS:
        first, whole = times[name, 1].cpu, times[name, NEW_TOKENS].cpu
        seconds[name] = {
            "first_token": first,
            "next_token": [(b - a) / (NEW_TOKENS - 1) for a, b in zip(first, whole)],
            "request": whole,
        }
    rows = []
    for name, measured in seconds.items():
        row = {"variant": name, "batch": batch, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
        for quantity, values in measured.items():
            ratios = [mine / other for mine, other in zip(values, seconds[COMPARED][quantity])]
            row[quantity] = {"seconds": _rounded(quantiles(values)), "ratio": _rounded(quantiles(ratios))}
        row["tokens_per_second"] = round(batch * NEW_TOKENS / quantiles(measured["request"])[1], 1)
        rows.append(row)
    return rows


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| batch | served | tokens per second | first token, ms | next token, ms | next token / {COMPARED}'s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, following = (1e3 * row[name]["seconds"][1] for name in ("first_token", "next_token"))
        low, ratio, high = row["next_token"]["ratio"]
        lines.append(
            f"| {row['batch']} | {row['variant']} | {row['tokens_per_second']:.0f} | {first:.0f} | {following:.1f} "
            f"| {ratio:.2f} ({low:.2f}-{high:.2f}) |"
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
    rows = []
    if options.output.exists():
        rows = [row for row in json.loads(options.output.read_text())["rows"] if row["batch"] not in options.batches]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, shape = folder / "model", {**TINY, **HEADS} if options.smoke else SMOLLM2
        LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128)).save_pretrained(model)
        adapters = save_adapters(model, folder)
        machine = {**about(torch.device("cpu"), options.smoke), "rounds": options.rounds, "note": options.note}
        engines = start_engines(model)
        machine["versions"]["vllm"] = importlib.import_module("vllm").__version__
        for batch in options.batches:
            rows += measure(engines, adapters, batch, options.rounds)
    rows.sort(key=lambda row: row["batch"])
    machine["load_at_end"] = os.getloadavg()[0]
    options.output.write_text(json.dumps({"about": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
