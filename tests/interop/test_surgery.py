import json
import warnings

import pytest
import torch
from peft import PeftModel

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss
from peft_loramoe.interop import add_experts, list_experts, merge_experts, remove_experts, reorder_experts
from tiny import labelled, loramoe, tiny_llama, token_batch


CALIBRATION = [token_batch(), token_batch(8, 12, seed=5)]
UP = "base_model.model.model.layers.0.mlp.up_proj"


def strong(**options):
    """A mixture whose effect on the logits is not small, and whose routers decide."""
    model = loramoe(**{"lora_alpha": 16, "num_experts": 4, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router"):
                parameter.mul_(10)
    return model


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**token_batch()).logits


def experts_of(model, layer=UP, adapter="default"):
    return model.get_submodule(layer).loramoe_experts[adapter]


def assert_same(model, before):
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)


ADDITIONS = {
    "as many": (dict(), dict(), [2, 2, 4], None, None),
    "twice as many": (dict(), dict(count=8), [2, 2, 8], None, None),
    "into a group": (dict(), dict(count=4, group=0), [6, 2], None, None),
    "filled up": (dict(), dict(count=3, fill_with_null=True), [2, 2, 3, 1], [3], None),
    "filled up in the null group": (dict(null_groups=[0]), dict(count=1, fill_with_null=True), [5, 2, 1], [0], None),
    "top_k": (dict(top_k=2), dict(), [2, 2, 4], None, 4),
    "top_k, twice as many": (dict(top_k=1), dict(count=8), [2, 2, 8], None, 3),
    "router of zeros": (dict(router_init="zeros"), dict(count=1), [2, 2, 1], None, None),
    "scaled": (dict(use_rslora=True, router_temperature=0.5), dict(), [2, 2, 4], None, None),
}


@pytest.mark.parametrize("options, addition, groups, null_groups, top_k", ADDITIONS.values(), ids=ADDITIONS)
def test_exact_addition_keeps_outputs_and_config(options, addition, groups, null_groups, top_k):
    model = strong(**options)
    before = logits(model)
    change = add_experts(model, calibration=CALIBRATION, **addition)
    assert_same(model, before)
    assert change.relative_error < 1e-5
    config = model.peft_config["default"]
    assert (config.num_experts, config.expert_groups) == (sum(groups), groups)
    assert (config.null_groups, config.top_k) == (null_groups, top_k)


def test_doubling_is_exact_in_every_layer_to_the_rounding_of_sums():
    change = add_experts(strong(), calibration=CALIBRATION)
    assert all(layer.relative_error < 1e-6 for layer in change.layers)


def test_new_experts_start_from_zero_and_are_trained():
    model = strong()
    add_experts(model)
    experts = experts_of(model)
    assert not experts.B[:, 8:].any() and experts.A[8:].any(dim=1).all()
    assert len({tuple(row) for row in experts.A.tolist()}) == 16
    model.train()
    model(**labelled(token_batch()), task_types=torch.tensor([0, 1, 2])).loss.backward()
    assert experts.B.grad[:, 8:].any(dim=0).all() and experts.router.grad[4:].any(dim=1).all()


def test_nearest_addition_adds_just_the_count_with_the_error_that_it_reports():
    model = strong()
    layer, batch = model.get_submodule(UP), CALIBRATION[1]
    old, seen = layer.loramoe_experts["default"], []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        change = add_experts(model, 1, start="nearest", group=1, calibration=[batch])
        x = seen[0][batch["attention_mask"].bool()]
        before, after = old(x)[0], layer.loramoe_experts["default"](x)[0]
    assert model.peft_config["default"].expert_groups == [2, 3]
    measured = {one.layer: one.relative_error for one in change.layers}["model.layers.0.mlp.up_proj"]
    assert measured == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
    assert 1e-4 < measured < 0.2


