"""What anchors cost: the time of a training step with them, divided by that without.

    python benchmarks/anchors.py benchmarks/results/anchors.json

A Llama of SmolLM2-135M's shape with random weights, feed-forward linears adapted as `LoRAMoEConfig.retain` does, one
thread, float32. Micro-batches with and without anchors take turns; the time is that of the processor, so that other
programs matter little.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import LoRAMoETrainerMixin


SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
ROWS, ROUNDS = 20, 3
# tokens of a sample, tokens of an anchor
CASES = {"prose": (32, 32), "chats": (64, 56)}


class AnchoredTrainer(LoRAMoETrainerMixin, Trainer):
    """The trainer that is measured."""


def build_trainer(model: torch.nn.Module, folder: str, anchor_length: int | None) -> AnchoredTrainer:
    """A trainer of the model, with anchors of that many tokens, or without any."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    anchors = (
        [" ".join(f"w{(i * 7 + k) % 999 + 1}" for k in range(anchor_length)) for i in range(50)]
        if anchor_length
        else None
    )
    args = TrainingArguments(folder, per_device_train_batch_size=ROWS, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_dict({"input_ids": [[1]]})
    return AnchoredTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, anchors=anchors)


def seconds(trainer: AnchoredTrainer, batch: dict[str, torch.Tensor]) -> float:
    """Processor time of the forward and backward pass of one micro-batch."""
    trainer.model.zero_grad()
    start = time.process_time()
    trainer.training_step(trainer.model, dict(batch))
    return time.process_time() - start


def measure(model: torch.nn.Module, length: int, anchor_length: int) -> dict[str, float]:
    """Median times of a case, in seconds, and the median of the ratios of neighbours."""
    ids = torch.randint(1, 1000, (ROWS, length))
    batch = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        plain, anchored = (build_trainer(model, folder, tokens) for tokens in (None, anchor_length))
        for trainer in (plain, anchored):
            trainer.current_gradient_accumulation_steps = 1
            seconds(trainer, {**batch, "task_types": torch.ones(ROWS, dtype=torch.int64)})
        times = [
            (seconds(plain, {**batch, "task_types": torch.ones(ROWS, dtype=torch.int64)}), seconds(anchored, batch))
            for _ in range(ROUNDS)
        ]
    return {
        "samples": ROWS,
        "sample_tokens": length,
        "anchors": round(ROWS / 10),
        "anchor_tokens": anchor_length,
        "without_s": round(statistics.median(t[0] for t in times), 3),
        "with_s": round(statistics.median(t[1] for t in times), 3),
        "ratio": round(statistics.median(t[1] / t[0] for t in times), 3),
    }


def main(output: Path) -> None:
    """Measure all cases and write them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SMOLLM2)), LoRAMoEConfig.retain(r=4, task_type="CAUSAL_LM"))
    rows = {name: measure(model, *lengths) for name, lengths in CASES.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"device": "CPU, 1 thread", "dtype": "float32", "rounds": ROUNDS, **versions, "cases": rows}
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
