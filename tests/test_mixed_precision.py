"""Autocast, loss scaling and low-precision adapters follow the float32 run."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_loramoe import LoRAMoEConfig, balance_loss
from peft_loramoe.training import LoRAMoETrainerMixin
from tiny import labelled, tiny_llama, tiny_tokenizer, token_batch


pytestmark = pytest.mark.usefixtures("input_size")

TYPES = torch.tensor([0, 1, -1])
STEPS = 40
CONFIG = dict(r=2, init_weights=False, router_lr_multiplier=1, task_type="CAUSAL_LM")  # one rate, as in the loop


def losses(autocast=None, model_dtype=torch.float32, autocast_adapter_dtype=True, scaled=False):
    """Losses of a few steps, and the adapter's dtypes."""
    torch.manual_seed(1)
    config = LoRAMoEConfig(**CONFIG)
    model = get_peft_model(tiny_llama().to(model_dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
    batch, curve, dtypes = labelled(token_batch()), [], {p.dtype for p in trained}
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(**batch, task_types=TYPES).loss
        curve.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert balance_loss(model).dtype == torch.float32
    return torch.tensor(curve), dtypes


CASES = {
    "bf16 autocast": (dict(autocast=torch.bfloat16), torch.float32),
    "fp16 autocast, scaled": (dict(autocast=torch.float16, scaled=True), torch.float32),
    "bf16 backbone, float32 adapters": (dict(model_dtype=torch.bfloat16), torch.float32),
    "bf16 backbone and autocast": (dict(model_dtype=torch.bfloat16, autocast=torch.bfloat16), torch.float32),
    "all bf16": (dict(model_dtype=torch.bfloat16, autocast_adapter_dtype=False), torch.bfloat16),
    "all bf16, autocast": (
        dict(model_dtype=torch.bfloat16, autocast=torch.bfloat16, autocast_adapter_dtype=False),
        torch.bfloat16,
    ),
    "fp16 backbone, float32 adapters, scaled": (
        dict(model_dtype=torch.float16, autocast=torch.float16, scaled=True),
        torch.float32,
    ),
}


@pytest.fixture(scope="module")
def reference():
    return losses()[0]


@pytest.mark.parametrize(("options", "dtype"), CASES.values(), ids=CASES)
def test_the_loss_curve_follows_float32(options, dtype, reference):
    curve, dtypes = losses(**options)
    assert dtypes == {dtype}
    assert reference[-1] < reference[0] - 0.5
    torch.testing.assert_close(curve, reference, atol=0.05, rtol=0)


def trainer_losses(tmp_path, **options):
    class Balanced(LoRAMoETrainerMixin, Trainer):
        pass

    batch = token_batch()
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    labels = [
        [-100, *row[1:]] for row in rows
    ]  # nothing predicts the first token, but transformers 4 counts its label
    data = Dataset.from_dict({"input_ids": rows, "labels": labels, "task_type": TYPES.tolist()})
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoRAMoEConfig(**CONFIG))
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    trainer = Balanced(model=model, args=args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_the_loss_curve_of_trainer_follows_float32(tmp_path, reference):
    torch.testing.assert_close(trainer_losses(tmp_path, bf16=False), reference, atol=1e-3, rtol=0)
    torch.testing.assert_close(trainer_losses(tmp_path, bf16=True), reference, atol=0.03, rtol=0)
