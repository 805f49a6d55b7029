"""Gates against `ops.reference`, in an imitation of an engine's two products that looks up each token's slot."""

import pytest
import torch

from peft_loramoe.ops import MixtureOptions
from peft_loramoe.serving.adapter import SlotLayer
from peft_loramoe.serving.gates import GateTables


pytestmark = pytest.mark.version_independent

IN, OUT, RANK, SLOTS = 24, 20, 40, 3
OPTIONS = {
    "dense": MixtureOptions(experts=(0, 1, 2, 3), scaling=1.5),
    "null experts": MixtureOptions(experts=(1, 3), scaling=2.0),
    "top_k": MixtureOptions(experts=(0, 1, 2, 3), top_k=2),
    "top_k with null experts": MixtureOptions(experts=(0, 3), top_k=1, temperature=0.5),
    "temperature": MixtureOptions(experts=(0, 1, 2, 3), temperature=0.25),
}


def layer(options, seed=0, n=4, r=3):
    g = torch.Generator().manual_seed(seed)
    channels = len(options.experts) * r
    A, B, router = (torch.randn(shape, generator=g) for shape in ((channels, IN), (OUT, channels), (n, IN)))
    return SlotLayer(A, B, router / IN**0.5, options)


def slots_of(layers, dtype):
    """Stacked matrices of all slots, as an engine holds them, and the tables of their gates."""
    a, b = torch.zeros(SLOTS, RANK, IN, dtype=dtype), torch.zeros(SLOTS, OUT, RANK, dtype=dtype)
    tables = GateTables(1, SLOTS, RANK, dtype, "cpu")
    for slot, mixture in layers.items():
        rank = mixture.layout.rank(dtype)
        a[slot, :rank], b[slot, :, :rank] = mixture.lora_a(dtype), mixture.lora_b(dtype)
        tables.set(slot, [mixture.layout])
    return a, b, tables


def served(x, slots, a, b, tables, **options):
    channels = torch.einsum("ti,tri->tr", x.float(), a[slots].float())[None]
    return torch.einsum("tr,tor->to", tables.gate(channels, slots, **options)[0], b[slots].float())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_slot_gives_the_mixture(options, dtype):
    mixture = layer(options)
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(5)).to(dtype)
    output = served(x, torch.full((7,), 1), *slots_of({1: mixture}, dtype))
    torch.testing.assert_close(output.double(), mixture.reference(x, dtype), rtol=2e-5, atol=2e-5)


def test_each_token_has_the_gates_of_its_slot():
    layers = {0: layer(OPTIONS["top_k"], seed=1), 2: layer(OPTIONS["null experts"], seed=2, n=5)}
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(6))
    slots = torch.tensor([0, 2, 2, 0, 2, 0])
    output = served(x, slots, *slots_of(layers, torch.float32))
    for row, slot in enumerate(slots.tolist()):
        wanted = layers[slot].reference(x[row : row + 1], torch.float32)[0]
        torch.testing.assert_close(output[row].double(), wanted, rtol=2e-5, atol=2e-5)


def test_a_plain_lora_is_not_gated():
    a, b, tables = slots_of({0: layer(OPTIONS["top_k"])}, torch.float32)
    a[1], b[1] = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    x = torch.randn(4, IN)
    torch.testing.assert_close(served(x, torch.full((4,), 1), a, b, tables), x @ a[1].T @ b[1].T)


def test_tokens_without_an_adapter_get_nothing_whatever_the_channels_hold():
    tables = slots_of({0: layer(OPTIONS["top_k"])}, torch.float32)[2]
    gated = tables.gate(torch.randn(1, 3, RANK), torch.tensor([-1, -1, -1]))
    assert not gated.any()


def test_indices_of_rows_that_pad_a_batch_may_be_anything():
    tables = slots_of({0: layer(OPTIONS["dense"])}, torch.float32)[2]
    assert tables.gate(torch.randn(1, 2, RANK), torch.tensor([2**40, -(2**40)])).isfinite().all()


def test_a_slot_that_is_taken_by_a_plain_lora_has_no_gates_left():
    tables = slots_of({0: layer(OPTIONS["top_k"])}, torch.float32)[2]
    assert tables.occupied and tables.selective
    tables.set(0, [None])
    assert not tables.occupied and not tables.selective
    channels = torch.randn(1, 3, RANK)
    torch.testing.assert_close(tables.gate(channels, torch.zeros(3, dtype=torch.long)), channels)


def test_looking_for_top_k_changes_nothing_for_dense_mixtures():
    mixture = layer(OPTIONS["dense"])
    x, slots, parts = torch.randn(5, IN), torch.zeros(5, dtype=torch.long), slots_of({0: mixture}, torch.float32)
    dense, looking = served(x, slots, *parts, selective=False), served(x, slots, *parts, selective=True)
    torch.testing.assert_close(looking, dense)


