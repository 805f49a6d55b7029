"""torch.compile and torch.export: one graph, the same numbers."""

import pytest
import torch

from peft_loramoe import balance_loss, collect_balance
from peft_loramoe.ops.mixture import COMPILE_AS_CUSTOM_OP
from tiny import labelled, loramoe, tiny_llama, token_batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2, "null_groups": [0], "balance_detach": True}], ids=["dense", "sparse"]
)
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_gradients(options):
    batch, task_types = labelled(token_batch()), torch.tensor([0, 1, -1])
    results = []
    for compiled in (False, True):
        model = loramoe(**options)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = call(**batch, task_types=task_types).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1])


def graphs(model, collected=False, dynamic=None):
    """How often dynamo compiles a model that is called with batches of many sizes."""
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    adapted = hasattr(model, "peft_config")
    for width in range(5, 10):
        batch, types = labelled(token_batch(width=width)), torch.tensor([0, 1, width % 2])
        if not adapted:
            compiled(**batch).loss.backward()
        elif collected:
            with collect_balance(model, types):
                loss = compiled(**batch).loss
            (loss + balance_loss(model)).backward()
        else:
            compiled(**batch, task_types=types).loss.backward()
    return count


@pytest.fixture(scope="module")
def graphs_without_an_adapter():
    return graphs(tiny_llama().train())


@pytest.mark.slow
@pytest.mark.parametrize("collected", [False, True], ids=["in the model's loss", "collected"])
def test_a_compiled_model_is_recompiled_as_often_as_without_the_adapter(collected, graphs_without_an_adapter):
    assert graphs(loramoe(), collected) <= graphs_without_an_adapter


@pytest.mark.slow
@pytest.mark.parametrize("collected", [False, True], ids=["in the model's loss", "collected"])
def test_a_model_compiled_for_all_sizes_is_compiled_once(collected):
    assert graphs(loramoe(), collected, dynamic=True) == 1


def test_an_adapted_layer_compiles_without_a_graph_break():
    layer = loramoe(lora_dropout=0.1).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for call in (layer.eval(), compiled):
        layer.zero_grad()
        call(x).pow(2).sum().backward()
        results.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "null_groups": [0]}], ids=["dense", "sparse"])
def test_a_static_cache_generates_what_a_dynamic_one_does(options):
    model = loramoe(**options).eval()
    prompt = {name: tensor[:1] for name, tensor in token_batch().items()}
    texts = [
        model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, cache_implementation=cache)
        for cache in ("dynamic", "static")
    ]
    assert texts[0].shape == (1, 13)
    assert torch.equal(*texts)


def test_a_compiled_model_decodes_in_one_graph_that_follows_the_weights():
    model, batch = loramoe().eval(), token_batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(**batch).logits
        torch.testing.assert_close(before, model(**batch).logits)
        model.base_model.model.model.layers[0].mlp.up_proj.loramoe_experts["default"].B.data.mul_(5)
        after = compiled(**batch).logits
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model(**batch).logits)


def test_a_warning_does_not_break_the_graph():
    model, batch = loramoe().train(), labelled(token_batch())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="called without task_types"):
        compiled(**batch).loss.backward()


@pytest.mark.skipif(COMPILE_AS_CUSTOM_OP, reason="this torch keeps the operator")
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_an_exported_layer_holds_operations_of_torch_only(strict):
    layer = loramoe().eval().base_model.model.model.layers[0].mlp.up_proj
    lengths = {1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 5, 32),), strict=strict, dynamic_shapes=(lengths,))
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(exported.module()(x), layer(x))
    assert not any("peft_loramoe" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_an_exported_layer_that_is_trained_keeps_its_gradient(strict):
    experts = loramoe(balance_detach=True).base_model.model.model.layers[0].mlp.up_proj.loramoe_experts["default"]
    x = torch.randn(20, 32)
    exported = torch.export.export(experts, (x,), strict=strict).module()
    gradients = []
    for call in (experts, exported):
        leaf = x.clone().requires_grad_()
        output, probabilities = call(leaf)
        (output.pow(2).sum() + probabilities[:, 0].sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_number_of_tokens_that_depends_on_data_compiles():
    experts = loramoe().eval().base_model.model.model.layers[0].mlp.up_proj.loramoe_experts["default"]
    x, chosen = torch.randn(6, 32), torch.tensor([True, False, True, True, False, True])
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, chosen: experts(x[chosen])[0], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, chosen), experts(x[chosen])[0])