def test_nearest_addition_is_nearer_than_repeating_a_row():
    model = strong()
    layer = model.get_submodule(UP)
    old = layer.loramoe_experts["default"]
    change = add_experts(model, 1, start="nearest", calibration=CALIBRATION)
    new = layer.loramoe_experts["default"]
    measured = {one.layer: one.relative_error for one in change.layers}["model.layers.0.mlp.up_proj"]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    x = seen[0][token_batch()["attention_mask"].bool()]
    with torch.no_grad():
        target = old(x)[0]
        new.router[-1] = new.router[0]
        new.B[:, :8] = old.B
        assert (new(x)[0] - target).norm() / target.norm() > 2 * measured


def test_nearest_addition_to_equal_gates_is_exact():
    model = strong(router_init="zeros")
    before = logits(model)
    add_experts(model, 3, start="nearest", calibration=CALIBRATION)
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)  # up to the ridge


def test_removal_renormalises_the_gates():
    model = strong()
    layer, x = model.get_submodule(UP), torch.randn(5, 32)
    with torch.no_grad():
        probabilities = layer.loramoe_experts["default"](x)[1]
        remove_experts(model, [1])
        left = layer.loramoe_experts["default"](x)[1]
    kept = probabilities[:, [0, 2, 3]]
    torch.testing.assert_close(left, kept / kept.sum(-1, keepdim=True))


def test_removal_keeps_the_others_tensors():
    model = strong()
    A, B = experts_of(model).A.detach(), experts_of(model).B.detach()
    remove_experts(model, [1, 2])
    torch.testing.assert_close(experts_of(model).A.detach(), A[[0, 1, 6, 7]], atol=0, rtol=0)
    torch.testing.assert_close(experts_of(model).B.detach(), B[:, [0, 1, 6, 7]], atol=0, rtol=0)


def test_removal_of_an_expert_that_adds_nothing_scales_the_others():
    model = strong(router_init="zeros")
    with torch.no_grad():
        for module in adapted(model):
            module.loramoe_experts["default"].B[:, 6:] = 0
    change = remove_experts(model, [3], calibration=CALIBRATION)
    assert [layer.relative_error for layer in change.layers] == pytest.approx(
        [1 / 3] * 6, rel=1e-4
    )  # gates 1/4 -> 1/3


def adapted(model):
    return [module for module in model.modules() if isinstance(module, LoRAMoELinear)]


def test_a_group_without_experts_disappears_with_its_name():
    model = strong(expert_groups=[1, 2, 1], null_groups=[2], task_type_names=["a", "b", "c"])
    remove_experts(model, [0])
    config = model.peft_config["default"]
    assert (config.expert_groups, config.null_groups, config.task_type_names) == ([2, 1], [1], ["b", "c"])


def test_null_experts_can_be_removed():
    model = strong(expert_groups=[1, 3], null_groups=[0])
    remove_experts(model, [0])
    config = model.peft_config["default"]
    assert (config.expert_groups, config.null_groups, experts_of(model).A.shape[0]) == ([3], None, 6)


def test_removal_lowers_top_k_with_a_warning():
    model = strong(top_k=3)
    with pytest.warns(UserWarning, match="top_k=3 is lowered to 2"):
        remove_experts(model, [0, 2])
    assert model.peft_config["default"].top_k == experts_of(model).options.top_k == 2


@pytest.mark.parametrize(
    "options, order, groups, null_groups, names",
    [
        (dict(), [1, 0, 3, 2], [2, 2], None, ["a", "b"]),
        (dict(expert_groups=[1, 3], null_groups=[0]), [3, 1, 2, 0], [3, 1], [1], ["b", "a"]),
        (dict(expert_groups=[1, 3], top_k=2), [0, 2, 3, 1], [1, 3], None, ["a", "b"]),
    ],
)
def test_reordering_keeps_outputs(options, order, groups, null_groups, names):
    model = strong(task_type_names=["a", "b"], **options)
    before, router = logits(model), experts_of(model).router.detach()
    reorder_experts(model, order)
    assert_same(model, before)
    config = model.peft_config["default"]
    assert (config.expert_groups, config.null_groups, config.task_type_names) == (groups, null_groups, names)
    torch.testing.assert_close(experts_of(model).router.detach(), router[order], atol=0, rtol=0)


