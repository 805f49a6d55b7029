import math

import pytest
import torch
from transformers import AlbertConfig, AlbertModel

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import RouterStatistics, expert_usage, group_weights, router_statistics
from peft_loramoe.experts import LoRAExperts
from tiny import labelled, loramoe, tiny_llama, token_batch


def batch(seed, types, **shape):
    return {**token_batch(rows=len(types), seed=seed, **shape), "task_types": torch.tensor(types)}


BATCHES = [batch(0, [0, 1, 0]), batch(1, [1, 1, -1], width=5), batch(2, [0, 0, 0, 1, 1], width=9)]


def observed(model, batches, samples):
    """Router probabilities of each sample's real tokens by (adapter, layer, task type), read by hooks of the test's
    own.

    `samples` gives, for each batch, its samples: (task type, row, columns).
    """
    outputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, LoRAExperts):
            layer, adapter = name.removeprefix("base_model.model.").split(".loramoe_experts.")
            calls = outputs.setdefault((adapter, layer), [])
            handles.append(
                module.register_forward_hook(lambda m, args, output, calls=calls: calls.append(output[1].double()))
            )
    model.eval()
    for inputs in batches:
        with torch.no_grad():
            model(**{name: value for name, value in inputs.items() if name != "task_types"})
    for handle in handles:
        handle.remove()
    seen = {}
    for key, calls in outputs.items():
        for probabilities, of_batch in zip(calls, samples):
            for task_type, row, columns in of_batch:
                seen.setdefault((*key, task_type), []).append(probabilities[row, columns])
    return seen


def rows_of(batches):
    """The samples of right-padded batches: each row's real tokens."""
    return [
        [
            (t, row, slice(0, int(mask.sum())))
            for row, (t, mask) in enumerate(zip(b["task_types"].tolist(), b["attention_mask"]))
        ]
        for b in batches
    ]


def check(statistics, seen):
    """Compare statistics with the probabilities of every sample."""
    found = {}
    for record in statistics.experts:
        key = (record["adapter"], record["layer"], record["task_type"])
        found.setdefault(key, []).append((record["weight"], record["importance"]))
    assert found.keys() == seen.keys()
    layers = {(r["adapter"], r["layer"], r["task_type"]): r for r in statistics.layers}
    assert layers.keys() == seen.keys() and len(layers) == len(statistics.layers)
    for key, samples in seen.items():
        tokens = torch.cat(samples)
        weight, importance = tokens.mean(0), torch.stack([sample.mean(0) for sample in samples]).mean(0)
        expected = zip(weight.tolist(), importance.tolist())
        assert found[key] == [pytest.approx(weight_and_importance, abs=1e-6) for weight_and_importance in expected]
        record = layers[key]
        assert (record["samples"], record["tokens"], record["num_experts"]) == (
            len(samples),
            len(tokens),
            tokens.shape[1],
        )
        assert record["entropy"] == pytest.approx(-(tokens * tokens.log()).sum(-1).mean().item(), abs=1e-6)
        assert record["load_entropy"] == pytest.approx(-(weight * weight.log()).sum().item(), abs=1e-6)


def test_statistics_are_means_over_the_real_tokens_and_samples_of_a_type():
    model = loramoe()
    seen = observed(model, BATCHES, rows_of(BATCHES))
    assert {key[2] for key in seen} == {-1, 0, 1} and len({key[1] for key in seen}) == 6
    check(router_statistics(model, BATCHES), seen)


def test_left_padding_does_not_count():
    left = [{name: value.flip(-1) if value.dim() == 2 else value for name, value in b.items()} for b in BATCHES]
    samples = [
        [(t, row, slice(width - columns.stop, width)) for t, row, columns in of_batch]
        for of_batch, width in zip(rows_of(BATCHES), (7, 5, 9))
    ]
    model = loramoe()
    check(router_statistics(model, left), observed(model, left, samples))


