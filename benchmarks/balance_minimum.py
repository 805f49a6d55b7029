"""Where each form of the balance term puts the router's weight: `python benchmarks/balance_minimum.py`.

Optimises free router logits, one row of logits per sample, under the balance term alone and reports the mean weight of
an expert of the matched group against that of the other experts. Takes under a minute on one CPU core. Writes
benchmarks/results/balance_minimum.json.
"""

import datetime
import itertools
import json
from pathlib import Path

import torch

from peft_loramoe import __version__
from peft_loramoe.balance.constraint import balance_targets, balance_term
from peft_loramoe.groups import ExpertGroups


RESULT = Path(__file__).parent / "results" / "balance_minimum.json"
DELTA = 0.5
GROUPS = [3, 3]
# Tokens of the samples of type 0 and of type 1: world-knowledge questions are short, downstream samples often long.
LENGTHS = {"equal": (32, 32), "short and long": (8, 64)}


def minimise(lengths: tuple[int, int], formula: str, target: str, importance: str) -> dict[str, float]:
    """Mean router weight of matched and other experts, by task type, at the term's minimum."""
    torch.manual_seed(0)
    task_types = torch.tensor([0, 1] * 4)
    counts = torch.tensor(lengths).repeat(4)
    targets = balance_targets(task_types, ExpertGroups(GROUPS), DELTA)
    logits = torch.randn(len(task_types), sum(GROUPS), dtype=torch.float64).mul_(0.1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1000):
        probabilities = logits.softmax(-1)
        term = balance_term(
            probabilities * counts[:, None], counts, targets, formula=formula, target=target, importance=importance
        )
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    matched = targets > 1
    weights = logits.softmax(-1).detach()
    return {
        f"{name}_type_{task_type}": weights[mask & (task_types == task_type)[:, None]].mean().item()
        for name, mask in (("matched", matched), ("other", ~matched))
        for task_type in (0, 1)
    }


def main() -> None:
    """Run every combination, print a table and write the rows."""
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'lengths':15} {'formula':17} {'target':10} {'importance':10}  matched/other, type 0  matched/other, type 1"
    )
    for (name, lengths), formula, target, importance in itertools.product(
        LENGTHS.items(), ("cv_squared", "variance_to_mean"), ("corrected", "paper"), ("mean", "sum")
    ):
        row = {"lengths": list(lengths), "formula": formula, "target": target, "importance": importance}
        row |= minimise(lengths, formula, target, importance)
        rows.append(row)
        ratios = [f"{row[f'matched_type_{t}'] / row[f'other_type_{t}']:21.3f}" for t in (0, 1)]
        print(f"{name:15} {formula:17} {target:10} {importance:10} {'  '.join(ratios)}")
    about = {
        "date": datetime.date.today().isoformat(),
        "peft_loramoe": __version__,
        "torch": torch.__version__,
        "delta": DELTA,
        "expert_groups": GROUPS,
    }
    RESULT.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