def twins(**options):
    """Experts 0 and 1 are the same."""
    model = strong(**options)
    with torch.no_grad():
        for module in adapted(model):
            experts = module.loramoe_experts["default"]
            experts.A[2:4], experts.B[:, 2:4] = experts.A[:2], experts.B[:, :2]
            experts.router[1] = experts.router[0]
    return model


def test_merging_equal_experts_of_equal_gates_is_exact():
    model = twins(router_init="zeros")
    before = logits(model)
    merge_experts(model, 0, 1)
    assert_same(model, before)
    assert model.peft_config["default"].expert_groups == [1, 2]


def test_merged_weight_is_the_closest_of_its_rank():
    model = strong(top_k=4)  # with top_k nothing is rescaled without data
    A, B = experts_of(model).A.detach(), experts_of(model).B.detach()
    mean = (B[:, :2] @ A[:2] + B[:, 2:4] @ A[2:4]) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merge_experts(model, 1, 0)
    U, S, V = torch.linalg.svd(mean)
    new = experts_of(model)
    torch.testing.assert_close((new.B[:, :2] @ new.A[:2]).detach(), (U[:, :2] * S[:2]) @ V[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(top_k=2)], ids=["dense", "top_k"])
def test_merging_on_data_is_nearer_than_without(options):
    def error(calibration):
        model, batch, inputs = strong(**options), CALIBRATION[1], {}
        olds = {module: module.loramoe_experts["default"] for module in adapted(model)}
        handles = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m in olds]
        with torch.no_grad():
            model(**batch)
            for handle in handles:
                handle.remove()
            merge_experts(model, 0, 1, calibration=calibration)
            real = batch["attention_mask"].bool()
            changes = [(m.loramoe_experts["default"](x)[0] - olds[m](x)[0])[real] for m, x in inputs.items()]
        return sum(change.square().sum().item() for change in changes)

    assert error([CALIBRATION[1]]) < error(None)


def test_an_expert_that_the_data_never_uses_is_not_rescaled():
    model = strong(num_experts=5, expert_groups=[2, 3], top_k=1)
    with torch.no_grad():
        for module in adapted(model):
            router = module.loramoe_experts["default"].router
            router[4] = router[2:4].mean(0)  # never the largest
    B = experts_of(model).B[:, 8:].detach().clone()
    merge_experts(model, 0, 1, calibration=CALIBRATION)
    torch.testing.assert_close(experts_of(model).B[:, 6:].detach(), B)


def test_merged_router_row_is_weighted_by_load():
    model = strong()
    rows = experts_of(model).router.detach()
    load = [r["load"] for r in list_experts(model, CALIBRATION) if r["layer"] == "model.layers.0.mlp.up_proj"]
    merge_experts(model, 2, 3, calibration=CALIBRATION)
    expected = (load[2] * rows[2] + load[3] * rows[3]) / (load[2] + load[3])
    torch.testing.assert_close(experts_of(model).router[2].detach(), expected)


def test_listing_gives_the_mean_router_probabilities_of_real_tokens():
    model = strong(expert_groups=[1, 3], null_groups=[0], task_type_names=["a", "b"])
    batch, seen = token_batch(), []
    handle = model.get_submodule(UP).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    expected = (seen[0][batch["attention_mask"].bool()] @ experts_of(model).router.T).softmax(-1).mean(0)
    records = [r for r in list_experts(model, [batch]) if r["layer"] == "model.layers.0.mlp.up_proj"]
    assert [r["load"] for r in records] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [(r["expert"], r["group"], r["task_type"], r["null"]) for r in records] == [
        (0, 0, "a", True),
        (1, 1, "b", False),
        (2, 1, "b", False),
        (3, 1, "b", False),
    ]


