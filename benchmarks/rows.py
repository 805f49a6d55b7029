"""The rows of benchmarks/results: read, sorted into cases, compared and named.

A ratio is the median over the rounds of the ratios within a round, with the 20 and 80 % quantiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import quantiles


RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]
Case = Sequence[Row]  # the variants that were timed in the same rounds

METHOD_NAMES = {
    "base": "frozen base",
    "lora": "PEFT LoRA",
    "loop": "expert loop",
    "loramoe": "LoRAMoE",
    "loramoe-torch": "LoRAMoE without Triton",
    "loramoe-node": "LoRAMoE, one node",
    "loramoe-autograd": "LoRAMoE, differentiated by autograd",
}


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a set, or None if it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def groups(rows: Sequence[Row]) -> dict[str, list[Case]]:
    """Group -> its cases."""
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["group"], row["case"]), []).append(row)
    found: dict[str, list[Case]] = {}
    for (group, _), case in cases.items():
        found.setdefault(group, []).append(case)
    return found


def variant(case: Case, method: str, adapter_dtype: str | None) -> Row | None:
    """The row of a method with adapters of a dtype; None if the case has none that ran."""
    for row in case:
        config = row["config"]
        if (config["method"], config["adapter_dtype"]) == (method, adapter_dtype) and "skipped" not in row:
            return row
    return None


def ratio(row: Row, other: Row) -> list[float]:
    """Quantiles over the rounds of the ratio of two rows' times."""
    return quantiles(a / b for a, b in zip(row["rounds"], other["rounds"]))


def method_name(method: str) -> str:
    """A method as tables and figures name it; released packages go by their own names."""
    return METHOD_NAMES.get(method, method)


def shown(value: Any) -> str:
    """A value of a config as tables and figures show it."""
    return {"bfloat16": "bf16", None: "-"}.get(value, str(value))


def labels(cases: Sequence[Case]) -> list[str]:
    """What tells the cases of a group apart."""
    configs = [case[0]["config"] for case in cases]
    if not configs:
        return []
    varying = {key for key in configs[0] if len({str(config[key]) for config in configs}) > 1}
    varying -= {"method", "adapter_dtype"}
    if {"in_features", "out_features"} <= varying:
        configs = [
            {**config, "in_features": f"{config['in_features']}->{config['out_features']}"} for config in configs
        ]
        varying.remove("out_features")
    names = {"in_features": "d", "dtype": "backbone"}
    return [" ".join(f"{names.get(key, key)} {shown(config[key])}" for key in sorted(varying)) for config in configs]
