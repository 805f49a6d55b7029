"""Compare vLLM's answers with PEFT's on a real model, and write docs/results/serving-float32.md or -bfloat16.md.

make serving MODEL=build/retention/model      # SmolLM2-135M-Instruct, see research/retention/base_model.py
"""

import gc
import platform
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers


RESULTS = Path(__file__).parent / "results"
TEXTS = ["The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return"]


def heading(dtype: str) -> list[str]:
    """What was run, with which versions."""
    import vllm

    return [
        f"# vLLM's answers against PEFT's, in {dtype}",
        "",
        f"Written by `make serving`: random adapters on SmolLM2-135M-Instruct, {len(TEXTS)} prompts, "
        f"{cases.NEW_TOKENS} greedy tokens each, and the log-probabilities of the {cases.LOGPROBS} likeliest at "
        "each.",
        f"vLLM {vllm.__version__}, PEFT {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {platform.machine()} CPU.",
        "",
    ]


def float32(model: Path, prompts: list[list[int]], folder: Path) -> list[str]:
    """Every option, a mixture exported as a plain LoRA, and batches with requests of the base model."""
    engine, ids, lines = cases.start_vllm(model), {}, []

    def row(name: str, adapter: Path | None) -> None:
        reference = cases.load(model) if adapter is None else cases.with_adapter(model, adapter)
        answers = cases.ask_vllm(engine, [adapter] * len(prompts), prompts, ids)
        wrong, largest = cases.differences(reference, answers, prompts)
        routing = cases.effect_of_routing(reference, prompts[0])
        total = len(prompts) * cases.NEW_TOKENS
        lines.append(f"| {name} | {total - wrong} of {total} | {largest:.1e} | {routing:.2g} |")
        print(lines[-1], flush=True)

    row("none", None)
    for name, options in cases.OPTIONS.items():
        row(name, cases.save_adapter(model, folder / name.replace(" ", "-"), options))
    mixture = cases.save_adapter(model, folder / "mixture", {"num_experts": 6})
    lora = cases.export(model, mixture, folder / "lora")
    row("a mixture exported as a plain LoRA of rank 24", lora)

    base = cases.load(model)
    beside = cases.ask_vllm(engine, [mixture, None, lora], prompts, ids)[1:2]
    stop(engine)
    engine = cases.start_vllm(model, max_loras=1)  # so that the LoRA is in the last slot
    alone = cases.ask_vllm(engine, [lora, None, lora], prompts, ids)[1:2]
    stop(engine)
    beside, alone = (cases.differences(base, answers, prompts[1:2])[1] for answers in (beside, alone))
    return [
        "| adapter | tokens that are PEFT's | largest difference of a log-probability | effect of the routing |",
        "|---|---|---|---|",
        *lines,
        "",
        "Effect of the routing: how much log-probabilities change if every router weighs all experts the same.",
        "",
        f"A request of the base model differs from transformers by {beside:.1e} in a batch with a mixture and a plain "
        f"LoRA, and by {alone:.1e} in a batch with a plain LoRA only, where the plugin changes nothing "
        "([upstream.md](../upstream.md)).",
    ]


def bfloat16(model: Path, prompts: list[list[int]], folder: Path) -> list[str]:
    """Means over the log-probabilities: both sides round, each in an order of its own."""
    engine, ids, lines = cases.start_vllm(model, dtype="bfloat16"), {}, []
    for name in ("none", "default targets", "top_k", "retain"):
        adapter = None
        if name != "none":
            adapter = cases.save_adapter(model, folder / name.replace(" ", "-"), cases.OPTIONS[name])
        narrow, exact = (
            cases.load(model, dtype) if adapter is None else cases.with_adapter(model, adapter, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
        answers = cases.ask_vllm(engine, [adapter] * len(prompts), prompts, ids)
        differences = [
            cases.mean_difference(answers, prompts, exact),
            cases.mean_difference(answers, prompts, exact, narrow),
            cases.mean_difference(answers, prompts, narrow),
        ]
        lines.append(f"| {name} | {' | '.join(f'{difference:.1e}' for difference in differences)} |")
        print(lines[-1], flush=True)
    return [
        "| adapter | vLLM in bfloat16, PEFT in float32 | PEFT in bfloat16 and in float32 | both in bfloat16 |",
        "|---|---|---|---|",
        *lines,
        "",
        "Mean differences of the log-probabilities.",
    ]


def stop(engine: object) -> None:
    """Free what an engine holds, so that another can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


SECTIONS = {"float32": float32, "bfloat16": bfloat16}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in SECTIONS:
        raise SystemExit(f"usage: python docs/make_serving.py MODEL {'|'.join(SECTIONS)}")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import serving_cases as cases

    source, dtype = Path(sys.argv[1]).resolve(), sys.argv[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as temporary:
        report = SECTIONS[dtype](source, [tokenizer(text)["input_ids"] for text in TEXTS], Path(temporary))
    path = RESULTS / f"serving-{dtype}.md"
    path.write_text("\n".join(heading(dtype) + report) + "\n")
    print(f"wrote {path}")
