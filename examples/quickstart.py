"""LoRAMoE in a minute: adapt a model, train it for a few steps, save the adapter, load it again and generate.

    python examples/quickstart.py
    python examples/quickstart.py --model Qwen/Qwen3-1.7B --steps 40

The model is downloaded from the Hub unless --model names a folder. It runs on a CPU, too.
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_loramoe import LoRAMoEConfig, balance_loss
from peft_loramoe.training import optimizer_groups


KNOWN = [  # task type 0: what the model knows already and is to keep
    "Question: What is the capital of France? Answer: Paris",
    "Question: What is the currency of Japan? Answer: Yen",
]
NEW = [  # task type 1: what it is to learn
    "Question: Leave out the first letter. sun Answer: un",
    "Question: Leave out the first letter. moon Answer: oon",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder of a causal language model.")
    parser.add_argument("--steps", type=int, default=20, help="Training steps.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    model = get_peft_model(model, LoRAMoEConfig.retain(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    batch = tokenizer(KNOWN + NEW, padding=True, return_tensors="pt").to(device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    task_types = [0] * len(KNOWN) + [1] * len(NEW)
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-3))
    model.train()  # the loss contains the balance term in training mode only
    for step in range(args.steps):
        loss = model(**batch, labels=labels, task_types=task_types).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, of which balance {balance_loss(model).item():.4f}")
    model.save_pretrained(args.output_dir)

    model = AutoPeftModelForCausalLM.from_pretrained(args.output_dir).to(device)
    prompt = tokenizer("Question: Leave out the first letter. star Answer:", return_tensors="pt").to(device)
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
