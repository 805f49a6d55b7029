"""Liger's fused cross entropy, whose Triton kernels run in Triton's interpreter here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = """
import sys
from types import SimpleNamespace

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_loramoe import balance_loss
from peft_loramoe.training import LoRAMoETrainerMixin
from tiny import labelled, loramoe, tiny_llama, tiny_tokenizer, token_batch


class Balanced(LoRAMoETrainerMixin, Trainer):
    pass


def model(fused):
    base = tiny_llama()
    if fused:
        apply_liger_kernel_to_llama(
            rope=False, swiglu=False, rms_norm=False, cross_entropy=False, fused_linear_cross_entropy=True, model=base
        )
    return loramoe(base, balance_loss_weight=0.5).train()


losses, gradients, updates = [], [], []
for fused in (False, True):
    one = model(fused)
    output = one(**labelled(token_batch()), task_types=torch.tensor([0, 1, -1]))
    assert (output.logits is None) == fused, "the fused loss did not run"
    output.loss.backward()
    losses.append(output.loss.detach())
    gradients.append([p.grad for p in one.parameters() if p.requires_grad])

    trained = model(fused)
    before = [p.detach().clone() for p in trained.parameters() if p.requires_grad]
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "task_type": [0, 1]})
    args = TrainingArguments(
        sys.argv[1], max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, report_to="none", use_cpu=True, bf16=False
    )
    anchors = {"anchors": ["w20 w21 w22", "w24 w25"], "anchor_kl_weight": 0.5, "processing_class": tiny_tokenizer()}
    collator = DataCollatorForSeq2Seq(tiny_tokenizer())
    Balanced(model=trained, args=args, train_dataset=data, data_collator=collator, **anchors).train()
    updates.append([b - p.detach() for b, p in zip(before, (p for p in trained.parameters() if p.requires_grad))])
    assert max(u.abs().max() for u in updates[-1]) > 1e-3
for pair in (losses, gradients, updates):
    torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-4)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is not installed")
def test_the_fused_loss_is_balanced_too(tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "the same"
