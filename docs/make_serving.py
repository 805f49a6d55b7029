"""Compare vLLM's answers with PEFT's on a real model, and write docs/results/serving.md.

make serving MODEL=build/retention/model      # SmolLM2-135M-Instruct; see research/retention/base_model.py
"""

import gc
import platform
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers


RESULTS = Path(__file__).parent / "results" / "serving.md"
TEXTS = ["The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return"]


def compare(model: Path, folder: Path) -> list[str]:
    """The lines of the report."""
    import vllm

    prompts = [transformers.AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in TEXTS]
    total = len(prompts) * cases.NEW_TOKENS
    lines = [
        "# vLLM's answers against PEFT's",
        "",
        "Written by `make serving`: random adapters on SmolLM2-135M-Instruct, "
        f"{len(prompts)} prompts, {cases.NEW_TOKENS} greedy tokens each, and the log-probabilities of the "
        f"{cases.LOGPROBS} likeliest tokens at each of them.",
        f"vLLM {vllm.__version__}, PEFT {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {platform.machine()} CPU.",
        "",
        "## float32",
        "",
        "| adapter | tokens that are PEFT's | largest difference of a log-probability | the same, if the routers were "
        "uniform |",
        "|---|---|---|---|",
    ]
    engine, ids = cases.start_vllm(model), {}

    def row(name: str, reference: torch.nn.Module, answers: list, routing: str = "-") -> None:
        wrong, largest = cases.differences(reference, answers, prompts)
        lines.append(f"| {name} | {total - wrong} of {total} | {largest:.1e} | {routing} |")
        print(lines[-1], flush=True)

    base = cases.load(model)
    row("none", base, cases.ask_vllm(engine, [None] * 3, prompts, ids))
    for name, options in cases.OPTIONS.items():
        adapter = cases.save_adapter(model, folder / name.replace(" ", "-"), options)
        adapted = cases.with_adapter(model, adapter)
        answers = cases.ask_vllm(engine, [adapter] * 3, prompts, ids)
        wrong, largest = cases.differences(adapted, answers, prompts)
        routing = cases.effect_of_routing(adapted, prompts[0])
        lines.append(f"| {name} | {total - wrong} of {total} | {largest:.1e} | {routing:.2f} |")
        print(lines[-1], flush=True)
    mixture = cases.save_adapter(model, folder / "to-export", {"num_experts": 6})
    lora = cases.export(model, mixture, folder / "exported")
    answers = cases.ask_vllm(engine, [lora] * 3, prompts, ids)
    row("a mixture exported as a plain LoRA of rank 24", cases.with_adapter(model, lora), answers)
    answers = cases.ask_vllm(engine, [mixture, None, lora], prompts, ids)
    _, beside = cases.differences(base, answers[1:2], prompts[1:2])
    stop(engine)
    engine = cases.start_vllm(model)
    answers = cases.ask_vllm(engine, [lora, None, lora], prompts, ids)
    _, alone = cases.differences(base, answers[1:2], prompts[1:2])
    stop(engine)
    lines += [
        "",
        f"A request of the base model differs from transformers by {beside:.1e} in a batch with a mixture and a plain "
        f"LoRA, and by {alone:.1e} in a batch with a plain LoRA only, where the plugin changes nothing "
        "(docs/upstream.md).",
        "",
        "## bfloat16",
        "",
        "Both sides in bfloat16, so that each rounds in an order of its own; PEFT in float32 is the yardstick.",
        "",
        "| adapter | vLLM from PEFT | vLLM from float32 | PEFT from float32 |",
        "|---|---|---|---|",
    ]
    engine = cases.start_vllm(model, dtype="bfloat16")
    for name in ("none", "default targets", "top_k", "retain"):
        adapter = None if name == "none" else folder / name.replace(" ", "-")
        references = [
            cases.load(model, dtype) if adapter is None else cases.with_adapter(model, adapter, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        answers = cases.ask_vllm(engine, [adapter] * 3, prompts, ids)
        narrow, exact = (cases.mean_difference(answers, prompts, reference) for reference in references)
        own = cases.mean_difference(answers, prompts, *references)
        lines.append(f"| {name} | {narrow:.1e} | {exact:.1e} | {own:.1e} |")
        print(lines[-1], flush=True)
    lines += ["", "Means over the log-probabilities above."]
    return lines


def stop(engine: object) -> None:
    """Free what an engine holds, so that another can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/make_serving.py MODEL, the folder of SmolLM2-135M-Instruct")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import serving_cases as cases

    with tempfile.TemporaryDirectory() as folder:
        report = compare(Path(sys.argv[1]).resolve(), Path(folder))
    RESULTS.write_text("\n".join(report) + "\n")
    print(f"wrote {RESULTS}")
