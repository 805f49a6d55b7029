import numpy as np
import pytest
import torch

from peft_loramoe.balance.samples import INTEGERS, Batch, task_type_tensor


pytestmark = pytest.mark.version_independent

CPU = torch.device("cpu")


def samples(tokens, task_types=None, layer="model.layers.0.mlp.up_proj", is_encoder_decoder=False, **inputs):
    return Batch(inputs, None, is_encoder_decoder).samples(tokens, layer, task_types, CPU)


def test_rows_are_samples_and_the_mask_tells_real_tokens():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    result = samples((2, 3), torch.tensor([1, 0]), attention_mask=mask)
    assert result.ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.real.tolist() == [True, True, False, False, True, True]
    assert result.task_types.tolist() == [1, 0]


@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
def test_flattened_tokens_are_those_of_the_grid(tokens):
    result = samples(tokens, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert result.ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.real.tolist() == [True, True, False, True, True, True]


def test_without_a_mask_every_token_is_real():
    result = samples((2, 3), input_ids=torch.ones(2, 3, dtype=torch.long))
    assert result.real.all()
    assert result.task_types.tolist() == [-1, -1]


def test_pooled_tokens_are_one_for_each_row():
    result = samples((2,), torch.tensor([0, 1]), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert (result.ids.tolist(), result.real.tolist()) == ([0, 1], [True, True])


def test_image_patches_are_all_real():
    assert samples((2, 5), pixel_values=torch.ones(2, 3, 8, 8)).ids.tolist() == [0] * 5 + [1] * 5


def test_positions_that_start_again_separate_packed_samples():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    result = samples((1, 6), torch.tensor([[0, 0, 0, 1, 1, -1]]), position_ids=positions, input_ids=positions)
    assert result.ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert result.task_types[:3].tolist() == [0, 1, -1]
    assert len(result.task_types) == 6  # as many slots as tokens


def test_positions_with_gaps_are_one_sample():
    positions = torch.tensor([[0, 1, 5, 6]])
    assert samples((1, 4), position_ids=positions, input_ids=positions).ids.tolist() == [0, 0, 0, 0]


def test_a_change_of_type_separates_packed_samples():
    types = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    result = samples((2, 4), types, input_ids=types)
    assert result.ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert result.task_types[:4].tolist() == [0, 1, 1, 0]


def test_left_padded_positions_do_not_split_a_sample():
    positions, mask = torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]])
    result = samples((1, 5), torch.tensor([1]), position_ids=positions, attention_mask=mask)
    real_ids = result.ids[result.real]
    assert real_ids.unique().numel() == 1
    assert result.task_types[real_ids[0]] == 1


def test_cached_tokens_are_not_counted_again():
    result = samples((1, 1), attention_mask=torch.tensor([[0, 1, 1]]), past_key_values=object())
    assert result.real.tolist() == [True]


@pytest.mark.parametrize(
    ("layer", "real"),
    [
        ("encoder.block.0.layer.1.DenseReluDense.wi", [True, False]),
        ("decoder.block.0.layer.2.DenseReluDense.wi", [True, True]),
        ("decoder.block.0.layer.1.EncDecAttention.k", [True, False]),
        ("decoder.layers.0.encoder_attn.v_proj", [True, False]),
        ("decoder.layers.0.encoder_attn.q_proj", [True, True]),
    ],
)
def test_encoder_and_decoder_have_masks_of_their_own(layer, real):
    masks = dict(attention_mask=torch.tensor([[1, 0]]), decoder_attention_mask=torch.tensor([[1, 1]]))
    assert samples((1, 2), layer=layer, is_encoder_decoder=True, **masks).real.tolist() == real


def test_labels_tell_the_decoders_padding():
    inputs = dict(attention_mask=torch.ones(1, 5), labels=torch.tensor([[3, 4, -100]]))
    assert samples((1, 3), layer="decoder.fc1", is_encoder_decoder=True, **inputs).real.tolist() == [True, True, False]


def test_tokens_that_belong_to_no_row_are_refused():
    with pytest.raises(
        ValueError, match=r"which of the 2 rows.*\(5,\) tokens of layer 'experts.3.w1'.*exclude_modules"
    ):
        samples((5,), layer="experts.3.w1", attention_mask=torch.ones(2, 4))


def test_a_mask_that_is_not_two_dimensional_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 3, 3\); pass shape \(batch, seq\)"):
        samples((1, 3), attention_mask=torch.ones(1, 1, 3, 3))


def test_task_types_of_another_width_are_refused():
    with pytest.raises(
        ValueError, match=r"task_types has shape \(1, 2\); .* shape \(1,\), or per token, shape \(1, 3\)"
    ):
        samples((1, 3), torch.tensor([[0, 1]]), input_ids=torch.ones(1, 3))


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