def test_listing_without_data_has_no_load():
    assert {record["load"] for record in list_experts(strong())} == {None}


OPERATIONS = {
    "add": lambda model: add_experts(model),
    "add, filled up": lambda model: add_experts(model, 1, fill_with_null=True),
    "nearest": lambda model: add_experts(model, 2, start="nearest", calibration=CALIBRATION),
    "remove": lambda model: remove_experts(model, [0]),
    "reorder": lambda model: reorder_experts(model, [1, 0, 2, 3]),
    "merge": lambda model: merge_experts(model, 2, 3),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_changed_adapters_are_saved_and_loaded(tmp_path, operation):
    model = strong(rank_pattern={"up_proj": 3})
    operation(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    assert loaded.peft_config["default"].expert_groups == list(experts_of(model).groups.sizes)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_changed_adapters_train_with_the_balance_term(operation):
    model = strong()
    operation(model)
    model.train()
    types = torch.tensor([0, 1, len(model.peft_config["default"].expert_groups) - 1])
    model(**labelled(token_batch()), task_types=types).loss.backward()
    assert balance_loss(model) > 0
    assert all(p.grad is not None for module in adapted(model) for p in module.loramoe_experts.parameters())


@pytest.mark.parametrize(
    "pattern", [{"down_proj": [2, 3]}, {"down_proj": 6, "up_proj": 4, "gate_proj": [1, 1]}], ids=["some", "all"]
)
def test_layers_of_other_sizes_keep_their_patterns(tmp_path, pattern):
    model = strong(num_experts_pattern=pattern)
    before = logits(model)
    add_experts(model)
    assert_same(model, before)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny_llama(), tmp_path), before)
    assert set(model.peft_config["default"].num_experts_pattern) == set(pattern)


def test_what_is_frozen_stays_frozen_and_scales_stay():
    model = strong()
    experts = experts_of(model)
    experts.A.requires_grad_(False)
    model.get_submodule(UP).set_scale("default", 0.5)
    scale = experts.scaling
    remove_experts(model, [0])
    new = experts_of(model)
    assert (new.A.requires_grad, new.B.requires_grad, new.router.requires_grad) == (False, True, True)
    assert (new.scaling, new.initial_scaling) == (scale, 2 * scale)


def test_dtype_of_the_adapter_is_kept():
    model = strong()
    for module in adapted(model):
        module.loramoe_experts.to(torch.bfloat16)
    merge_experts(model, 0, 1, calibration=CALIBRATION)
    add_experts(model)
    assert {p.dtype for module in adapted(model) for p in module.loramoe_experts.parameters()} == {torch.bfloat16}


def test_other_adapters_are_left_alone():
    model = strong()
    model.add_adapter("other", LoRAMoEConfig(r=2, init_weights=False))
    other = experts_of(model, adapter="other")
    remove_experts(model, [0], adapter_name="default")
    assert experts_of(model, adapter="other") is other
    assert model.peft_config["other"].num_experts == 6


def test_results_are_ready_for_json():
    change = remove_experts(strong(), [0], calibration=CALIBRATION)
    assert json.loads(json.dumps(change.to_dict()))["layers"][0]["expert_groups"] == [1, 2]


def test_a_new_group_takes_its_name():
    model = strong(task_type_names=["a", "b"])
    add_experts(model, 3, name="c", fill_with_null=True)
    assert model.peft_config["default"].task_type_names == ["a", "b", "c", "null"]


