import pytest
import torch

from peft_loramoe import LoRAMoEConfig, routing
from peft_loramoe.analysis import group_weights, router_statistics
from tiny import loramoe, tiny_llama, token_batch


TYPES = torch.tensor([0, 1, -1])


def batches():
    return [{**token_batch(seed=seed), "task_types": TYPES} for seed in (2, 3)]


def test_weights_are_means_over_the_real_tokens_of_a_type():
    model = loramoe(expert_groups=[2, 4]).eval()
    sums, counts = torch.zeros(6), 0
    with torch.no_grad():
        for batch in batches():
            model(**batch)
            first = routing(model)[0]
            sums, counts = sums + first.importance[1], counts + first.token_counts[1]
    records = [r for r in router_statistics(model, batches()) if (r["layer"], r["task_type"]) == (first.layer, 1)]
    assert [(r["adapter"], r["expert"], r["group"]) for r in records] == [
        ("default", expert, int(expert > 1)) for expert in range(6)
    ]
    torch.testing.assert_close(torch.tensor([r["weight"] for r in records]), sums / counts)


def test_every_layer_and_type_that_occurs_is_there_and_sums_to_one():
    totals = {}
    for record in router_statistics(loramoe(), batches()):
        key = record["layer"], record["task_type"]
        totals[key] = totals.get(key, 0) + record["weight"]
    assert len(totals) == 6 * 3
    assert all(total == pytest.approx(1) for total in totals.values())


def test_splitting_the_data_into_batches_changes_nothing():
    model = loramoe()
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches() for i in range(3)]
    together, apart = router_statistics(model, batches()), router_statistics(model, rows)
    assert [r["weight"] for r in together] == pytest.approx([r["weight"] for r in apart], abs=1e-6)


def test_the_model_is_left_in_its_mode_and_without_gradients():
    model = loramoe().train()
    model.base_model.model.lm_head.eval()
    router_statistics(model, batches())
    assert model.training and not model.base_model.model.lm_head.training
    assert all(p.grad is None for p in model.parameters())


def test_groups_sum_their_experts_and_average_over_layers():
    records = router_statistics(loramoe(), batches())
    overall = {(r["task_type"], r["group"]): r["weight"] for r in group_weights(records)}
    assert overall[0, 0] + overall[0, 1] == pytest.approx(1)
    per_layer = [r["weight"] for r in group_weights(records, per_layer=True) if (r["task_type"], r["group"]) == (0, 1)]
    assert len(per_layer) == 6 and sum(per_layer) / 6 == pytest.approx(overall[0, 1])


def test_layers_may_differ_in_their_number_of_experts():
    records = router_statistics(loramoe(num_experts_pattern={"down_proj": [1, 1]}), batches())
    experts = {r["layer"]: r["expert"] for r in records}
    assert {name.rpartition(".")[2]: last for name, last in experts.items()} == {"gate_proj": 5, "up_proj": 5, "down_proj": 1}


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="has no LoRAMoE layers"):
        router_statistics(tiny_llama(), batches())


def test_nothing_routed_is_an_error():
    with pytest.raises(ValueError, match="pass at least one batch"):
        router_statistics(loramoe(), [])


def test_only_active_adapters_count():
    model = loramoe()
    model.add_adapter("second", LoRAMoEConfig(r=1))
    assert {r["adapter"] for r in router_statistics(model, batches())} == {"default"}
