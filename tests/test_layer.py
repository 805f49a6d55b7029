import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear
from peft_loramoe.balance.hooks import Recorder


pytestmark = pytest.mark.usefixtures("input_size")


def make_layer(base=None, adapters=("default",), **options):
    torch.manual_seed(0)
    config = LoRAMoEConfig(**{"r": 2, "num_experts": 4, "init_weights": False, **options})
    layer = LoRAMoELinear(base or nn.Linear(6, 5), "block.up_proj", Recorder(dict.fromkeys(adapters, config)))
    for name in adapters:
        layer.update_layer(name, config)
    layer.set_adapter(list(adapters[:1]))
    return layer


def calls_base_layer(layer, x):
    """Whether the layer calls its base layer, rather than handing its weight to the experts."""
    given = []
    handle = layer.loramoe_experts["default"].register_forward_pre_hook(
        lambda module, args, options: given.append(options.get("weight")), with_kwargs=True
    )
    layer(x)
    handle.remove()
    return given == [None]


@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)])
def test_the_mixture_is_added_to_the_base_layers_output(base):
    layer, x = make_layer(base), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), base(x) + layer.loramoe_experts["default"](x)[0])


def test_deltas_of_several_active_adapters_add():
    layer, x = make_layer(adapters=("a", "b")), torch.randn(3, 6)
    layer.set_adapter(["a", "b"])
    deltas = [layer.loramoe_experts[name](x)[0] for name in "ab"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + deltas[0] + deltas[1])


def test_an_adapter_that_is_named_twice_counts_twice_as_in_lora():
    layer, x = make_layer(adapters=("a",)), torch.randn(3, 6)
    layer.set_adapter(["a", "a"])
    delta, _ = layer.loramoe_experts["a"](x)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * delta)


def test_disabled_adapters_leave_the_base_layer():
    layer, x = make_layer(), torch.randn(3, 6)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_the_base_layers_output_is_not_written_into():
    class Remembers(nn.Linear):
        def forward(self, x):
            self.output = super().forward(x)
            return self.output

    layer, x = make_layer(Remembers(6, 5)), torch.randn(2, 3, 6)
    layer(x)
    assert torch.equal(
        layer.base_layer.output, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    )


def observed(layer):
    """Ways of observing or replacing the call of a linear layer, or of training it."""

    class Subclass(nn.Linear):
        pass

    class WeightSubclass(torch.Tensor):
        pass

    subclass = Subclass(6, 5)
    subclass.load_state_dict(layer.state_dict())
    replaced = nn.Linear(6, 5)
    replaced.forward = layer.forward
    hooked = {}
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hooked[kind] = nn.Linear(6, 5)
        getattr(hooked[kind], f"register_{kind}")(lambda *_: None)
    trained, biased, sharded, wrapped = (nn.Linear(6, 5) for _ in range(4))
    sharded.weight.ds_id = 0
    wrapped.weight = nn.Parameter(wrapped.weight.as_subclass(WeightSubclass), requires_grad=False)
    views = {}
    for name in ("weight", "bias"):  # as FSDP 1 leaves them with use_orig_params=False
        views[f"view as {name}"] = other = nn.Linear(6, 5)
        value = getattr(other, name).detach()
        delattr(other, name)
        setattr(other, name, value)
    others = {"subclass": subclass, "replaced": replaced, "sharded": sharded, "wrapped": wrapped, **hooked, **views}
    for other in others.values():
        other.requires_grad_(False)
    biased.weight.requires_grad_(False)
    return {**others, "trained weight": trained, "trained bias": biased}


@pytest.mark.parametrize("how", observed(nn.Linear(6, 5)))
def test_a_base_layer_that_is_observed_replaced_or_trained_is_called(how):
    base = observed(nn.Linear(6, 5))[how]
    layer, x = make_layer(base), torch.randn(3, 6)
    assert calls_base_layer(layer, x)
    torch.testing.assert_close(layer(x), base(x) + layer.loramoe_experts["default"](x)[0])


def test_a_base_layer_under_global_hooks_is_called():
    layer, x = make_layer(nn.Linear(6, 5).requires_grad_(False)), torch.randn(3, 6)
    assert not calls_base_layer(layer, x)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.base_layer in calls


