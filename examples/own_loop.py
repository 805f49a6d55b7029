"""A training loop of your own: task types, learning rates, accumulation, and where the routers send the samples.

    python examples/own_loop.py --model Qwen/Qwen3-0.6B --train-file train.jsonl

Each line of the file has the task type 0 for what the model knows already and is to keep, 1 for what it is to learn:

    {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 0}
"""

import argparse
import itertools

import torch
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_loramoe import LoRAMoEConfig, balance_loss
from peft_loramoe.analysis import group_weights, router_statistics
from peft_loramoe.training import TaskTypeCollator, optimizer_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder of a causal language model.")
    parser.add_argument("--train-file", required=True, help="JSON lines with prompt, completion and task_type.")
    parser.add_argument("--batch-size", type=int, default=4, help="Samples of a forward pass.")
    parser.add_argument("--accumulation", type=int, default=4, help="Forward passes of an optimizer step.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = LoRAMoEConfig.retain(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model).to(device), config)

    def encode(record: dict) -> dict:
        prompt = tokenizer(record["prompt"]).input_ids
        completion = tokenizer(record["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    data = load_dataset("json", data_files=args.train_file, split="train")
    data = data.map(encode, remove_columns=["prompt", "completion"])  # the column task_type stays
    collate = TaskTypeCollator(DataCollatorForSeq2Seq(tokenizer), config)  # batches get task_types
    loader = DataLoader(data, args.batch_size, shuffle=True, collate_fn=collate)

    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=2e-4))
    model.train()
    batches = iter(loader)
    while micro_batches := [batch.to(device) for batch in itertools.islice(batches, args.accumulation)]:
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        for batch in micro_batches:
            # With num_items_in_batch, loss and balance term of a micro-batch are its share of the whole step's.
            loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"balance term of the last micro-batch: {balance_loss(model).item():.4f}")
    model.save_pretrained(args.output_dir)

    for row in group_weights(router_statistics(model, (batch.to(device) for batch in loader)).experts):
        print(f"task type {row['task_type']}: weight {row['weight']:.3f} on group {row['group']}")


if __name__ == "__main__":
    main()
