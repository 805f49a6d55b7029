import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_loramoe import balance_loss, balance_terms, layer_routing
from peft_loramoe.balance.constraint import balance_targets, balance_term
from tiny import capture, labelled, loramoe, tiny_llama, token_batch


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(layers):
    """How many operations the balance term of a model with so many layers takes, forward and backward."""
    model = loramoe(tiny_llama(num_hidden_layers=layers)).eval()
    seen = capture(model)
    model(**token_batch(), task_types=[0, 1, -1])
    probabilities = list(seen.values())
    with CountOperations() as counted:
        torch.autograd.grad(balance_loss(model), probabilities)
    assert len(probabilities) == 3 * layers
    return counted.count


def test_more_layers_hardly_take_more_operations():
    few, many = operations(2), operations(6)
    assert many - few <= 12 * 5  # 12 more linears: views of the probabilities and of their importance, and back


def test_layers_with_other_experts_have_terms_of_their_own():
    model = loramoe(
        num_experts=4, num_experts_pattern={"down_proj": 6, "layers.0.mlp.up_proj": [1, 3]}, balance_delta=0.3
    )
    model(**labelled(token_batch()), task_types=[0, 1, -1])
    terms = balance_terms(model)["default"]
    assert list(terms) == [record.layer for record in layer_routing(model)]
    for record in layer_routing(model):
        targets = balance_targets(record.task_types, record.groups, 0.3)
        options = dict(formula="cv_squared", target="corrected", importance="mean")
        torch.testing.assert_close(
            terms[record.layer], balance_term(record.importance, record.token_counts, targets, **options)
        )
    assert {record.groups.sizes for record in layer_routing(model)} == {(2, 2), (3, 3), (1, 3)}
