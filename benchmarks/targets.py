"""The project's targets for speed and memory, and how the results compare with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .rows import Case, groups, labels, method_name, ratio, shown, variant


SAME = "same"  # the other method's adapters have the dtype of LoRAMoE's


@dataclass(frozen=True)
class Target:
    """A limit on the ratio of LoRAMoE's figure to another method's, in every case of a group.

    Args:
        set: "cpu" or "gpu".
        group: group of cases.
        quantity: "seconds" or "saved_bytes".
        other: method compared with, and the dtype of its adapters.
        limit: the ratio is to be at most this.
        where: entries that LoRAMoE's config must have.
    """

    set: str
    group: str
    quantity: str
    other: tuple[str, str | None]
    limit: float
    where: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        method, dtype = self.other
        adapters = {None: "", SAME: " with the same adapter dtype"}.get(dtype, f" with {shown(dtype)} adapters")
        return f"{self.set}, {self.group}: {self.quantity.replace('_', ' ')} / {method_name(method)}{adapters}"


GPU_LAYER = {"tokens": 8192, "dropout": 0.05, "adapter_dtype": "float32"}
TARGETS = [
    Target("cpu", "layer", "seconds", ("lora", SAME), 1.0),
    Target("cpu", "layer", "seconds", ("loop", SAME), 0.6, {"dropout": 0.0}),
    Target("cpu", "layer", "seconds", ("loop", SAME), 0.5, {"dropout": 0.05}),
    Target("cpu", "small inputs", "seconds", ("lora", SAME), 1.2),
    Target("cpu", "decoding", "seconds", ("lora", SAME), 1.0),
    Target("cpu", "experts", "seconds", ("base", None), 1.65, {"experts": 64}),
    Target("cpu", "layer", "saved_bytes", ("lora", SAME), 1.05, {"dropout": 0.0}),
    Target("cpu", "layer", "saved_bytes", ("lora", SAME), 0.8, {"dropout": 0.05}),
    Target("cpu", "layer", "saved_bytes", ("loop", SAME), 1 / 12),
    Target("gpu", "layer", "seconds", ("base", None), 1.12, GPU_LAYER),
    Target("gpu", "layer", "seconds", ("lora", "bfloat16"), 0.88, GPU_LAYER),
    Target("gpu", "layer", "seconds", ("lora", "float32"), 0.65, GPU_LAYER),
    Target("gpu", "training step", "seconds", ("lora", "bfloat16"), 0.95, {"adapter_dtype": "float32"}),
    Target("gpu", "training step", "seconds", ("lora", "float32"), 0.95, {"adapter_dtype": "float32"}),
    Target("gpu", "decoding", "seconds", ("lora", "bfloat16"), 1.05, {"adapter_dtype": "float32"}),
    Target("gpu", "decoding", "seconds", ("lora", "float32"), 1.05, {"adapter_dtype": "float32"}),
]


class Comparison(NamedTuple):
    """A target in a case that it applies to: the measured ratio, None if it was not measured, and the limit."""

    target: str
    case: str
    ratio: float | None
    limit: float

    def __str__(self) -> str:
        if self.ratio is None:
            verdict = "not measured"
        else:
            verdict = f"{self.ratio:5.3f} {'ok' if self.ratio <= self.limit else 'MISSED'}"
        return f"{verdict:13} <= {self.limit:5.3f}  {self.target}  [{self.case}]"


def check(results: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Every target in every case it applies to; `results` has the result of each set by name."""
    cases = {name: groups(result["rows"]) for name, result in results.items()}
    comparisons = []
    for target in TARGETS:
        found = list(_measured(target, cases.get(target.set, {}).get(target.group, [])))
        if not found:
            found = [(" ".join(f"{key}={value}" for key, value in target.where.items()), None)]
        comparisons += [Comparison(str(target), case, value, target.limit) for case, value in found]
    return comparisons


def _measured(target: Target, cases: Sequence[Case]) -> Iterator[tuple[str, float]]:
    method, other_dtype = target.other
    for case, label in zip(cases, labels(cases)):
        for row in case:
            config = row["config"]
            dtype = config["adapter_dtype"]
            fits = all(config[key] == value for key, value in target.where.items())
            if config["method"] != "loramoe" or not fits or "skipped" in row:
                continue
            other = variant(case, method, dtype if other_dtype == SAME else other_dtype)
            if other is None:
                continue
            if target.quantity == "seconds":
                value = ratio(row, other)[1]
            else:
                value = row[target.quantity] / other[target.quantity]
            yield f"{label}; {shown(dtype)} adapters".removeprefix("; "), value
