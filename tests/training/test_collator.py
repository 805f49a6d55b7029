import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, default_data_collator

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training import TaskTypeCollator
from tiny import tiny_tokenizer


CONFIG = LoRAMoEConfig(expert_groups=[3, 3], task_type_names=["facts", "tasks"])
TOKENS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def examples(types, tokens=TOKENS, **columns):
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens[: len(types)]]
    extra = [dict(zip(columns, values)) for values in zip(*columns.values())] if columns else [{}] * len(rows)
    return [{**row, **more, "task_type": t} for row, more, t in zip(rows, extra, types)]


def padding(side="right"):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


def flattening():
    return DataCollatorWithFlattening()


def join(rows):
    return {"input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]])}


def with_positions(collator):
    def call(rows):
        batch = collator([{name: value for name, value in row.items() if name != "seq_lengths"} for row in rows])
        return {**batch, "position_ids": torch.zeros_like(batch["input_ids"])}

    return call


def collate(collator, rows):
    return TaskTypeCollator(collator, CONFIG)(rows)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([0, 1, -1], [0, 1, -1]),
        (["tasks", "facts", None], [1, 0, -1]),
        (torch.tensor([1, 0, 0]), [1, 0, 0]),
        (torch.tensor([1, 0, 0]).numpy(), [1, 0, 0]),
    ],
    ids=["integers", "names", "tensors", "numpy"],
)
def test_padded_batches_have_a_type_for_each_row(types, expected):
    batch = collate(padding(), examples(types))
    assert batch["task_types"].tolist() == expected and batch["task_types"].dtype == torch.int64
    assert batch["input_ids"].shape == (3, 4)
    assert "task_type" not in batch


def test_flattened_batches_have_a_type_for_each_token():
    batch = collate(flattening(), examples([0, 1, -1]))
    assert batch["input_ids"].shape == (1, 9)
    assert batch["task_types"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1, -1]]


@pytest.mark.parametrize(("side", "second"), [("right", [1, 0, -100, -100]), ("left", [-100, -100, 1, 0])])
@pytest.mark.parametrize("per", ["segment", "token"])
def test_packed_rows_are_padded(side, second, per):
    types = {"segment": [[0, 1, 0], [1, 0]], "token": [[0, 1, 1, 0], [1, 0]]}[per]
    lengths = {"seq_lengths": [[1, 2, 1], [1, 1]]} if per == "segment" else {}
    batch = collate(with_positions(padding(side)), examples(types, [TOKENS[2], TOKENS[1]], **lengths))
    assert batch["task_types"].tolist() == [[0, 1, 1, 0], second]


def test_packed_and_flattened():
    rows = examples([[0, 1], 1], [TOKENS[0], TOKENS[1]], seq_lengths=[[2, 1], [2]])
    assert collate(with_positions(join), rows)["task_types"].tolist() == [[0, 0, 1, 1, 1]]


def test_padding_to_a_multiple_is_marked():
    def collator(rows):
        return {"input_ids": nn.functional.pad(join(rows)["input_ids"], (0, 3))}

    assert collate(with_positions(collator), examples([0, 1]))["task_types"].tolist() == [
        [0, 0, 0, 1, 1, -100, -100, -100]
    ]


def test_one_packed_example_fills_the_batch():
    batch = collate(with_positions(default_data_collator), examples([[1, 0]], seq_lengths=[[1, 2]]))
    assert batch["task_types"].tolist() == [[1, 0, 0]]


def test_inputs_other_than_tokens_have_a_type_for_each_row():
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "task_type": t} for t in (1, 0)]
    assert collate(default_data_collator, rows)["task_types"].tolist() == [1, 0]


def test_batches_without_the_column_are_passed_on():
    rows = [{"input_ids": ids} for ids in TOKENS]
    assert "task_types" not in collate(padding(), rows)


def test_one_warning_for_types_that_are_all_unknown():
    collator = TaskTypeCollator(padding(), CONFIG)
    with pytest.warns(UserWarning, match=r"Every task_type of a batch is unknown \(-1\)") as caught:
        for _ in range(2):
            collator(examples([-1, -1]))
    assert len(caught) == 1