@pytest.mark.parametrize("task_types", [(1, 0, 1), (1, -1, -1), None])
def test_each_segment_of_a_packed_row_is_a_sample(task_types):
    inputs = {
        "input_ids": token_batch(rows=1, width=9)["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]),
    }
    if task_types is not None:
        inputs["task_types"] = torch.tensor(task_types).repeat_interleave(torch.tensor([3, 2, 4]))[None]
    model = loramoe()
    samples = list(zip(task_types or (-1, -1, -1), (0, 0, 0), (slice(0, 3), slice(3, 5), slice(5, 9))))
    without_cache = {**inputs, "use_cache": False}  # with one, transformers lets the samples of a row see each other
    check(router_statistics(model, [inputs]), observed(model, [without_cache], [samples]))


def test_batches_without_task_types_are_of_unknown_type():
    model, inputs = loramoe(), token_batch()
    check(
        router_statistics(model, [inputs]),
        observed(model, [inputs], rows_of([{**inputs, "task_types": -torch.ones(3)}])),
    )


def test_every_active_adapter_has_its_statistics():
    model = loramoe(task_type_names=["facts", "tasks"])
    torch.manual_seed(5)
    model.add_adapter("other", LoRAMoEConfig(r=1, num_experts=3, expert_groups=[1, 2], init_weights=False))
    model.add_adapter("idle", LoRAMoEConfig(r=1, num_experts=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    statistics = router_statistics(model, BATCHES)
    seen = observed(model, BATCHES, rows_of(BATCHES))
    assert {key[0] for key in seen} == {"default", "other"}
    check(statistics, seen)
    assert statistics.task_type_names == {"default": ["facts", "tasks"], "other": None}


def test_null_experts_are_marked_and_have_their_weight():
    model = loramoe(num_experts=4, expert_groups=[1, 1, 2], null_groups=[0, 2])
    statistics = router_statistics(model, BATCHES)
    check(statistics, observed(model, BATCHES, rows_of(BATCHES)))
    assert {(r["expert"], r["group"], r["null"]) for r in statistics.experts} == {
        (0, 0, True),
        (1, 1, False),
        (2, 2, True),
        (3, 2, True),
    }


def test_a_layer_that_is_used_several_times_counts_a_token_each_time():
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = loramoe(AlbertModel(config), target_modules=["ffn"], task_type=None)
    (record,) = router_statistics(model, [token_batch()]).layers
    assert (record["samples"], record["tokens"]) == (3 * 3, 3 * (7 + 6 + 5))


def test_records_follow_the_models_layers():
    order = [(r["layer"], r["task_type"]) for r in router_statistics(loramoe(), BATCHES).layers]
    layers = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]
    assert order == [(layer, task_type) for layer in layers for task_type in (-1, 0, 1)]


def test_records_have_the_groups_of_their_layer():
    model = loramoe(num_experts=5, expert_groups=[2, 3], num_experts_pattern={"down_proj": [1, 2]})
    groups = {}
    for record in router_statistics(model, [batch(0, [0, 0])]).experts:
        groups.setdefault(record["layer"].rpartition(".")[2], {})[record["expert"]] = record["group"]
    assert groups["up_proj"] == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert groups["down_proj"] == {0: 0, 1: 1, 2: 1}


def test_records_name_block_and_kind_of_their_linear():
    model = loramoe(target_modules=["up_proj", "down_proj", "lm_head"])
    names = {r["layer"]: (r["block"], r["linear"]) for r in router_statistics(model, BATCHES).layers}
    blocks = {f"model.layers.{i}.mlp.{kind}": (i, kind) for i in (0, 1) for kind in ("up_proj", "down_proj")}
    assert names == {**blocks, "lm_head": (None, "lm_head")}


def logits_shapes(model, batches):
    """The shapes of the logits that the model computes while its statistics are taken."""
    shapes = []
    handle = model.get_base_model().register_forward_hook(
        lambda m, args, output: shapes.append(tuple(output.logits.shape))
    )
    router_statistics(model, batches)
    handle.remove()
    return shapes


def test_logits_that_nobody_reads_are_not_computed():
    assert logits_shapes(loramoe(), BATCHES[:1]) == [(3, 1, 64)]


def test_a_loss_gets_its_logits():
    assert logits_shapes(loramoe(), [labelled(BATCHES[0])]) == [(3, 7, 64)]


def test_an_adapted_head_reads_every_token():
    model = loramoe(target_modules=["lm_head"])
    check(router_statistics(model, BATCHES), observed(model, BATCHES, rows_of(BATCHES)))


def test_no_cache_is_made():
    model, caches = loramoe(), []
    model.get_base_model().register_forward_hook(lambda m, args, output: caches.append(output.past_key_values))
    router_statistics(model, BATCHES[:1])
    assert caches == [None]


def test_statistics_can_be_saved(tmp_path):
    statistics = router_statistics(loramoe(), BATCHES)
    statistics.save(tmp_path / "statistics.json")
    assert RouterStatistics.load(tmp_path / "statistics.json") == statistics


def test_entropies_are_in_their_order():
    for record in router_statistics(loramoe(), BATCHES).layers:
        assert 0 < record["entropy"] <= record["load_entropy"] <= math.log(record["num_experts"])


def test_batches_may_come_one_by_one():
    assert router_statistics(loramoe(), (inputs for inputs in BATCHES)) == router_statistics(loramoe(), BATCHES)


def test_dropout_is_off_and_the_mode_is_restored():
    model = loramoe(lora_dropout=0.5).train()
    model.base_model.model.lm_head.eval()
    first, second = router_statistics(model, BATCHES), router_statistics(model, BATCHES)
    assert first == second
    assert model.training and not model.base_model.model.lm_head.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mode_is_restored_after_an_error():
    model = loramoe().train()
    with pytest.raises(ValueError, match="task_types"):
        router_statistics(model, [batch(0, [0, 1, 9])])
    assert model.training


def test_models_without_routers_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        router_statistics(tiny_llama(), BATCHES)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="No router ran: pass at least one batch"):
        router_statistics(loramoe(), [])


def test_disabled_adapters_are_refused():
    model = loramoe()
    with pytest.raises(ValueError, match=r"No router ran.*keep a LoRAMoE adapter enabled"), model.disable_adapter():
        router_statistics(model, BATCHES)


@pytest.mark.parametrize(("batches", "name"), [(BATCHES[0], "str"), ([torch.ones(1, 3)], "Tensor")])
def test_batches_that_are_no_dictionaries_are_refused(batches, name):
    with pytest.raises(TypeError, match=f"batches yielded a {name}; it must yield dictionaries"):
        router_statistics(loramoe(), batches)


def test_probabilities_that_are_not_finite_are_refused():
    model = loramoe()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.loramoe_experts["default"].router.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"adapter 'default' in layer 'model\.layers\.1\.mlp\.up_proj' are not finite"
    ):
        router_statistics(model, BATCHES)


