"""Ask a vLLM server 200 times at once, of four adapters and the base model, and write docs/results/server.md.

make serving MODEL=build/retention/model      # SmolLM2-135M-Instruct, see research/retention/base_model.py
"""

import platform
import random
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import peft
import torch
import transformers


RESULTS = Path(__file__).parent / "results" / "server.md"
THREADS, BATCH, SLOTS, NEW_TOKENS = 64, 16, 2, 6
TEXTS = [f"{i + 3} times {2 * i + 5} is" for i in range(40)]
MIXTURES = {
    "default targets": {"r": 2, "lora_alpha": 16},
    "retain": {"preset": "retain", "r": 2, "num_experts": 6},
    "top_k": {"r": 2, "lora_alpha": 16, "top_k": 2},
}
MAX_LORA_RANK = 16
EXPORTED = "plain LoRA"


def save_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Three random mixtures, and another one exported as a plain LoRA. All adapt the feed-forward linears."""
    adapters = {name: cases.save_adapter(model, folder / name, options) for name, options in MIXTURES.items()}
    mixture = cases.save_adapter(model, folder / "mixture", {"r": 2, "lora_alpha": 16}, seed=1)
    return {**adapters, EXPORTED: cases.export(model, mixture, folder / EXPORTED)}


def ask(
    model: Path, adapters: dict[str, Path], prompts: list[list[int]], folder: Path
) -> dict[tuple[str, int], list[int]]:
    """The server's answer to each prompt under each name, all asked at once in random order."""
    questions = [(name, i) for name in (*adapters, serving_server.BASE) for i in range(len(prompts))]
    random.Random(0).shuffle(questions)
    options = ("--max-loras", str(SLOTS), "--max-cpu-loras", str(len(adapters)), "--max-lora-rank", str(MAX_LORA_RANK))
    options += ("--max-num-seqs", str(BATCH))
    log = folder / "log"
    with serving_server.serve(model, adapters, log, *options) as server, ThreadPoolExecutor(THREADS) as threads:
        answers = list(
            threads.map(lambda question: server.tokens(question[0], prompts[question[1]], NEW_TOKENS), questions)
        )
    return dict(zip(questions, answers))


def report(model: Path, folder: Path) -> list[str]:
    """The lines of the report."""
    import vllm

    adapters = save_adapters(model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = ask(model, adapters, prompts, folder)
    right = Counter()
    for name in (*adapters, serving_server.BASE):
        reference = cases.with_adapter(model, adapters[name]) if name in adapters else cases.load(model)
        for i, prompt in enumerate(prompts):
            right[name] += serving_server.is_greedy(reference, prompt, answers[name, i])
        print(f"{name}: {right[name]} of {len(prompts)}", flush=True)
    total = len(prompts)
    pairs = [(first, second, i) for first, second in combinations(right, 2) for i in range(total)]
    different = sum(answers[first, i] != answers[second, i] for first, second, i in pairs)
    return [
        "# 200 requests at once",
        "",
        f"Written by `make serving`: {len(answers)} requests over HTTP by {THREADS} threads in random order, "
        f"{NEW_TOKENS} greedy tokens each, to one server with {SLOTS} slots for {len(adapters)} adapters and "
        f"batches of up to {BATCH}.",
        "Random adapters on SmolLM2-135M-Instruct in float32.",
        f"vLLM {vllm.__version__}, PEFT {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {platform.machine()} CPU.",
        "",
        "| asked | answers that are PEFT's |",
        "|---|---|",
        *(f"| {name} | {count} of {total} |" for name, count in right.items()),
        f"| all | {right.total()} of {len(answers)} |",
        "",
        f"Two names that were asked the same gave different answers in {different} of {len(pairs)} cases; an answer "
        "by the wrong adapter would be seen there.",
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/make_server.py MODEL")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import serving_cases as cases
    import serving_server

    with tempfile.TemporaryDirectory() as temporary:
        lines = report(Path(sys.argv[1]).resolve(), Path(temporary))
    RESULTS.write_text("\n".join(lines) + "\n")
    print(f"wrote {RESULTS}")
