"""Fine-tuning on several GPUs: FSDP2 or DeepSpeed ZeRO divide the backbone among them, DDP copies it.

    accelerate launch --config_file examples/accelerate/fsdp2_qlora.yaml examples/sharded.py \\
        --model Qwen/Qwen3-8B --train-file train.jsonl --load-in-4bit
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/sharded.py --train-file train.jsonl

Each line of the file has the task type 0 for what the model knows already and is to keep, 1 for what it is to learn:

    {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 0}
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import LoRAMoETrainerMixin


class LoRAMoESFTTrainer(LoRAMoETrainerMixin, SFTTrainer):
    """SFTTrainer with task types and the balance term."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder of a causal language model.")
    parser.add_argument("--train-file", required=True, help="JSON lines with prompt, completion and task_type.")
    parser.add_argument("--load-in-4bit", action="store_true", help="Quantise the backbone; FSDP2 or DDP only.")
    parser.add_argument("--epochs", type=float, default=1.0, help="Passes over the data.")
    parser.add_argument("--output-dir", default="loramoe-adapter", help="Folder for the adapter.")
    args = parser.parse_args()

    training = SFTConfig(  # before the model: with ZeRO-3 every process then loads its part only
        args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,  # FSDP2 has its own, fsdp_activation_checkpointing; ZeRO-3 has none for the term
        logging_steps=10,
        report_to="none",
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # FSDP2 divides weights of one floating dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=quantization if args.load_in_4bit else None
    )
    trainer = LoRAMoESFTTrainer(
        model,
        args=training,
        train_dataset=load_dataset("json", data_files=args.train_file, split="train"),
        peft_config=LoRAMoEConfig.retain(balance_across_processes=True, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()  # one adapter, as from a single process


if __name__ == "__main__":
    main()