ADD = add_experts
ERRORS = [
    (
        dict(),
        ADD,
        dict(count=3),
        "count=3 experts cannot be added to the 4 .* multiple of 4. Add 4; .* adds 1 null experts",
    ),
    (dict(top_k=2, router_init="zeros"), ADD, dict(count=1), "multiple of 4. Add 4"),
    (dict(), ADD, dict(start="close"), "start='close' is not one of 'exact', 'nearest'"),
    (dict(), ADD, dict(start="nearest", calibration=CALIBRATION), "start='nearest' needs count"),
    (dict(), ADD, dict(start="nearest", count=1), "start='nearest' needs calibration data"),
    (dict(), ADD, dict(count=0), "count=0 must be a positive integer"),
    (dict(), ADD, dict(count=True), "count=True must be a positive integer"),
    (
        dict(),
        ADD,
        dict(group=2),
        r"group=2 is not a group of LoRA experts of adapter 'default'; choose one of \[0, 1\]",
    ),
    (dict(null_groups=[0]), ADD, dict(group=0), r"group=0 is not a group of LoRA experts .*\[1\]"),
    (dict(task_type_names=["a", "b"]), ADD, dict(), r"name=None with group=None and task_type_names=\['a', 'b'\]"),
    (dict(), ADD, dict(name="c"), "name='c' with group=None and task_type_names=None"),
    (dict(task_type_names=["a", "b"]), ADD, dict(name="c", group=1), "name='c' with group=1"),
    (dict(task_type_names=["a", "b"]), ADD, dict(name="a"), "must be 3 different names"),
    (
        dict(num_experts_pattern={"down_proj": 2}, top_k=1),
        ADD,
        dict(count=4),
        "count=4 with top_k=1: the layers differ",
    ),
    (
        dict(),
        add_experts,
        dict(count=1, start="nearest", fill_with_null=True, calibration=CALIBRATION),
        "fill_with_null=True has no effect with start='nearest'.*leave it out, or set start='exact'",
    ),
    (dict(), add_experts, dict(fill_with_null=True), "fill_with_null=True has no effect without count.*Set count"),
    (dict(), remove_experts, dict(experts=[4]), "Expert 4 is unknown; layer '.*' has the experts 0 to 3"),
    (dict(), remove_experts, dict(experts=[-1]), "Expert -1 is unknown"),
    (dict(), remove_experts, dict(experts=[]), "experts is empty"),
    (dict(), remove_experts, dict(experts=[0, 1, 3]), "would have 1 expert; a router needs at least 2"),
    (dict(null_groups=[0]), remove_experts, dict(experts=[2, 3]), r"experts=\[2, 3\] are all LoRA experts"),
    (
        dict(num_experts_pattern={"down_proj": [1, 3]}),
        remove_experts,
        dict(experts=[0]),
        "layers would differ in their groups",
    ),
    (dict(), reorder_experts, dict(order=[0, 1, 2]), r"order=\[0, 1, 2\] must contain each expert of .*, 0 to 3"),
    (dict(), reorder_experts, dict(order=[0, 2, 1, 3]), "split: the groups of its experts would be"),
    (dict(), merge_experts, dict(first=1, second=1), "first=1 and second=1 are the same expert"),
    (
        dict(),
        merge_experts,
        dict(first=1, second=2),
        "Experts 1 and 2 of layer .* belong to different groups, 0 and 1",
    ),
    (dict(), merge_experts, dict(first=0, second=7), "Expert 7 is unknown"),
    (
        dict(null_groups=[0]),
        merge_experts,
        dict(first=0, second=1),
        "Expert 0 of layer .* is null and cannot be merged",
    ),
    (dict(num_experts=2, expert_groups=[2]), merge_experts, dict(first=0, second=1), "would have 1 expert"),
    (dict(), list_experts, dict(adapter_name="absent"), "adapter_name='absent' is not a LoRAMoE adapter"),
]


@pytest.mark.parametrize("options, operation, arguments, match", ERRORS)
def test_errors_change_nothing(options, operation, arguments, match):
    model = strong(**options)
    before, config = logits(model), model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=match):
        operation(model, **arguments)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert model.peft_config["default"].to_dict() == config
