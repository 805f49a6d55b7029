"""What the rows of a study say of each run: points lost, exercises solved, router weights.

What is lost is what was known before fine-tuning and is not after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .protocol import VARIANTS, Run, ablation_runs, choose_learning_rates, knowledge_kept, selection_runs, test_runs


Row = Mapping[str, Any]
KINDS = ("questions", "statements")


class Results:
    """The rows of one variant.

    Raises:
        ValueError: there are none, they are of several variants, or some are missing.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        names = sorted({row["variant"] for row in rows})
        if len(names) != 1 or names[0] not in VARIANTS:
            raise ValueError(
                f"The rows must be of one variant of {', '.join(VARIANTS)}, but are of: {', '.join(names) or 'none'}."
            )
        self.variant = VARIANTS[names[0]]
        self.by_key = {row["key"]: row for row in rows}
        self._require(selection_runs(self.variant))
        self.chosen = choose_learning_rates(self.variant, rows)
        self._require(test_runs(self.variant, self.chosen) + ablation_runs(self.variant, self.chosen))

    def _require(self, runs: list[Run]) -> None:
        missing = [key for seed in self.variant.seeds if (key := f"pretraining {seed}") not in self.by_key]
        missing += [run.key for run in runs if run.key not in self.by_key]
        if missing:
            raise ValueError(
                f"{len(missing)} rows are missing, such as {missing[0]}; finish the study with `run` first."
            )

    def selection(self, method: str) -> dict[float, list[Run]]:
        """The runs of a method on the validation seeds, by learning rate."""
        runs = [run for run in selection_runs(self.variant) if run.method == method]
        return {rate: [run for run in runs if run.learning_rate == rate] for rate in self.variant.candidates(method)}

    def tested(self, method: str, samples: int | None = None) -> list[Run]:
        """The runs of a method on the test seeds; None for the most samples."""
        samples = samples or self.variant.samples[-1]
        runs = test_runs(self.variant, self.chosen)
        return [run for run in runs if (run.method, run.samples) == (method, samples)]

    def row(self, run: Run) -> Row:
        """The row of a run."""
        return self.by_key[run.key]

    def before(self, run: Run) -> Mapping[str, Any]:
        """The scores of the run's model before fine-tuning."""
        return self.by_key[f"pretraining {run.seed}"]["scores"]

    def lost(self, run: Run, *kinds: str) -> float:
        """Points lost, the mean over the kinds of knowledge samples."""
        return mean(self.before(run)[kind] - self.row(run)["scores"][kind] for kind in kinds)

    def kept(self, run: Run) -> float:
        """Percent of the knowledge samples that are answered."""
        return knowledge_kept(self.row(run)["scores"])

    def tasks(self, run: Run) -> float:
        """Percent of the new exercises that are solved."""
        return self.row(run)["scores"]["tasks"]

    def weight(self, run: Run, kind: str) -> float | None:
        """Router weight of the knowledge group for a kind of samples; None without routers."""
        router = self.row(run).get("router")
        return router[kind]["groups"][0] if router else None


def mean(values: Iterable[float]) -> float:
    """The mean."""
    values = list(values)
    return sum(values) / len(values)