# --- weights of groups


def test_group_weights_sum_experts_and_average_layers():
    records = [
        {"adapter": "a", "layer": layer, "task_type": 0, "expert": expert, "group": expert // 2, "weight": weight}
        for layer, weights in (("x", (0.1, 0.2, 0.3, 0.4)), ("y", (0.3, 0.2, 0.5, 0.0)))
        for expert, weight in enumerate(weights)
    ]
    over_layers = group_weights(records)
    assert [record["group"] for record in over_layers] == [0, 1]
    assert [record["weight"] for record in over_layers] == pytest.approx([0.4, 0.6])
    in_layers = {(r["layer"], r["group"]): r["weight"] for r in group_weights(records, per_layer=True)}
    assert in_layers == pytest.approx({("x", 0): 0.3, ("x", 1): 0.7, ("y", 0): 0.5, ("y", 1): 0.5})


@pytest.mark.parametrize("per_layer", [False, True])
def test_weights_of_a_layer_sum_to_one(per_layer):
    sums = {}
    for record in group_weights(router_statistics(loramoe(), BATCHES).experts, per_layer):
        key = (record.get("layer"), record["task_type"])
        sums[key] = sums.get(key, 0) + record["weight"]
    assert sums == {key: pytest.approx(1) for key in sums}


# --- usage of experts


def statistics_of(**weights_by_type):
    """Statistics of layers: name -> the experts' weights for each task type; the last expert is null."""
    fields = {"adapter": "default"}
    experts = [
        {
            **fields,
            "layer": layer,
            "task_type": t,
            "expert": n,
            "group": n // 2,
            "null": n == len(weights) - 1,
            "weight": weight,
        }
        for layer, of_types in weights_by_type.items()
        for t, weights in enumerate(of_types)
        for n, weight in enumerate(weights)
    ]
    layers = [
        {**fields, "layer": layer, "task_type": t, "num_experts": len(weights)}
        for layer, of_types in weights_by_type.items()
        for t, weights in enumerate(of_types)
    ]
    return RouterStatistics(experts, layers, {"default": None})


def statuses(statistics, **thresholds):
    return [record["status"] for record in expert_usage(statistics, **thresholds)]


def test_usage_tells_dead_and_dominating_experts():
    weights = ((0.9, 0.005, 0.075, 0.02), (0.7, 0.01, 0.26, 0.03))  # the limits are 0.025 and 0.625
    assert expert_usage(statistics_of(up_proj=weights)) == [
        {
            "adapter": "default",
            "layer": "up_proj",
            "expert": expert,
            "group": expert // 2,
            "null": expert == 3,
            "weight": weight,
            "least_weight": least,
            "even": 0.25,
            "status": status,
        }
        for expert, (weight, least, status) in enumerate(
            [(0.9, 0.7, "dominating"), (0.01, 0.005, "dead"), (0.26, 0.075, "used"), (0.03, 0.02, "used")]
        )
    ]


def test_an_expert_of_one_task_type_is_neither_dead_nor_dominating():
    assert statuses(statistics_of(up_proj=((0.99, 0.01), (0.01, 0.99)))) == ["used", "used"]


def test_each_layer_has_its_own_even_weight():
    assert statuses(statistics_of(two=((0.97, 0.03),), five=((0.24, 0.24, 0.24, 0.25, 0.03),))) == [
        *("dominating", "dead"),
        *("used", "used", "used", "used", "used"),
    ]


def test_null_experts_can_dominate():
    assert statuses(statistics_of(up_proj=((0.1, 0.1, 0.8),))) == ["used", "used", "dominating"]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ({}, ["used", "used", "used"]),
        ({"dead": 0.5}, ["used", "used", "dead"]),
        ({"dominating": 0.3}, ["dominating", "used", "used"]),  # above 1/3 + 0.3 * 2/3 = 0.53
        ({"dead": 0.0}, ["used", "used", "used"]),
    ],
)
def test_thresholds_of_usage(thresholds, expected):
    assert statuses(statistics_of(up_proj=((0.6, 0.3, 0.1),)), **thresholds) == expected


@pytest.mark.parametrize("dead", [-0.1, 1.0])
def test_a_share_for_dead_experts_out_of_range_is_refused(dead):
    with pytest.raises(ValueError, match=rf"dead={dead} must be in \[0, 1\)"):
        expert_usage(statistics_of(), dead=dead)


@pytest.mark.parametrize("dominating", [0.0, 1.5])
def test_a_share_for_dominating_experts_out_of_range_is_refused(dominating):
    with pytest.raises(ValueError, match=rf"dominating={dominating} must be in \(0, 1\]"):
        expert_usage(statistics_of(), dominating=dominating)
