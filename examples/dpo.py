"""Preference tuning with LoRAMoE, on TRL's DPOTrainer.

    python examples/dpo.py --model Qwen/Qwen3-0.6B --train-file preferences.jsonl

Each line of the file is a preference with the type of its prompt: 0 for what the model knows already and is to keep, 1
for what it is to learn. Prompts and answers may be conversations, too.

    {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Lyon.", "task_type": 0}
"""

import argparse

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import LoRAMoETrainerMixin


class LoRAMoEDPOTrainer(LoRAMoETrainerMixin, DPOTrainer):
    """DPOTrainer with task types and the balance term; chosen and rejected answers have the type of their prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder of a causal language model.")
    parser.add_argument("--train-file", required=True, help="JSON lines with prompt, chosen, rejected and task_type.")
    parser.add_argument("--epochs", type=float, default=1.0, help="Passes over the preferences.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()

    training = DPOConfig(
        args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-5,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # reentrant gives the balance term no gradient
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    trainer = LoRAMoEDPOTrainer(
        args.model,
        args=training,
        train_dataset=load_dataset("json", data_files=args.train_file, split="train"),
        peft_config=LoRAMoEConfig.retain(task_type="CAUSAL_LM"),  # the reference is the model without the adapter
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
