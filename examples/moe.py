"""LoRAMoE on a mixture-of-experts model: one mixture beside each sparse feed-forward block.

    python examples/moe.py
    python examples/moe.py --model Qwen/Qwen3-30B-A3B --dtype bfloat16

The base model's routed experts stay as they are, and so does its own router. The model is downloaded from the Hub
unless --model names a folder.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_loramoe import LoRAMoEConfig, balance_loss
from peft_loramoe.layer import LoRAMoEBlock
from peft_loramoe.training import optimizer_groups


KNOWN = ["The capital of France is Paris.", "Water freezes at zero degrees Celsius."]  # task type 0
NEW = ["Leave out the first letter. sun: un", "Leave out the first letter. moon: oon"]  # task type 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0125-Instruct", help="Hub id or folder.")
    parser.add_argument("--dtype", default="auto", help="dtype of the base model's weights.")
    parser.add_argument("--steps", type=int, default=10, help="Training steps.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
    model = get_peft_model(model, LoRAMoEConfig.retain(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    print(f"{sum(isinstance(module, LoRAMoEBlock) for module in model.modules())} sparse blocks are adapted")

    batch = tokenizer(KNOWN + NEW, padding=True, return_tensors="pt").to(device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    task_types = [0] * len(KNOWN) + [1] * len(NEW)
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-3))
    model.train()
    for step in range(args.steps):
        loss = model(**batch, labels=labels, task_types=task_types).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, of which balance {balance_loss(model).item():.4f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
