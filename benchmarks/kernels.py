"""Where a layer's time goes on a CUDA device: `python -m benchmarks.kernels`.

Profiles forward and backward of one adapted linear, with each implementation of the mixture, and prints every kernel
that the device ran, beside the time that the bytes it has to move would take. The bandwidth is that of a large copy in
the same run, and the ceiling of the base layer's products that of a large product.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import GPU_LAYER, KINDS
from .environment import about
from .measure import Timer
from .methods import computed_by
from .rows import RESULTS


STEPS = 10
SHAPES: dict[str, dict[str, Any]] = {
    "up": {},
    "down": {"in_features": 11008, "out_features": 4096},
    "no dropout": {"dropout": 0.0},
    "16 experts of rank 8": {"experts": 16, "r": 8},
    "T=1024, d=1024": {"tokens": 1024, "in_features": 1024, "out_features": 2752},
}


def ceilings(timer: Timer) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large bfloat16 product."""
    source = torch.randn(2**28, dtype=torch.float32, device=timer.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=timer.device) for _ in range(2))
    return {
        "bytes_per_second": 2 * source.nbytes / _seconds(lambda: target.copy_(source), timer),
        "flop_per_second": 2 * 8192**3 / _seconds(lambda: a @ b, timer),
    }


def floors(config: Mapping[str, Any], size: int = 2) -> dict[str, float]:
    """Bytes that each Triton kernel has to move: what is as large as the activations, read or written once."""
    tokens, mask = config["tokens"], config["tokens"] * config["in_features"] / 8 * (config["dropout"] > 0)
    x, y = tokens * config["in_features"] * size, tokens * config["out_features"] * size
    channels = tokens * config["experts"] * (config["r"] * size + 4)
    return {
        "dropout_bits": mask,
        "project": x + mask + channels,
        "expand": y + channels,
        "gate_backward": y + 2 * channels,
        "input_weight_gradients": x + mask + channels,
        "input_gradient": x + mask + channels,
    }


# Parts of a layer's time: name, method, and what the names of its kernels have in them.
PARTS = [
    ("the base layer's two products", "base", ("nvjet",)),
    ("the same, added to what a kernel wrote", "loramoe-triton", ("badd",)),
    *((f"`{name}`", "loramoe-triton", (name,)) for name in ("project", "expand", "gate_backward")),
    ("the gradient of B", "loramoe-triton", ("output_weight_gradient", "splitK")),
    *(
        (f"`{name}`", "loramoe-triton", (name,))
        for name in ("input_weight_gradients", "input_gradient", "dropout_bits")
    ),
    ("LoRAMoE in all", "loramoe-triton", ("",)),
    ("without Triton", "loramoe-torch", ("",)),
    ("without Triton, compiled by `torch.compile`", "loramoe-compiled", ("",)),
    ("PEFT LoRA, float32 adapters", "lora", ("",)),
]

METHODS = ("base", "lora", "loramoe-torch", "loramoe-compiled", "loramoe-triton")


def table(results: Sequence[Mapping[str, Any]], shape: str = "up") -> str:
    """Markdown: microseconds of each part, a column for each result, behind the time that a kernel's bytes take."""
    lines = []
    for name, method, marks in PARTS:
        of_part = [
            [row for row in result["rows"] if (row["shape"], row["method"]) == (shape, method) and _has(row, marks)]
            for result in results
        ]
        floor = 0 if marks == ("",) else max((row["floor_us"] for rows in of_part for row in rows), default=0)
        cells = [f"{sum(row['us'] for row in rows):.0f}" for rows in of_part]
        lines.append(f"| {name} | {f'{floor:.0f}' if floor else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _has(row: Mapping[str, Any], marks: Sequence[str]) -> bool:
    return any(mark in row["kernel"] for mark in marks)


def device_times(step: Callable[[], Any]) -> dict[str, float]:
    """Microseconds on the device of one step, by kernel."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[_short(event.name)] += event.device_time_total / STEPS
    return dict(times)


def _seconds(step: Callable[[], Any], timer: Timer) -> float:
    timer(step, 3)  # warms up
    return timer(step, 20)[0]


def _short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return re.sub(r"<.*|\(.*", "", name.removeprefix("void ")).strip()[-60:]


def main(arguments: list[str] | None = None) -> None:
    """Profile, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--table", action="store_true", help="print the table of docs/performance.md from the results")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args(arguments)
    if options.table:
        print(table([json.loads((RESULTS / f"{name}.json").read_text()) for name in ("kernels-first", "kernels")]))
        return
    if not torch.cuda.is_available():
        parser.exit(1, "This profiles kernels on a CUDA device, and torch sees none.\n")
    device = torch.device("cuda")
    timer, rows = Timer(device), []
    limits = ceilings(timer)
    print(torch.cuda.get_device_name(), {name: f"{value:.4g}" for name, value in limits.items()})
    for shape in options.shapes:
        config = {**GPU_LAYER, **SHAPES[shape], "adapter_dtype": "float32"}
        base = KINDS["layer"].base(config, device)
        floor = floors(config)
        for method in METHODS:
            torch._dynamo.reset()
            module, inputs = KINDS["layer"].setup({**config, "method": method}, base)
            step = computed_by(method, KINDS["layer"].step(module, inputs, config))
            times = device_times(step)
            total = 1e6 * _seconds(step, timer)
            print(f"\n{shape}, {method}: {sum(times.values()):.0f} us on the device, {total:.0f} in all")
            for kernel, time in sorted(times.items(), key=lambda pair: -pair[1]):
                bound = 1e6 * floor.get(kernel, 0) / limits["bytes_per_second"]
                print(f"  {time:8.1f} us  {f'floor {bound:.0f}' if bound else '':12} {kernel}")
                rows.append({"shape": shape, "method": method, "kernel": kernel, "us": time, "floor_us": bound})
    result = {"about": {**about(device, smoke=False), **limits}, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
