import pytest
import torch

from peft_loramoe import routing
from peft_loramoe.analysis import group_weights, router_statistics
from tiny import loramoe, tiny_llama, token_batch


def batch(seed, types):
    return {**token_batch(seed=seed), "task_types": torch.tensor(types)}


BATCHES = [batch(0, [0, 1, 0]), batch(1, [1, 1, -1])]


def by_key(records):
    return {(r["layer"], r["task_type"], r["expert"]): r["weight"] for r in records}


def test_weights_are_means_over_real_tokens_of_a_type():
    model = loramoe().eval()
    records = router_statistics(model, BATCHES)
    sums, counts = {}, {}
    with torch.no_grad():
        for inputs in BATCHES:
            model(**inputs)
            for layer in routing(model):
                for sample, task_type in enumerate(layer.task_types.tolist()):
                    key = (layer.layer, task_type)
                    sums[key] = sums.get(key, 0) + layer.importance[sample].double()
                    counts[key] = counts.get(key, 0) + layer.token_counts[sample].item()
    expected = {(*key, expert): sums[key][expert].item() / counts[key] for key in sums for expert in range(6)}
    assert by_key(records) == pytest.approx(expected, abs=1e-6)
    assert {key[1] for key in expected} == {-1, 0, 1}


def test_result_does_not_depend_on_batching():
    model = loramoe()
    one = {name: torch.cat([inputs[name] for inputs in BATCHES]) for name in BATCHES[0]}
    assert by_key(router_statistics(model, [one])) == pytest.approx(by_key(router_statistics(model, BATCHES)), abs=1e-6)


def test_records_have_the_groups_of_their_layer():
    model = loramoe(num_experts=5, expert_groups=[2, 3], num_experts_pattern={"down_proj": [1, 2]})
    groups = {}
    for record in router_statistics(model, BATCHES[:1]):
        if record["task_type"] == 0:
            groups.setdefault(record["layer"].rpartition(".")[2], {})[record["expert"]] = record["group"]
        assert record["adapter"] == "default"
    assert groups["up_proj"] == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert groups["down_proj"] == {0: 0, 1: 1, 2: 1}


def test_batches_without_task_types_are_of_unknown_type():
    records = router_statistics(loramoe(), [token_batch()])
    assert {record["task_type"] for record in records} == {-1}


def test_packed_rows_count_each_segment_by_its_type():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    inputs = {"input_ids": token_batch(1)["input_ids"], "position_ids": positions, "task_types": types}
    records = router_statistics(loramoe(), [inputs])
    assert {record["task_type"] for record in records} == {0, 1}


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


def test_weights_of_a_layer_sum_to_one():
    records = router_statistics(loramoe(), BATCHES)
    for per_layer in (False, True):
        sums = {}
        for record in group_weights(records, per_layer):
            key = (record.get("layer"), record["task_type"])
            sums[key] = sums.get(key, 0) + record["weight"]
        assert all(total == pytest.approx(1) for total in sums.values())


def test_models_without_routers_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        router_statistics(tiny_llama(), BATCHES)
    with pytest.raises(ValueError, match="No router ran: pass at least one batch"):
        router_statistics(loramoe(), [])
    model = loramoe()
    with pytest.raises(ValueError, match="No router ran"), model.disable_adapter():
        router_statistics(model, BATCHES)
