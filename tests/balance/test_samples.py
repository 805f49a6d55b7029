import pytest
import torch
from transformers import DynamicCache

from peft_loramoe.balance.samples import Batch
from peft_loramoe.balance.task_types import task_type_tensor
from peft_loramoe.streams import DECODER, ENCODED, SIGNAL, TEXT, Streams


pytestmark = pytest.mark.version_independent

CPU = torch.device("cpu")


LAYER = "model.layers.0.mlp.up_proj"


def samples(tokens, task_types=None, kind=TEXT, encoder=TEXT, **inputs):
    is_encoder_decoder = kind == DECODER or any("decoder" in name for name in inputs)
    streams = Streams({LAYER: kind}, frozenset([LAYER]), is_encoder_decoder, encoder, labels_are_read=True)
    return Batch(inputs, None, streams).samples(tokens, LAYER, task_types, CPU)


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
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    result = Batch({"attention_mask": mask}, None).samples((2,), "score", torch.tensor([0, 1]), CPU)
    assert (result.ids.tolist(), result.real.tolist()) == ([0, 1], [True, True])


def test_image_patches_are_all_real():
    assert samples((2, 5), kind=SIGNAL, pixel_values=torch.ones(2, 3, 8, 8)).ids.tolist() == [0] * 5 + [1] * 5


def test_positions_that_start_again_separate_packed_samples():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    result = samples((1, 6), torch.tensor([[0, 0, 0, 1, 1, -1]]), position_ids=positions, input_ids=positions)
    assert result.ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert result.task_types[:3].tolist() == [0, 1, -1]
    assert len(result.task_types) == 6  # as many slots as tokens


def test_positions_with_gaps_are_one_sample():
    positions = torch.tensor([[0, 1, 5, 6]])
    assert samples((1, 4), position_ids=positions, input_ids=positions).ids.tolist() == [0, 0, 0, 0]


def test_padding_marked_by_its_type_is_no_sample():
    positions = torch.tensor([[0, 1, 0, 1, 0, 0]])
    types = task_type_tensor(torch.tensor([[1, 1, 0, 0, -100, -100]]), 2, None)
    result = samples((1, 6), types, position_ids=positions, input_ids=positions)
    assert result.real.tolist() == [True] * 4 + [False] * 2
    assert result.task_types.tolist()[:2] == [1, 0] and set(result.task_types.tolist()[2:]) == {-1}


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
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    inputs = dict(input_ids=torch.ones(1, 2), past_key_values=cache)
    # The mask may go on beyond the new tokens, where a static cache has more room.
    assert samples((1, 2), attention_mask=torch.tensor([[0, 1, 1, 0, 0]]), **inputs).real.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\)"):
        samples((1, 2), attention_mask=torch.tensor([[0, 1, 1]]), **inputs)


@pytest.mark.parametrize(("kind", "real"), [(TEXT, [True, False]), (DECODER, [True, True]), (ENCODED, [True, False])])
def test_encoder_and_decoder_have_masks_of_their_own(kind, real):
    masks = dict(attention_mask=torch.tensor([[1, 0]]), decoder_attention_mask=torch.tensor([[1, 1]]))
    ids = dict(input_ids=torch.ones(1, 2), decoder_input_ids=torch.ones(1, 2))
    assert samples((1, 2), kind=kind, **ids, **masks).real.tolist() == real


def test_labels_tell_the_decoders_padding():
    inputs = dict(attention_mask=torch.ones(1, 5), labels=torch.tensor([[3, 4, -100]]))
    assert samples((1, 3), kind=DECODER, **inputs).real.tolist() == [True, True, False]


def test_tokens_that_belong_to_no_row_are_refused():
    with pytest.raises(
        ValueError, match=r"which of the 2 rows.*\(5,\) tokens of layer 'model.layers.*exclude_modules"
    ):
        samples((5,), attention_mask=torch.ones(2, 4))


def test_a_mask_that_is_not_two_dimensional_is_refused():
    with pytest.raises(
        ValueError, match=r"attention_mask of shape \(1, 1, 3, 4\), where the tokens have shape \(1, 3\)"
    ):
        samples((1, 3), input_ids=torch.ones(1, 3), attention_mask=torch.ones(1, 1, 3, 4))


def test_task_types_of_another_width_are_refused():
    with pytest.raises(
        ValueError, match=r"task_types has shape \(1, 2\); .* shape \(1,\), or per token, shape \(1, 3\)"
    ):
        samples((1, 3), torch.tensor([[0, 1]]), input_ids=torch.ones(1, 3))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": PACKED},
        {"position_ids": PACKED[0]},
        {"position_ids": PACKED.expand(3, 1, 8)},
        {"position_ids": torch.cat([PACKED[None], torch.zeros(3, 1, 8, dtype=torch.long)])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 8], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 4, 8])},
        {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])},
        {"attention_mask": torch.block_diag(*[torch.ones(4, 4).tril()] * 2)[None, None].bool()},
        {"attention_mask": (1 - torch.block_diag(*[torch.ones(4, 4).tril()] * 2)[None, None]) * -1e9},
        {"attention_mask": {"full_attention": torch.block_diag(*[torch.ones(4, 4)] * 2)[None].bool()}},
    ],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("tokens", [(1, 8), (8,)])