@pytest.mark.parametrize(
    "wrap", [lambda patch: patch, functools.wraps(nn.Linear.forward)], ids=["plain", "functools.wraps"]
)
def test_a_base_layer_under_a_patched_class_is_called(monkeypatch, wrap):
    layer = make_layer(nn.Linear(6, 5).requires_grad_(False))
    monkeypatch.setattr(nn.Linear, "forward", wrap(lambda self, x: torch.zeros(len(x), 5)))
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.loramoe_experts["default"](x)[0])


@pytest.mark.parametrize("tokens", [4, 40])
def test_selective_checkpointing_may_keep_the_base_layers_output(tokens):
    layer = make_layer(nn.Linear(6, 5).requires_grad_(False))
    x = torch.randn(tokens, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), x)
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    policy = functools.partial(create_selective_checkpoint_contexts, products)
    output = checkpoint(layer, x, use_reentrant=False, context_fn=policy)
    torch.testing.assert_close(torch.autograd.grad(output.pow(2).sum(), x)[0], expected)


def test_shapes_can_be_computed_on_the_meta_device():
    layer = make_layer().to("meta")
    assert layer(torch.randn(2, 3, 6, device="meta")).shape == (2, 3, 5)


def test_a_plain_base_layer_gives_the_same_inside_the_operator():
    layer, x = make_layer(nn.Linear(6, 5).requires_grad_(False)), torch.randn(2, 3, 6, requires_grad=True)
    expected = layer.base_layer(x) + layer.loramoe_experts["default"](x)[0]
    output = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_a_base_layer_that_cuts_the_gradient_is_an_error_in_training():
    class ForInference(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    layer, x = make_layer(ForInference(6, 5).requires_grad_(False)), torch.randn(3, 6, requires_grad=True)
    with pytest.raises(ValueError, match=r"base layer of 'block.up_proj', ForInference, passes no gradient on"):
        layer(x)
    layer.eval()(x)


def test_one_adapter_for_each_sample():
    layer, x = make_layer(adapters=("a", "b")).eval(), torch.randn(4, 3, 6)
    output = layer(x, adapter_names=["b", "__base__", "a", "b"])
    for row, name in enumerate(["b", None, "a", "b"]):
        expected = layer.base_layer(x[row])
        if name:
            expected = expected + layer.loramoe_experts[name](x[row])[0]
        torch.testing.assert_close(output[row], expected)


def test_as_many_adapter_names_as_samples_are_needed():
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        make_layer()(torch.randn(3, 6), adapter_names=["default"])


def test_patterns_apply_to_the_layers_name():
    layer = make_layer(
        rank_pattern={"up_proj": 3}, alpha_pattern={"block.up_proj": 12}, num_experts_pattern={"up_proj": [1, 4]}
    )
    experts = layer.loramoe_experts["default"]
    assert (experts.r, experts.scaling, experts.num_experts, experts.A.shape) == (3, 4.0, 5, (15, 6))


def test_the_output_keeps_the_base_layers_dtype():
    layer = make_layer(nn.Linear(6, 5).bfloat16())
    layer.loramoe_experts["default"].float()  # float32 masters on a bfloat16 backbone
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_scale_can_be_changed_and_set_back():
    layer, x = make_layer(adapters=("a", "b")), torch.randn(3, 6)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    layer.scale_layer(2)
    layer.scale_layer(3)
    assert layer.scaling == {"a": 24.0, "b": 4.0}
    torch.testing.assert_close(layer(x), base + 6 * delta)
    layer.unscale_layer(2)
    assert layer.scaling["a"] == 12.0
    layer.set_scale("a", 0.5)
    layer.set_scale("nobody", 7)
    torch.testing.assert_close(layer(x), base + 0.5 * delta)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), base + delta)
    scaling = layer.scaling
    scaling["a"] = 8.0
    torch.testing.assert_close(layer(x), base + 2 * delta)
    with pytest.raises(TypeError, match="use delete_adapter"):
        del scaling["a"]
    layer.delete_adapter("b")
    assert scaling == {"a": 8.0}


def test_merging_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="cannot be merged: the router weighs the experts anew for every token"):
        make_layer().merge()


def test_unmerging_warns_that_nothing_is_merged():
    with pytest.warns(UserWarning, match="Already unmerged"):
        make_layer().unmerge()
