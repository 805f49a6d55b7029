"""Supervised fine-tuning with LoRAMoE on TRL's SFTTrainer, to copy and change.

    python examples/sft.py --model Qwen/Qwen3-0.6B --train-file train.jsonl --anchors anchors.jsonl

train.jsonl holds the tasks to learn in a format of TRL's, one record a line, for example

    {"prompt": [{"role": "user", "content": "3 7"}], "completion": [{"role": "assistant", "content": "three seven"}]}

anchors.jsonl holds texts that stand for what the model knows, {"text": "..."}; `peft-loramoe anchors` samples them
from the model. `peft-loramoe train` does the same with more options.
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback


class LoRAMoESFTTrainer(LoRAMoETrainerMixin, SFTTrainer):
    """SFTTrainer with task types, anchors and the balance term."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder of a causal language model.")
    parser.add_argument("--train-file", required=True, help="JSON lines with prompt and completion.")
    parser.add_argument("--anchors", required=True, help="JSON lines with text.")
    parser.add_argument("--epochs", type=float, default=1.0, help="Passes over the training data.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()

    training = SFTConfig(
        args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=8,
        learning_rate=2e-4,  # of the experts; the routers' is router_lr_multiplier times that
        gradient_checkpointing_kwargs={"use_reentrant": False},  # reentrant gives the balance term no gradient
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    trainer = LoRAMoESFTTrainer(
        args.model,
        args=training,
        train_dataset=load_dataset("json", data_files=args.train_file, split="train"),
        peft_config=LoRAMoEConfig.retain(task_type="CAUSAL_LM"),
        anchors=args.anchors,
        callbacks=[RouterCallback(layer_groups=0)],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
