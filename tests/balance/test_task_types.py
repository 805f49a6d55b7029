import numpy as np
import pytest
import torch

from peft_loramoe import balance_loss, collect_balance
from peft_loramoe.balance.task_types import INTEGERS, is_of_all_rows, repeat_for_rows, task_type_tensor
from tiny import loramoe


pytestmark = pytest.mark.version_independent


@pytest.mark.parametrize("given", [torch.tensor([1, -1]), [1, -1], (1, -1), torch.tensor([1, -1], dtype=torch.int8)])
def test_integer_types(given):
    types = task_type_tensor(given, 2, None)
    assert (types.tolist(), types.dtype) == ([1, -1], torch.int64)


def test_names_are_turned_into_indices():
    assert task_type_tensor(["math", "facts", -1], 2, ["facts", "math"]).tolist() == [1, 0, -1]
    assert task_type_tensor(np.array(["math", "facts"]), 2, ["facts", "math"]).tolist() == [1, 0]
    assert task_type_tensor(np.array(["math", -1], dtype=object), 2, ["facts", "math"]).tolist() == [1, -1]
    assert task_type_tensor([["math", "facts"]], 2, ["facts", "math"]).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("given", "names", "error", "message"),
    [
        (torch.tensor([0, 2]), None, ValueError, "contains 2, but the adapter has 2 expert groups"),
        (torch.tensor([-2]), None, ValueError, "contains -2"),
        (torch.tensor([0.5]), None, TypeError, "dtype torch.float32; pass integers"),
        (torch.tensor([True]), None, TypeError, "dtype torch.bool"),
        (torch.zeros(1, 1, 1, dtype=torch.long), None, ValueError, r"shape \(1, 1, 1\)"),
        (torch.tensor(1), None, ValueError, r"shape \(\)"),
        (["math"], None, ValueError, "name 'math', but the config has no task_type_names"),
        (["art"], ["facts", "math"], ValueError, r"unknown name 'art'; task_type_names are \['facts', 'math'\]"),
    ],
)
def test_bad_task_types_are_refused(given, names, error, message):
    with pytest.raises(error, match=message):
        task_type_tensor(given, 2, names)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_dtype_of_integers_is_taken(dtype):
    types = task_type_tensor(torch.tensor([0, 1, 1]).to(dtype), 2, None)
    assert types.tolist() == [0, 1, 1] and types.dtype == torch.int64
    with pytest.raises(ValueError, match="task_types contains 2, but the adapter has 2 expert groups: pass 0 to 1"):
        task_type_tensor(torch.tensor([0, 2]).to(dtype), 2, None)


@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if not dtype.is_signed])
def test_an_unknown_type_cannot_wrap_around(dtype):
    with pytest.raises(ValueError, match=f"or -1 for unknown, which {dtype} cannot hold: take int64"):
        task_type_tensor(torch.tensor([0, -1]).to(dtype), 2, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, None, 1], "contains None; pass -1 where"),
        ([[0, 1], [0, None]], "contains None"),
        (None, "contains None"),
        ([[0], [1, 0]], r"\[\[0\], \[1, 0\]\] is no list of integers, all rows of one length"),
        ([10**30], "is no list of integers"),
        ({"a": 1}, "is no list of integers"),
        (np.array([None]), "contains None"),
        ([0, 1.5], "dtype torch.float32"),
        (torch.ones(2, dtype=torch.complex64), "dtype torch.complex64"),
        (torch.ones(2, dtype=torch.bool), "dtype torch.bool"),
        (torch.ones(2).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        (torch.ones(2, 2, dtype=torch.long).to_sparse(), "layout torch.sparse_coo; pass a dense tensor"),
    ],
)
def test_what_holds_no_integers_is_refused(given, message):
    with pytest.raises(TypeError, match=f"task_types.*{message}"):
        task_type_tensor(given, 2, ["a", "b"])


OF_ALL_ROWS = [1, np.int64(1), np.array(1), torch.tensor(1), "tasks", np.str_("tasks")]
OF_EACH_ROW = [
    torch.tensor([0, 1]),
    [0, 1],
    (0, 1),
    range(2),
    np.array([0, 1]),
    np.array([0, 1], dtype=np.uint8),
    ["facts", "tasks"],
    np.array(["facts", "tasks"]),
    np.array(["facts", 1], dtype=object),
    [np.int64(0), torch.tensor(1)],
]


@pytest.mark.parametrize("given", OF_ALL_ROWS, ids=repr)
def test_one_type_is_that_of_all_rows(given):
    assert is_of_all_rows(given)
    assert task_type_tensor(repeat_for_rows(given, 4), 2, ["facts", "tasks"]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("given", OF_EACH_ROW, ids=repr)
def test_types_of_the_rows_are_repeated_in_blocks(given, rows):
    assert not is_of_all_rows(given)
    repeated = task_type_tensor(repeat_for_rows(given, rows), 2, ["facts", "tasks"])
    assert repeated.tolist() == [0, 1] * (rows // 2)


@pytest.mark.parametrize("given", [torch.tensor([[0, 1, 1]]), [[0, 1, 1]], np.array([[0, 1, 1]])], ids=repr)
def test_types_of_tokens_are_repeated_by_rows(given):
    assert task_type_tensor(repeat_for_rows(given, 2), 2, None).tolist() == [[0, 1, 1]] * 2


@pytest.mark.parametrize("given", [{0: 1}, {0, 1}, 1.5, True, iter([0, 1])], ids=lambda given: type(given).__name__)
def test_what_is_no_task_type_is_refused_by_the_check_of_types(given):
    with pytest.raises(TypeError, match="task_types"):
        task_type_tensor(repeat_for_rows(given, 4), 2, None)


@pytest.mark.parametrize("given", [1, "tasks", np.int64(1), np.array([1, 1]), [1, 1]], ids=repr)
def test_collected_calls_take_them(given):
    model = loramoe(task_type_names=["facts", "tasks"]).train()
    ids = torch.tensor([[5, 6, 7]] * 4)
    with collect_balance(model, given):
        model(input_ids=ids)
    term = balance_loss(model).item()
    model(input_ids=ids, task_types=[1] * 4)
    assert term == pytest.approx(balance_loss(model).item(), rel=1e-6)
