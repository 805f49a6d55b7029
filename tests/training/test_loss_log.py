"""The model's loss and the balance term in the log of a trainer."""

import pytest
import trl
from datasets import Dataset
from transformers import TrainerCallback

from peft_loramoe import balance_loss
from peft_loramoe.training.sft import LoRAMoESFTTrainer
from tiny import loramoe, tiny_tokenizer


ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]


class Keep(TrainerCallback):
    """The terms of the micro-batches."""

    def __init__(self):
        self.terms = []

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.terms.append(balance_loss(model).item())

    on_step_end = on_substep_end


def logs(tmp_path, weight, keep, rows=4, accumulation=1, steps=2, trainer_class=LoRAMoESFTTrainer):
    args = trl.SFTConfig(
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.0,
        logging_steps=steps,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    dataset = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS, "task_type": [0, 1, 1, 0]})
    model = loramoe(balance_loss_weight=weight)
    trainer = trainer_class(model, args, train_dataset=dataset, processing_class=tiny_tokenizer(), callbacks=[keep])
    trainer.train()
    return next(log for log in trainer.state.log_history if "learning_rate" in log)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_models_loss_and_the_term_are_apart(tmp_path, accumulation):
    """With a learning rate of zero all steps have the same data and the same loss."""
    keep = Keep()
    with_term = logs(tmp_path, 0.5, keep, rows=4 // accumulation, accumulation=accumulation)
    without = logs(tmp_path, 0.0, Keep(), rows=4 // accumulation, accumulation=accumulation)
    assert with_term["loss"] == pytest.approx(with_term["model_loss"] + with_term["balance_loss"])
    assert with_term["model_loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert without["balance_loss"] == 0 and without["model_loss"] == without["loss"]
    if accumulation == 1:
        assert with_term["balance_loss"] == pytest.approx(sum(keep.terms) / len(keep.terms), rel=1e-5)


class Talkative(LoRAMoESFTTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.log({"loss": 7.0})
        return loss


def test_a_log_of_the_users_own_takes_nothing_away(tmp_path):
    plain, talkative = (logs(tmp_path, 0.5, Keep(), trainer_class=c) for c in (LoRAMoESFTTrainer, Talkative))
    assert talkative["balance_loss"] == pytest.approx(plain["balance_loss"])