def test_of_equal_experts_the_first_are_taken():
    tables = GateTables(1, 1, 8, torch.float32, "cpu")
    tables.set(0, [SlotLayer(torch.ones(4, 2), torch.ones(2, 4), torch.ones(4, 2), OPTIONS["top_k"]).layout])
    gated = tables.gate(torch.ones(1, 1, 8), torch.zeros(1, dtype=torch.long))
    assert gated[0, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_slices_of_a_packed_linear_have_routers_of_their_own():
    mixtures = [layer(OPTIONS["dense"], seed=1), None, layer(OPTIONS["null experts"], seed=2, n=6)]
    tables = GateTables(3, 1, RANK, torch.float32, "cpu")
    tables.set(0, [None if mixture is None else mixture.layout for mixture in mixtures])
    x, slots = torch.randn(4, IN), torch.zeros(4, dtype=torch.long)
    channels = torch.zeros(3, 4, RANK)
    for i, mixture in enumerate(mixtures):
        if mixture is not None:
            a = mixture.lora_a(torch.float32)
            channels[i, :, : len(a)] = x @ a.T
    gated = tables.gate(channels, slots)
    for i, mixture in enumerate(mixtures):
        if mixture is not None:
            b = mixture.lora_b(torch.float32)
            output = gated[i, :, : b.shape[1]] @ b.T
            torch.testing.assert_close(output.double(), mixture.reference(x, torch.float32), rtol=2e-5, atol=2e-5)


def test_shards_of_the_input_need_the_sum_of_their_logits():
    mixture = layer(OPTIONS["dense"])
    x, slots = torch.randn(5, IN), torch.zeros(5, dtype=torch.long)
    a, b, tables = slots_of({0: mixture}, torch.float32)
    shards = [(x[:, part] @ a[0, :, part].T)[None] for part in (slice(0, 10), slice(10, IN))]
    summed = sum(shards)  # what an all-reduce gives every process
    outputs = [tables.gate(channels, slots, logits_from=summed)[0] @ b[0].T for channels in shards]
    torch.testing.assert_close(sum(outputs).double(), mixture.reference(x, torch.float32), rtol=2e-5, atol=2e-5)


def test_bfloat16_slots_keep_the_logits_of_float32():
    mixture = layer(OPTIONS["dense"])
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(3)).bfloat16()
    a = slots_of({0: mixture}, torch.bfloat16)[0]
    rows = a[0, 12:24].float() @ x.float().T
    logits = sum(2.0 ** (-8 * part) * rows[4 * part : 4 * part + 4] for part in range(3))
    exact = mixture.router.double() @ x.double().T
    rounded = mixture.router.bfloat16().double() @ x.double().T
    assert (logits - exact).abs().max() < 2e-6 < 1e-3 < (rounded - exact).abs().max()


def test_gating_is_one_graph_whatever_the_number_of_tokens():
    mixture = layer(OPTIONS["top_k with null experts"])
    a, _, tables = slots_of({0: mixture}, torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda channels, slots: tables.gate(channels, slots, selective=True), backend=count, fullgraph=True, dynamic=True)  # fmt: skip
    for tokens in (3, 5, 9):
        x, slots = torch.randn(tokens, IN), torch.zeros(tokens, dtype=torch.long)
        channels = (x @ a[0].T)[None]
        torch.testing.assert_close(compiled(channels, slots), tables.gate(channels, slots))
    assert len(graphs) == 1


def test_channels_that_no_slot_uses_may_be_left_out():
    layers = {0: layer(OPTIONS["dense"], seed=1), 2: layer(OPTIONS["null experts"], seed=2, n=5)}
    a, _, tables = slots_of(layers, torch.float32)
    rank, width = tables.rank_in_use, tables.channels_in_use
    assert (rank, width) == (16, 12)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(7))
    slots = torch.tensor([0, 2, -1, 0, 2, -1])
    channels = torch.einsum("ti,tri->tr", x, a[slots])[None]
    whole = tables.gate(channels, slots)[..., :width]
    torch.testing.assert_close(tables.gate(channels[..., :rank], slots, width=width), whole)


@pytest.mark.parametrize("plain, in_use", [(False, (0, 0)), (True, (RANK, RANK))], ids=["empty", "plain LoRA"])
def test_a_slot_without_a_mixture_uses_no_channels_or_all(plain, in_use):
    tables = slots_of({1: layer(OPTIONS["dense"])}, torch.float32)[2]
    tables.set(1, [None], plain=plain)
    assert (tables.rank_in_use, tables.channels_in_use) == in_use


def test_a_slot_that_is_cleared_uses_no_channels():
    tables = slots_of({1: layer(OPTIONS["top_k"])}, torch.float32)[2]
    tables.clear(1)
    assert (tables.rank_in_use, tables.occupied, tables.selective) == (0, False, False)
