"""Trains small LoRAMoE adapters with transformers' Trainer, in however many processes the launcher starts.

    accelerate launch --config_file examples/accelerate/zero3.yaml ... tests/distributed_run.py FOLDER CASE...

`tests/test_distributed.py` starts it, and calls `train` itself for the same training in one process. FOLDER/backbone
is the base model; every case leaves its adapter and what each process saw in a folder of its name.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from peft_loramoe import LoRAMoEConfig, balance_loss, layer_routing
from peft_loramoe.training import LoRAMoETrainerMixin, optimizer_groups
from tiny import VOCAB, computed_as, tiny_tokenizer


ANCHORS = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(20, 60, 4)]
STEPS, ROWS = 3, 4  # rows of a step, over all processes

NO_REENTRANT = {"use_reentrant": False}
# name -> options of LoRAMoEConfig, of TrainingArguments, whether the backbone is quantised
CASES = {
    "no term": ({"balance_loss_weight": 0.0}, {}, False),
    "own term": ({"balance_loss_weight": 0.5}, {}, False),
    "common term": ({"balance_loss_weight": 0.5, "balance_across_processes": True}, {}, False),
    "accumulation": ({"balance_loss_weight": 0.5}, {"gradient_accumulation_steps": 2}, False),
    "mixin": ({"balance_loss_weight": 0.5}, {"gradient_accumulation_steps": 2}, False),
    # A router rate of 1: ten times that multiplies the roundings of Adam's first steps.
    "mixin, anchors": (
        {"balance_loss_weight": 0.5, "router_lr_multiplier": 1.0},
        {"gradient_accumulation_steps": 2},
        False,
    ),
    # Bit-equal to "no term": what is added is too small to change the sums.
    "mixin, light anchors": ({"balance_loss_weight": 0.0, "router_lr_multiplier": 1.0}, {}, False),
    "mixin, anchors in the term only": ({"balance_loss_weight": 0.5, "router_lr_multiplier": 1.0}, {}, False),
    "mixin, anchors, packed": (
        {"balance_loss_weight": 0.5, "router_lr_multiplier": 1.0},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": NO_REENTRANT},
        False,
    ),
    "mixin, LoRA+": ({"balance_loss_weight": 0.5, "router_lr_multiplier": 3.0}, {"weight_decay": 0.1}, False),
    "mixin, mean of the batches": ({"balance_loss_weight": 0.5}, {"gradient_accumulation_steps": 2}, False),
    "learning rates": ({"balance_loss_weight": 0.5}, {}, False),
    "checkpointing": (
        {"balance_loss_weight": 0.5, "balance_across_processes": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": NO_REENTRANT},
        False,
    ),
    # FSDP's own checkpointing, for which accelerate wraps every decoder layer; other engines know nothing of it.
    "wrapped layers": ({"balance_loss_weight": 0.5, "balance_across_processes": True}, {}, False),
    "resumed": ({"balance_loss_weight": 0.5}, {}, False),
    "mixin, anchors, quantised": (
        {"balance_loss_weight": 0.5, "null_groups": [0], "top_k": 3, "router_lr_multiplier": 1.0},
        {},
        True,
    ),
    "bfloat16": ({"balance_loss_weight": 0.5}, {"bf16": True}, False),
}
# The inputs are small; in these cases they are computed as large ones are.
LARGE = ("common term", "mixin, anchors", "mixin, anchors, quantised", "checkpointing", "bfloat16")
RESUMED = ("resumed", "wrapped layers")  # stopped before the last step, and continued from the checkpoint


class BalancedTrainer(LoRAMoETrainerMixin, Trainer):
    pass


class PlusTrainer(BalancedTrainer):
    """With the rates of LoRA+, in groups that are made from what the engine turned the model into."""

    def create_optimizer(self, *model):
        groups = optimizer_groups(
            model[0] if model else self.model,
            self.args.learning_rate,
            loraplus_lr_ratio=2.0,
            weight_decay=self.args.weight_decay,
        )
        self.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups, "lr": self.args.learning_rate})
        return super().create_optimizer(*model)


def samples() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (STEPS * ROWS,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, VOCAB, (length,), generator=generator), "task_type": i % 3 - 1}
        for i, length in enumerate(lengths)
    ]


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    rows = [sample["input_ids"] for sample in batch]
    types = [sample["task_type"] for sample in batch if "task_type" in sample]  # the mixin keeps them for itself
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=-100),
        **({"task_types": torch.tensor(types)} if types else {}),
    }


def collate_in_a_row(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Without padding, and without types: with anchors samples are of type 1."""
    rows = [sample["input_ids"] for sample in batch]
    return {
        "input_ids": torch.cat(rows)[None],
        "labels": torch.cat([torch.cat([row.new_tensor([-100]), row[1:]]) for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def build_trainer(case: str, folder: Path, output: Path, batches: int, **more) -> Trainer:
    """A trainer of that case.

    Args:
        case: a key of CASES.
        folder: has the base model.
        output: where the adapter goes.
        batches: parts into which this process divides its rows of a step, beside what the case asks for.
        more: further training arguments.
    """
    config, options, quantised = CASES[case]
    batches *= options.get("gradient_accumulation_steps", 1)
    arguments = {
        "output_dir": str(output),
        "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", 1)) // batches,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
        "gradient_accumulation_steps": batches,
        **more,
    }
    # The settings ask for bfloat16, in which no two ways of adding up agree.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if arguments.get("bf16") else "no"
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(case == "wrapped layers")
    arguments = TrainingArguments(**arguments)  # before the model: with ZeRO-3 it has transformers load shards
    if os.environ.get("ACCELERATE_USE_FSDP"):
        pretend_to_be_gpus()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "backbone", dtype=torch.float32, quantization_config=quantization if quantised else None
    )
    torch.manual_seed(1)
    model = get_peft_model(model, LoRAMoEConfig(r=2, init_weights=False, task_type="CAUSAL_LM", **config))
    model.config.use_cache = False  # transformers keeps packed samples apart only then
    kind = PlusTrainer if case.endswith("LoRA+") else BalancedTrainer if case.startswith("mixin") else Trainer
    data, given = {"train_dataset": samples(), "data_collator": collate}, {}
    if "anchors" in case:
        given = {"anchors": ANCHORS, "processing_class": tiny_tokenizer(), "anchor_kl_weight": 0.3}
    if "light" in case or "only" in case:
        given |= {"anchor_loss_weight": 0.0 if "only" in case else 1e-30, "anchor_kl_weight": 0.0}
    if case.endswith("packed"):
        data = {
            "train_dataset": [{"input_ids": row["input_ids"]} for row in samples()],
            "data_collator": collate_in_a_row,
        }
    trainer = kind(model=model, args=arguments, **data, **given)
    if case.endswith("mean of the batches"):
        trainer.model_accepts_loss_kwargs = False  # no num_items_in_batch: every batch counts alike
    if case == "learning rates":
        groups = optimizer_groups(trainer.model, 1e-2, router_lr=3e-2, loraplus_lr_ratio=2.0)
        trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups, "lr": 1e-2})
    return trainer


