import numpy as np
import pytest
import torch

from peft_loramoe.balance.task_types import INTEGERS, task_type_tensor


pytestmark = pytest.mark.version_independent


@pytest.mark.parametrize("given", [torch.tensor([1, -1]), [1, -1], (1, -1), torch.tensor([1, -1], dtype=torch.int8)])
def test_integer_types(given):
    types = task_type_tensor(given, 2, None)
    assert (types.tolist(), types.dtype) == ([1, -1], torch.int64)


def test_names_are_turned_into_indices():
    assert task_type_tensor(["math", "facts", -1], 2, ["facts", "math"]).tolist() == [1, 0, -1]
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
        (np.array([None]), "is no list of integers"),
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
