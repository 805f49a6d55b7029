"""Every trainer of transformers and TRL: the term is in the gradient, with the type of each row, or it is refused."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


pytest.importorskip("trl", reason="the extra trl is not installed")

from trainer_cases import (
    CASES,
    OPTIONS,
    TOKENS,
    TRL_BEFORE_1_16,
    TYPES,
    build,
    causal,
    importable,
    load,
    mixed,
    outcome,
    shipped,
)

from tiny import tiny_llama, tiny_tokenizer


PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
TABLE = dict(re.findall(r"^\| `((?:transformers|trl)\.[\w.]+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE))
FAST = (
    "transformers.Seq2SeqTrainer",
    "trl.DPOTrainer",
    "trl.GRPOTrainer",
    "trl.experimental.async_grpo.AsyncGRPOTrainer",
    "trl.experimental.online_dpo.OnlineDPOTrainer",
)
VARIANTS = {
    "DPO, reference before training": ("trl.DPOTrainer", {"precompute_ref_log_probs": True}),
    "DPO, three losses": ("trl.DPOTrainer", {"loss_type": ["sigmoid", "sft"]}),
    "KTO, reference before training": ("trl.KTOTrainer", {"precompute_ref_log_probs": True}),
    "KTO, without the KL batch": ("trl.KTOTrainer", {"loss_type": "apo_zero_unpaired"}),
    "GRPO, reference and old policy": (
        "trl.GRPOTrainer",
        {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 4},
    ),
    "GRPO, loss per sample": ("trl.GRPOTrainer", {"loss_type": "grpo"}),
    "RLOO, reference": ("trl.RLOOTrainer", {"beta": 0.1}),
    "TPO, without the gold answers": ("trl.experimental.tpo.TPOTrainer", {"tpo_alpha": 0.0}),
    "GKD, answers of the data": ("trl.experimental.gkd.GKDTrainer", {"lmbda": 0.0}),
    "GKD, answers of the teacher": ("trl.experimental.gkd.GKDTrainer", {"lmbda": 0.0, "seq_kd": True}),
    "GOLD, answers of the data": ("trl.experimental.gold.GOLDTrainer", {"lmbda": 0.0}),
    "IWOPD, answers of the data": (
        "trl.experimental.iw_opd.IWOPDTrainer",
        {"lmbda": 0.0, "distillation_objective": "jsd"},
    ),
    "SDFT, answers of the teacher": ("trl.experimental.sdft.SDFTTrainer", {"generate_from_teacher": True}),
    "SDPO, policy loss too": ("trl.experimental.sdpo.SDPOTrainer", {"distillation_weight": 0.5}),
}


@pytest.mark.skipif(TRL_BEFORE_1_16, reason="the experimental trainers change with every version")
def test_the_table_has_every_trainer():
    assert set(shipped()) <= set(CASES), "a trainer is missing in trainer_cases.py"
    assert set(CASES) == set(TABLE), "run docs/make_trainers.py"


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_table_is_what_a_run_gives(name, tmp_path):
    if not importable(name):
        pytest.skip("needs a newer transformers or TRL")
    assert outcome(name, tmp_path) == TABLE[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_term_is_right_with_other_options(name, options, tmp_path):
    assert outcome(name, tmp_path, **options) == "works"


# rollouts by vLLM

WITH_OPTION = [name for name in CASES if importable(name) and hasattr(load(name)[1], "use_vllm")]


@pytest.mark.parametrize("name", WITH_OPTION)
def test_rollouts_by_vllm_are_refused_before_vllm_is_needed(name, tmp_path):
    with pytest.raises(ValueError, match="would generate with vLLM.*cannot be merged: set use_vllm=False"):
        build(name, tmp_path, True, use_vllm=True)


def test_rollouts_by_vllm_are_refused_for_an_adapter_that_the_trainer_attaches(tmp_path):
    trainer, arguments = load("trl.GRPOTrainer")
    args = arguments(output_dir=str(tmp_path), use_vllm=True, **OPTIONS)
    config = causal(0.0).peft_config["default"]
    with pytest.raises(ValueError, match="set use_vllm=False"):
        mixed(trainer)("no-such-model", lambda **_: [], args, peft_config=config)


# trainers of a user


def train(trainer_class, folder, weight=0.5, collator=None, model=None, **options):
    data = Dataset.from_dict({"input_ids": TOKENS, "labels": TOKENS, "task_type": TYPES})
    args = TrainingArguments(output_dir=str(folder), **{**OPTIONS, "max_steps": 1, **options})
    collator = DataCollatorForSeq2Seq(tiny_tokenizer()) if collator is None else collator
    model = causal(weight) if model is None else model
    trainer = mixed(trainer_class)(model=model, args=args, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer


class StepsItself(Trainer):
    """Computes its loss in training_step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs.pop("task_types", None)
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class LoopsItself(Trainer):
    """Has a loop of its own."""

    def train(self):
        optimizer = self.create_optimizer()
        batch = next(iter(self.get_train_dataloader()))
        batch.pop("task_types", None)
        self.model.train()(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("trainer_class", [StepsItself, LoopsItself])
def test_a_step_without_the_term_is_refused(trainer_class, tmp_path):
    with pytest.raises(ValueError, match=f"LoRAMoE{trainer_class.__name__} is about to take an optimizer step whose"):
        train(trainer_class, tmp_path)
    train(trainer_class, tmp_path, weight=0.0)
    train(trainer_class, tmp_path, model=tiny_llama())


def test_a_step_in_evaluation_mode_is_refused(tmp_path):
    class Evaluating(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.eval(), self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(ValueError, match="does not come from compute_loss in training mode"):
        train(Evaluating, tmp_path)


class Interleaved(Trainer):
    """Calls the model with every row twice, one after the other."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
        return model(**rows).loss


class Blocks(Trainer):
    """Calls the model with all rows twice over."""

    task_types_in_blocks = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**{name: torch.cat([value, value]) for name, value in inputs.items()}).loss


def test_rows_that_nobody_attributes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="called with 8 rows, but the batch has 4 task types.*task_types_in_blocks"):
        train(Interleaved, tmp_path)


def test_a_trainer_may_say_that_its_rows_come_in_blocks(tmp_path):
    assert train(Blocks, tmp_path).state.global_step == 1


def as_they_are(examples):
    return examples


class Generating(Trainer):
    """Gets examples, and makes a batch of them itself."""

    typed = False

    def _prepare_inputs(self, inputs):
        rows = [{k: e[k] for k in ("input_ids", "labels")} for e in reversed(inputs)]
        batch = super()._prepare_inputs(DataCollatorForSeq2Seq(tiny_tokenizer())(rows))
        if self.typed:
            batch["task_types"] = torch.tensor([e["task_type"] for e in reversed(inputs)])
        return batch


def test_a_batch_made_of_examples_must_say_its_types(tmp_path):
    with pytest.raises(ValueError, match="LoRAMoEGenerating._prepare_inputs .* Have it return task_types"):
        train(Generating, tmp_path, collator=as_they_are)
    typed = type("Typed", (Generating,), {"typed": True})
    assert train(typed, tmp_path, collator=as_they_are).state.global_step == 1


class Repeating(Trainer):
    """Makes two rows of every prompt where TRL makes one."""

    def _generate_and_score_completions(self, inputs):
        rows = [{k: e[k] for k in ("input_ids", "labels")} for e in inputs]
        return DataCollatorForSeq2Seq(tiny_tokenizer())([*rows, *rows])

    def _prepare_inputs(self, inputs):
        return self._generate_and_score_completions(inputs)


def test_other_numbers_of_generated_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LoRAMoERepeating made 8 rows of 4 prompts"):
        train(Repeating, tmp_path, collator=as_they_are)