def test_everything_that_separates_packed_samples(given, tokens):
    result = samples(tokens, torch.tensor([1]), input_ids=PACKED, **given)
    assert result.ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert result.real.all()
    assert result.task_types[:2].tolist() == [1, 1]


def test_positions_in_an_image_do_not_separate_samples():
    # two words, an image of 1 x 2 x 2 patches, a word; then one word and another sample's image
    positions = torch.tensor(
        [[0, 1, 2, 2, 2, 2, 4, 0, 1, 1], [0, 1, 2, 2, 3, 3, 4, 0, 1, 1], [0, 1, 2, 3, 2, 3, 4, 0, 1, 2]]
    )
    result = samples((1, 10), input_ids=torch.ones(1, 10), position_ids=positions[:, None])
    assert result.ids.tolist() == [0] * 7 + [1] * 3


def test_tokens_behind_the_last_boundary_are_padding():
    result = samples((1, 6), input_ids=torch.ones(1, 6), cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert result.ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert result.real.tolist() == [True] * 5 + [False]


def test_boundaries_run_through_the_rows():
    result = samples((2, 3), input_ids=torch.ones(2, 3), cu_seq_lens_q=torch.tensor([0, 2, 6]))
    assert result.ids.tolist() == [0, 0, 1, 2, 2, 2]  # no sample goes on in the next row


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.zeros(2, 1, 8)}, r"position_ids has shape \(2, 1, 8\), where .* \(1, 8\)"),
        ({"position_ids": torch.zeros(1, 5)}, r"position_ids has shape \(1, 5\)"),
        ({"cu_seq_lens_q": torch.tensor([[0, 8]])}, r"cu_seq_lens_q has shape \(1, 2\); pass the index"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q ends at 9, but the batch has 8 tokens"),
        ({"seq_idx": torch.zeros(1, 4)}, r"seq_idx has shape \(1, 4\); the tokens have shape \(1, 8\)"),
        (
            {"attention_mask": torch.ones(1, 9)},
            r"attention_mask of shape \(1, 9\), where the tokens have shape \(1, 8\)",
        ),
        ({"attention_mask": {"sliding_attention": torch.ones(1, 8)}}, "attention_mask of shape dict"),
    ],
)
def test_arguments_that_do_not_fit_the_tokens_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        samples((1, 8), input_ids=PACKED, **given)


def causal(real):
    """(rows, 1, seq, seq): earlier real tokens."""
    return (real[:, None, :].bool() & torch.ones(real.shape[1], real.shape[1]).tril().bool())[:, None]


@pytest.mark.parametrize("itself", [False, True], ids=["padding sees nothing", "padding sees itself"])
@pytest.mark.parametrize("kind", ["bool", "additive", "finfo"])
def test_left_padding_in_a_mask_of_pairs(kind, itself):
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = causal(real)
    if itself:
        mask = mask | torch.eye(5, dtype=torch.bool)
    if kind != "bool":
        hidden = -1e4 if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    result = samples((2, 5), torch.tensor([1, 0]), input_ids=real, attention_mask=mask)
    assert result.real.tolist() == real.flatten().bool().tolist()
    used = result.ids[result.real]
    assert result.task_types[used].tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and len(used.unique()) == 2


def test_right_padding_in_a_mask_of_pairs():
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    result = samples((2, 5), input_ids=real, attention_mask=causal(real))
    assert result.real.tolist() == real.flatten().bool().tolist()
    assert len(result.ids[result.real].unique()) == 2


def test_a_biased_mask_of_one_row_holds_for_all():
    mask = torch.randn(1, 4, 3, 3) + torch.zeros(3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    assert samples((2, 3), input_ids=torch.ones(2, 3), attention_mask=mask).real.all()


@pytest.mark.parametrize("tokens", [(2, 2), (2, 1), (2,), (1, 8), (2, 4, 2)])
def test_other_tokens_than_the_texts_are_refused(tokens):
    with pytest.raises(ValueError, match=r"which of the 2 rows of the batch"):
        samples(tokens, input_ids=torch.ones(2, 4))


def test_the_head_may_read_the_last_tokens_only():
    inputs = dict(input_ids=torch.ones(2, 4), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    batch = Batch({**inputs, "logits_to_keep": 2}, None)
    result = batch.samples((2, 2), "lm_head", torch.tensor([1, 0]), CPU)
    assert result.ids.tolist() == [0, 0, 1, 1] and result.real.tolist() == [True, False, True, True]
    packed = Batch({"input_ids": PACKED, "position_ids": PACKED, "logits_to_keep": 5}, None)
    assert packed.samples((1, 5), "lm_head", None, CPU).ids.tolist() == [0, 1, 1, 1, 1]


def test_shortened_sound_is_counted_only_without_padding():
    assert samples((2, 2), kind=SIGNAL, attention_mask=torch.ones(2, 4)).ids.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 4\) does not tell which of the \(2, 2\)"):
        samples((2, 2), kind=SIGNAL, attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))


def test_types_per_token_are_those_of_the_text():
    with pytest.raises(ValueError, match=r"one type per sample, shape \(2,\) \(layer"):
        samples((2, 4), torch.zeros(2, 4, dtype=torch.long), kind=SIGNAL, pixel_values=torch.ones(2, 3, 8, 8))
