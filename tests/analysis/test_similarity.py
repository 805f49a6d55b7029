import itertools

import pytest
import torch
from peft import inject_adapter_in_model

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import expert_similarity
from peft_loramoe.experts import LoRAExperts
from tiny import loramoe, tiny_llama


FIGURES = ("cosine", "output_overlap", "input_overlap")


def first_experts(model) -> LoRAExperts:
    return next(module for module in model.modules() if isinstance(module, LoRAExperts))


def of_pair(records, expert, other):
    """The figures of two experts of the first layer."""
    record = next(r for r in records if (r["expert"], r["other"]) == (expert, other))
    return tuple(record[name] for name in FIGURES)


def squared_cosine(first, second):
    """Mean over the principal angles between two column spaces of full rank."""
    bases = [torch.linalg.qr(matrix.double()).Q for matrix in (first, second)]
    return torch.linalg.svdvals(bases[0].T @ bases[1]).square().mean().item()


def test_similarity_is_that_of_the_whole_matrices():
    model = loramoe(r=3)
    experts = first_experts(model)
    A = experts.A.detach().double().split(3)
    B = experts.B.detach().double().split(3, dim=1)
    records = expert_similarity(model)
    for i, j in itertools.combinations(range(6), 2):
        cosine = torch.cosine_similarity((B[i] @ A[i]).flatten(), (B[j] @ A[j]).flatten(), dim=0).item()
        expected = (cosine, squared_cosine(B[i], B[j]), squared_cosine(A[i].T, A[j].T))
        assert of_pair(records, i, j) == pytest.approx(expected, abs=1e-9)


def test_one_record_for_each_adapter_layer_and_pair():
    model = loramoe(num_experts=3, expert_groups=[1, 2], num_experts_pattern={"down_proj": [1, 1]})
    model.add_adapter("other", LoRAMoEConfig(r=1, num_experts=2, target_modules=["up_proj"], init_weights=False))
    keys = [
        (r["adapter"], r["layer"].removeprefix("model.layers."), r["expert"], r["other"])
        for r in expert_similarity(model)
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert keys == [
        key
        for block in (0, 1)
        for key in (
            *(("default", f"{block}.mlp.gate_proj", *pair) for pair in pairs),
            *(("default", f"{block}.mlp.up_proj", *pair) for pair in pairs),
            ("other", f"{block}.mlp.up_proj", 0, 1),
            ("default", f"{block}.mlp.down_proj", 0, 1),
        )
    ]


def test_records_have_the_groups_of_both_experts():
    records = expert_similarity(loramoe(num_experts=3, expert_groups=[2, 1]))[:3]
    assert [(r["expert"], r["other"], r["group"], r["other_group"]) for r in records] == [
        (0, 1, 0, 0),
        (0, 2, 0, 1),
        (1, 2, 0, 1),
    ]


def test_copies_are_alike_and_opposites_opposed():
    model = loramoe()
    experts = first_experts(model)
    with torch.no_grad():
        experts.A[2:4], experts.A[4:6] = experts.A[:2], experts.A[:2]
        experts.B[:, 2:4], experts.B[:, 4:6] = 5 * experts.B[:, :2], -experts.B[:, :2]
    records = expert_similarity(model)
    assert of_pair(records, 0, 1) == pytest.approx((1, 1, 1))
    assert of_pair(records, 0, 2) == pytest.approx((-1, 1, 1))


def test_null_experts_are_like_nothing():
    model = loramoe(num_experts=4, expert_groups=[2, 1, 1], null_groups=[1])
    records = expert_similarity(model)
    assert of_pair(records, 0, 2) == of_pair(records, 2, 3) == (None, None, None)
    experts = first_experts(model)  # expert 3 has the third place among the parameters
    expected = squared_cosine(experts.B[:, :2].detach(), experts.B[:, 4:].detach())
    assert of_pair(records, 0, 3)[1] == pytest.approx(expected, abs=1e-9)


def test_fresh_experts_read_but_do_nothing_yet():
    cosine, output_overlap, input_overlap = of_pair(expert_similarity(loramoe(init_weights=True)), 0, 1)
    assert cosine is None and output_overlap is None and 0 < input_overlap < 1


def test_adapters_need_not_be_active_or_wrapped():
    model, config = tiny_llama(), LoRAMoEConfig(r=2, num_experts=2, init_weights=False)
    assert len(expert_similarity(inject_adapter_in_model(config, model))) == 6


def test_models_without_experts_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        expert_similarity(tiny_llama())


def test_experts_without_values_are_refused():
    model = inject_adapter_in_model(LoRAMoEConfig(r=2), tiny_llama(), low_cpu_mem_usage=True)
    with pytest.raises(
        ValueError,
        match=r"adapter 'default' in layer 'model\.layers\.0\.mlp\.gate_proj' have no values in this process",
    ):
        expert_similarity(model)


@pytest.mark.parametrize("name", ["A", "B"])
def test_experts_that_are_not_finite_are_refused(name):
    model = loramoe()
    with torch.no_grad():
        getattr(first_experts(model), name)[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"adapter 'default' in layer 'model\.layers\.0\.mlp\.gate_proj' are not finite"
    ):
        expert_similarity(model)
