import pytest
import torch

from peft_loramoe.balance.constraint import balance_targets, balance_term, importance
from peft_loramoe.groups import ExpertGroups


pytestmark = pytest.mark.version_independent


def authors_blcls(route_weight, task_types, blc_alpha, lora_nums):
    """The balance term of the authors' released code, written once more.

    Unmasked sums, var / mean^2, types 1 and 0.
    """
    half = lora_nums // 2
    matches = torch.cat(
        [(task_types == 1).view(-1, 1).repeat(1, half), (task_types == 0).view(-1, 1).repeat(1, half)], -1
    )
    weighted = (route_weight.sum(dim=1) * torch.where(matches, 1.0 + blc_alpha, 1.0 - blc_alpha)).flatten()
    return weighted.float().var() / (weighted.float().mean() ** 2 + 1e-10)


def whole_batch(probabilities):
    """Importance of a batch (M, S, N) without padding."""
    rows, width, num_experts = probabilities.shape
    ids = torch.arange(rows).repeat_interleave(width)
    return importance(probabilities.reshape(-1, num_experts), ids, torch.ones(rows * width, dtype=torch.bool), rows)


def test_importance_sums_real_tokens_by_sample():
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    sums, counts = importance(probabilities, torch.tensor([0, 0, 2, 2]), torch.tensor([True, True, True, False]), 3)
    torch.testing.assert_close(sums, torch.tensor([[0.75, 1.25], [0.0, 0.0], [1.0, 0.0]]))
    assert counts.tolist() == [2, 0, 1]


def test_a_padding_token_that_is_not_finite_does_no_harm():
    probabilities = torch.tensor([[0.5, 0.5], [float("nan")] * 2])
    sums, _ = importance(probabilities, torch.tensor([0, 0]), torch.tensor([True, False]), 1)
    torch.testing.assert_close(sums, torch.tensor([[0.5, 0.5]]))


def test_targets_of_matched_other_and_unknown():
    targets = balance_targets(torch.tensor([1, 0, -1]), ExpertGroups([1, 2]), 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.9, 1.1, 1.1], [1.1, 0.9, 0.9], [1.0, 1.0, 1.0]]))


def test_authors_loss_and_gradient_are_reproduced():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 6)
    authors_types = torch.tensor([1, 0, 0, 1])  # their type 1 owns the first half of the experts: our type 0
    gradients, terms = [], []
    for ours in (False, True):
        leaf = logits.clone().requires_grad_()
        probabilities = leaf.softmax(-1)
        if ours:
            targets = balance_targets(1 - authors_types, ExpertGroups([3, 3]), 0.1)
            term = balance_term(
                *whole_batch(probabilities), targets, formula="cv_squared", target="paper", importance="sum"
            )
        else:
            term = authors_blcls(probabilities, authors_types, 0.1, 6)
        gradients.append(torch.autograd.grad(term, leaf)[0])
        terms.append(term.detach())
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_printed_formula_divides_by_the_mean_once():
    sums, counts = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([4, 4])
    options = dict(target="corrected", importance="sum")
    term = balance_term(sums, counts, torch.ones(2, 2), formula="variance_to_mean", **options)
    torch.testing.assert_close(term, sums.var() / sums.mean())
    squared = balance_term(sums, counts, torch.ones(2, 2), formula="cv_squared", **options)
    torch.testing.assert_close(squared, sums.var() / sums.mean() ** 2)


def test_unused_slots_do_not_count():
    sums, counts = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]]), torch.tensor([4, 0, 4])
    options = dict(formula="cv_squared", target="corrected", importance="mean")
    with_slot = balance_term(sums, counts, torch.ones(3, 2), **options)
    without = balance_term(sums[[0, 2]], counts[[0, 2]], torch.ones(2, 2), **options)
    torch.testing.assert_close(with_slot, without)


def test_mean_importance_does_not_depend_on_length():
    probabilities = torch.softmax(torch.randn(2, 5, 4), -1)
    targets = balance_targets(torch.tensor([0, 1]), ExpertGroups([2, 2]), 0.3)
    options = dict(formula="cv_squared", target="corrected", importance="mean")
    sums, counts = whole_batch(probabilities)
    longer = balance_term(sums * torch.tensor([[1.0], [7.0]]), counts * torch.tensor([1, 7]), targets, **options)
    torch.testing.assert_close(longer, balance_term(sums, counts, targets, **options))


def minimise(groups, formula, target, delta=0.3, steps=400):
    """Mean router weight of an expert of the matched group and of another one at the term's minimum."""
    torch.manual_seed(0)
    task_types = torch.arange(len(groups)).repeat(2)
    targets = balance_targets(task_types, ExpertGroups(groups), delta)
    logits = torch.randn(len(task_types), sum(groups), dtype=torch.float64).mul_(0.1).requires_grad_()
    counts = torch.ones(len(task_types), dtype=torch.int64)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        balance_term(logits.softmax(-1), counts, targets, formula=formula, target=target, importance="mean").backward()
        optimizer.step()
    weights, matched = logits.softmax(-1).detach(), targets > 1
    return weights, matched


@pytest.mark.parametrize("formula", ["cv_squared", "variance_to_mean"])
@pytest.mark.parametrize("groups", [[3, 3], [2, 4], [1, 2, 3], [1, 2, 2, 3]])
def test_the_corrected_form_sends_weight_to_the_matched_group(groups, formula):
    weights, matched = minimise(groups, formula, "corrected")
    ratio = torch.tensor([row[m].mean() / row[~m].mean() for row, m in zip(weights, matched)])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.3 / 0.7), rtol=1e-2, atol=0)


def test_the_printed_form_sends_weight_to_the_other_group():
    weights, matched = minimise([3, 3], "cv_squared", "paper", delta=0.1)
    # DESIGN.md, section 1: 0.150 for matched and 0.183 for other experts
    torch.testing.assert_close(weights[matched], torch.full((12,), 0.150, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(weights[~matched], torch.full((12,), 0.183, dtype=torch.float64), rtol=0, atol=1e-3)


def test_gradcheck():
    logits = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    targets = balance_targets(torch.tensor([0, 1, -1]), ExpertGroups([2, 2]), 0.2)

    def term(logits):
        return balance_term(
            *whole_batch(logits.softmax(-1)), targets, formula="cv_squared", target="corrected", importance="mean"
        )

    assert torch.autograd.gradcheck(term, logits)