def test_without_a_term_types_and_boundaries_may_be_unknown(recwarn):
    collator = TaskTypeCollator(join, LoRAMoEConfig(balance_loss_weight=0.0))
    assert collator(examples([-1, -1]))["task_types"].tolist() == [[-1] * 5]
    assert not recwarn


def no_input_ids(rows):
    return {"input_ids": torch.zeros(1, 5, dtype=torch.long)}


def cut(rows):
    return {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


def cut_row(rows):
    return {"input_ids": torch.zeros(2, 2, dtype=torch.long), "attention_mask": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("collator", "rows", "error", "message"),
    [
        (
            padding(),
            [*examples([0]), {"input_ids": [1]}],
            ValueError,
            "1 of the 2 examples of a batch have no task_type",
        ),
        (padding(), examples(["facts", "sums"]), ValueError, "unknown name 'sums'; task_type_names are"),
        (padding(), examples([0, 2]), ValueError, "contains 2, but the adapter has 2 expert groups"),
        (padding(), examples([0, 0.5]), TypeError, "task_type holds values of type float, int, such as .*0.5"),
        (padding(), examples([0, True]), TypeError, "task_type holds values of type bool, int"),
        (
            padding(),
            examples([0, "facts"]),
            TypeError,
            "values of type int, str, .*; write integers only, or names only",
        ),
        (padding(), examples([[0, "facts", 1]]), TypeError, "values of type int, str"),
        (flattening(), examples([[0, 1]]), ValueError, "of 3 tokens has 2 values in task_type and no seq_lengths"),
        (
            flattening(),
            examples([[0, 1]], seq_lengths=[[1, 1]]),
            ValueError,
            r"2 values in task_type and seq_lengths \[1, 1\]; give one task_type for each entry of seq_lengths",
        ),
        (
            no_input_ids,
            [{"text": "a", "task_type": 0}] * 2,
            ValueError,
            r"\(columns text, task_type\) have no input_ids",
        ),
        (join, examples([0, 0]), ValueError, "joins several samples in a row but returns no 2-D position_ids"),
        (
            padding(),
            examples([0], seq_lengths=[[1, 2]]),
            ValueError,
            "returns no 2-D position_ids, .* return_position_ids=True",
        ),
        (cut, examples([0, 1]), ValueError, "Row 0 of the batch has 4 tokens, but task_type speaks of 5"),
        (
            cut_row,
            examples([[0, 0, 1], [1, 1]]),
            ValueError,
            "Row 0 of the batch has 2 tokens, but task_type speaks of 3",
        ),
    ],
)
def test_bad_columns_are_refused(collator, rows, error, message):
    with pytest.raises(error, match=message):
        collate(collator, rows)


def test_names_need_task_type_names():
    with pytest.raises(ValueError, match="contains the name 'facts', but the config has no task_type_names"):
        TaskTypeCollator(padding(), LoRAMoEConfig())(examples(["facts"]))


def test_examples_that_the_collator_returns_keep_their_column():
    # the collator of trainers that generate answers to prompts
    examples = [{"prompt": "w5", "task_type": "tasks"}, {"prompt": "w6", "task_type": None}]
    config = LoRAMoEConfig(task_type_names=["facts", "tasks"])
    assert TaskTypeCollator(lambda given: given, config)(examples) == examples
    with pytest.raises(ValueError, match="unknown name 'others'"):
        TaskTypeCollator(lambda given: given, config)([{"prompt": "w5", "task_type": "others"}])


@pytest.mark.parametrize("collator", [tuple, lambda given: [dict(example) for example in given]])
def test_a_collator_that_leaves_no_place_for_types_is_refused(collator):
    with pytest.raises(TypeError, match="The collator returned a (tuple|list), beside which"):
        TaskTypeCollator(collator, LoRAMoEConfig())([{"prompt": "w5", "task_type": 1}])