def pretend_to_be_gpus() -> None:
    """accelerate turns FSDP on for processes with accelerators only, and would go on with DDP in silence."""
    assert PartialState().distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train(case: str, folder: Path, output: Path, batches: int = 1) -> dict:
    """Train and save the adapter of a case; what this process saw."""
    with computed_as("large" if case in LARGE else "small"):
        return _train(case, folder, output, batches)


def _train(case: str, folder: Path, output: Path, batches: int) -> dict:
    resume = None
    if case in RESUMED:
        build_trainer(
            case, folder, output, batches, max_steps=STEPS - 1, save_strategy="steps", save_steps=STEPS - 1
        ).train()
        resume = str(output / f"checkpoint-{STEPS - 1}")
    trainer = build_trainer(case, folder, output, batches)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    last = layer_routing(trainer.model)[0]
    return {
        "rates": {group["name"]: group["lr"] for group in trainer.optimizer.param_groups if "name" in group},
        "engine": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "balance": balance_loss(trainer.model).item(),
        "task_types": last.task_types.tolist(),
        "token_counts": last.token_counts.tolist(),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+", choices=CASES)
    args = parser.parse_args()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        # Between processes on one CPU DeepSpeed compiles a reduction of its own, for a minute; gloo has one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for case in args.cases:
        seen = train(case, args.folder, args.folder / case)
        (args.folder / case / f"process-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Threads of torch's that still run while the interpreter shuts down now and then abort it (seen once, with FSDP2).
    os._exit(status)
