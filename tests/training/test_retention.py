import pytest
import torch
import trl
from datasets import Dataset

from peft_loramoe import layer_routing
from peft_loramoe.training.retention import measure_retention
from peft_loramoe.training.sft import LoRAMoESFTTrainer
from tiny import loramoe, tiny_tokenizer


ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]
LABELS = [[-100, *row[1:]] for row in ROWS]


@pytest.fixture
def trainer(tmp_path):
    def build(model, **options):
        args = trl.SFTConfig(
            tmp_path,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_eval_batch_size=2,
            gradient_checkpointing=False,
            **options,
        )
        dataset = Dataset.from_dict({"input_ids": ROWS, "labels": LABELS, "task_type": [0, 1, 1, 0]})
        return LoRAMoESFTTrainer(model, args, train_dataset=dataset, processing_class=tiny_tokenizer())

    return build


def by_hand(model, groups):
    """Loss of each sample alone, with its tokens, and the weight on some experts."""
    model.eval()
    losses, tokens, weights, counts = 0.0, 0, 0.0, 0
    for row, labels in zip(ROWS, LABELS):
        loss = model(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss.item()
        losses, tokens = losses + loss * (len(row) - 1), tokens + len(row) - 1
        for layer in layer_routing(model):
            weights, counts = weights + layer.importance[:, groups].sum().item(), counts + len(row)
    return losses / tokens, weights / counts if counts else None


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}])
def test_losses_and_weight_are_those_of_single_samples(trainer, options):
    model = loramoe(num_experts=4, null_groups=[0])
    dataset = Dataset.from_dict({"input_ids": ROWS, "labels": LABELS})
    result = measure_retention(trainer(model, **options), dataset)
    after, weight = by_hand(model, slice(0, 2))
    with model.disable_adapter():
        before, _ = by_hand(model, slice(0, 2))
    assert (result.samples, result.loss_before, result.loss_after) == (4, pytest.approx(before), pytest.approx(after))
    assert result.kept_weight == pytest.approx(weight)
    assert before != pytest.approx(after)


def test_without_null_groups_group_0_is_measured(trainer):
    model = loramoe(num_experts=4, expert_groups=[1, 3])
    result = measure_retention(trainer(model), Dataset.from_dict({"input_ids": ROWS, "labels": LABELS}))
    assert result.kept_weight == pytest.approx(by_hand(model, slice(0, 1))[1])


def test_measuring_leaves_the_model_as_it_was(trainer):
    model = loramoe(null_groups=[0]).train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    measure_retention(trainer(model), Dataset.from_dict({"input_ids": ROWS, "labels": LABELS}))
    assert model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
