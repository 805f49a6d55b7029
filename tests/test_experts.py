import pytest
import torch

from peft_loramoe.experts import LoRAExperts
from peft_loramoe.groups import ExpertGroups
from peft_loramoe.ops import MixtureOptions, reference


pytestmark = pytest.mark.version_independent


def make_experts(init_weights=False, sizes=(3, 3), null=(), r=2, **options):
    torch.manual_seed(0)
    groups = ExpertGroups(sizes, null)
    experts = LoRAExperts(8, 5, r=r, groups=groups, options=MixtureOptions(groups.lora_experts, 1.5, **options))
    experts.reset_parameters(init_weights, "kaiming_uniform")
    return experts


def test_forward_is_the_gated_sum_of_the_experts():
    experts, x = make_experts().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    output, probabilities = experts(x)
    expected = reference.mixture(x, experts.A, experts.B, experts.router, scaling=1.5)
    torch.testing.assert_close((output, probabilities), expected)


def test_forward_adds_to_the_base_layers_output_or_computes_it():
    experts, base_layer, x = (
        make_experts().double(),
        torch.nn.Linear(8, 5).double(),
        torch.randn(2, 3, 8, dtype=torch.float64),
    )
    expected = experts(x)[0] + base_layer(x)
    torch.testing.assert_close(experts(x, base_layer(x))[0], expected)
    torch.testing.assert_close(experts(x, weight=base_layer.weight, bias=base_layer.bias)[0], expected)


def test_null_experts_take_weight_but_have_no_parameters_and_add_nothing():
    experts, x = make_experts(sizes=[2, 3, 1], null=[0, 2]).double(), torch.randn(4, 8, dtype=torch.float64)
    assert (experts.num_experts, experts.A.shape, experts.B.shape, experts.router.shape) == (6, (6, 8), (5, 6), (6, 8))
    expected = reference.mixture(x, experts.A, experts.B, experts.router, scaling=1.5, experts=[2, 3, 4])
    torch.testing.assert_close(experts(x), expected)


def test_top_k_uses_only_the_chosen_experts():
    experts, x = make_experts(top_k=1).double(), torch.randn(8, dtype=torch.float64)
    output, probabilities = experts(x)
    i = probabilities.argmax()
    torch.testing.assert_close(output, 1.5 * experts.B[:, 2 * i : 2 * i + 2] @ experts.A[2 * i : 2 * i + 2] @ x)


def test_dropout_acts_on_the_experts_input_in_training_only_and_not_on_the_router():
    experts, x = make_experts(dropout=0.5), torch.randn(64, 8)
    dropped, in_training = experts(x)
    kept, in_evaluation = experts.eval()(x)
    assert not torch.allclose(dropped, kept)
    torch.testing.assert_close(in_training, in_evaluation)
    torch.testing.assert_close(kept, make_experts(dropout=0.0)(x)[0])


@pytest.mark.parametrize("detach", [False, True])
def test_detached_probabilities_train_the_router_but_not_the_layers_below(detach):
    experts, x = make_experts(balance_detach=detach), torch.randn(4, 8, requires_grad=True)
    _, probabilities = experts(x)
    probabilities[:, 0].sum().backward()
    assert experts.router.grad.abs().sum() > 0
    assert (x.grad is None) == detach


def test_detaching_does_not_change_the_gradient_of_the_output():
    x = torch.randn(4, 8)
    gradients = []
    for detach in (False, True):
        experts = make_experts(balance_detach=detach)
        experts(x)[0].sum().backward()
        gradients.append(experts.router.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("init_weights", [True, "gaussian"])
def test_the_adapter_starts_as_the_identity(init_weights):
    experts = make_experts(init_weights)
    assert experts(torch.randn(3, 8))[0].abs().max() == 0
    assert experts.A.abs().min() > 0


def test_init_weights_false_makes_a_mixture_that_changes_the_output():
    assert make_experts(False)(torch.randn(3, 8))[0].abs().min() > 0


@pytest.mark.parametrize(("router_init", "spread"), [("zeros", False), ("normal", True), ("kaiming_uniform", True)])
def test_router_init(router_init, spread):
    experts = make_experts()
    experts.reset_parameters(True, router_init)
    probabilities = experts(torch.randn(3, 8))[1]
    assert (probabilities.std() > 1e-6) == spread


def test_gradients_reach_all_parameters_and_the_input():
    experts, x = make_experts().double(), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def run(x, A, B, router):
        return torch.func.functional_call(experts, {"A": A, "B": B, "router": router}, (x,))

    assert torch.autograd.gradcheck(run, (x, experts.A, experts.B, experts.router))


def test_it_is_a_leaf_with_a_weight_as_fsdp_policies_want():
    experts = make_experts()
    assert not list(experts.children())
    assert experts.weight is experts.A


@pytest.mark.parametrize("name", ["A", "B", "router"])
def test_decoding_uses_weights_that_were_changed_behind_autograds_back(name):
    experts, x = make_experts().eval(), torch.randn(1, 8)
    with torch.no_grad():
        before, _ = experts(x)
        parameter = getattr(experts, name)
        version = parameter._version
        parameter.data.mul_(2)  # as ZeRO and averaged weights do it; no counter tells
        assert parameter._version == version
        assert not torch.equal(experts(x)[0], before)
