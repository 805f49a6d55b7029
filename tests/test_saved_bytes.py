"""What autograd keeps for the backward pass: deterministic, so a test holds the targets of benchmarks/targets.py."""

import pytest
import torch
from torch import nn

from benchmarks.cases import CPU_LAYER, KINDS
from benchmarks.measure import saved_bytes
from benchmarks.targets import TARGETS


TOKENS = 1024


def total_bytes(**changes):
    config, kind = {**CPU_LAYER, **changes}, KINDS["layer"]
    module, inputs = kind.setup(config, kind.base(config, torch.device("cpu")))
    return saved_bytes(lambda: kind.forward(module, inputs), [*module.parameters(), *module.buffers()])


def bytes_per_token(method, dtype, adapter_dtype, dropout):
    changes = {"method": method, "dtype": dtype, "adapter_dtype": adapter_dtype, "dropout": dropout}
    return total_bytes(**changes, tokens=TOKENS) / TOKENS


LIMITS = [
    (dropout, target.other[0], target.limit)
    for target in TARGETS
    for dropout in (0.0, 0.05)
    if target.quantity == "saved_bytes" and target.where in ({}, {"dropout": dropout})
]


@pytest.mark.parametrize("dtype, adapter_dtype", [("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2])
@pytest.mark.parametrize("dropout, other, limit", LIMITS)
def test_a_layer_keeps_less_than_the_targets_allow(dtype, adapter_dtype, dropout, other, limit):
    ours, theirs = (bytes_per_token(method, dtype, adapter_dtype, dropout) for method in ("loramoe", other))
    assert ours <= limit * theirs, f"{ours:.0f} bytes per token, {other}: {theirs:.0f}"


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_a_small_input_keeps_no_copies_of_large_adapters(tokens, adapter_dtype):
    adapters = {"experts": 16, "r": 8, "adapter_dtype": adapter_dtype}
    kept = total_bytes(**adapters, tokens=tokens, method="loramoe", dtype="bfloat16", dropout=0.05)
    assert kept < 2**20


def test_the_frozen_layer_keeps_nothing():
    assert bytes_per_token("base", "float32", None, 0.0) == 0


def test_a_tensor_that_several_nodes_keep_counts_once():
    x, layers = torch.randn(8, 16), [nn.Linear(16, 4), nn.Linear(16, 4)]
    assert (
        saved_bytes(lambda: [layer(x) for layer in layers], [p for m in layers for p in m.parameters()]) == 8 * 16 * 4
    )


def test_a_view_keeps_its_whole_storage():
    x, layer = torch.randn(8, 16), nn.Linear(16, 4)
    assert saved_bytes(lambda: layer(x[:1]), layer.parameters()) == 8 * 16 * 4


def test_copies_of_parameters_count():
    x, layer = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True), nn.Linear(16, 4, bias=False)
    forward = lambda: nn.functional.linear(x, layer.weight.bfloat16())  # noqa: E731
    assert saved_bytes(forward, layer.parameters()) == (8 * 16 + 16 * 4) * 2
