"""Run a set of benchmarks: `python -m benchmarks cpu` (under five minutes on two cores) or `gpu` (33 of its 50 cases
took six minutes on an H200).

Writes benchmarks/results/<set>.json, one row for each variant of each case; `python -m benchmarks.report` reads it.
The released peers moe_peft, mixlora, unsloth and lorafusion take part if they are importable, from build/peers for
example; docs/performance.md, "Released packages", says how they are installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cases import KINDS, SETS, Case, distinct, shrink
from .environment import ROOT, about
from .measure import Timer, interleave, peak_bytes, quantiles, saved_bytes
from .methods import PEERS, Unavailable, computed_by
from .rows import RESULTS


WARM_UP = {"cpu": 2, "cuda": 3}


def run_case(case: Case, device: torch.device, timer: Timer, repeat: bool = True) -> list[dict[str, Any]]:
    """Measure the variants of a case; with `repeat`, short steps are repeated until they can be timed.

    Returns:
        A row for each variant: group, kind, full config; the times of every round and their quantiles in seconds, CPU
        seconds, peak bytes and saved bytes; or, where the variant does not run here, "skipped" with the reason.
    """
    kind, rows, steps, shortest = KINDS[case.kind], [], {}, float("inf")
    torch.manual_seed(0)
    base = kind.base(case.config, device)
    for method, adapter_dtype in case.variants:
        config = {**case.config, "method": method, "adapter_dtype": adapter_dtype}
        row = {"group": case.group, "kind": case.kind, "config": config}
        rows.append(row)
        try:
            module, inputs = kind.setup(config, base)
            step = computed_by(method, kind.step(module, inputs, config))
            for _ in range(WARM_UP[device.type]):
                seconds, _ = timer(step)
            row["peak_bytes"] = peak_bytes(lambda step=step: step(fresh=True), device)
            if kind.forward is not None and method != "loramoe-compiled" and not config.get("compile"):
                tensors = [*module.parameters(), *module.buffers()]
                forward = computed_by(method, lambda m=module, i=inputs: kind.forward(m, i))
                row["saved_bytes"] = saved_bytes(forward, tensors)
        except (Unavailable, torch.OutOfMemoryError) as error:
            row["skipped"] = str(error).splitlines()[0]
        except Exception as error:
            if method not in PEERS:
                raise
            row["skipped"] = f"does not run with these versions: {type(error).__name__}: {error}".splitlines()[0]
        else:
            shortest = min(shortest, seconds)
            steps[str(len(rows) - 1)] = step
    for index, times in interleave(steps, timer, case.rounds, shortest if repeat else float("inf")).items():
        for name, values in (("seconds", times.wall), ("cpu_seconds", times.cpu)):
            rows[int(index)][name] = [float(f"{value:.4g}") for value in quantiles(values)]
        rows[int(index)]["rounds"] = [float(f"{value:.5g}") for value in times.wall]
    return rows


def main(arguments: list[str] | None = None) -> Path:
    """Run a set and write its file; returns the file's path."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--only", nargs="+", metavar="GROUP", help="groups of cases to run, for example layer decoding"
    )
    parser.add_argument("--rounds", type=int, help="rounds of every case, instead of each case's own number")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes and two rounds on any device, to try the code out"
    )
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers", help="folder with the released peers")
    parser.add_argument("--output", type=Path, help="file to write; default benchmarks/results/<set>.json")
    options = parser.parse_args(arguments)

    cases = [case for case in SETS[options.set] if not options.only or case.group in options.only]
    if options.smoke:
        cases = distinct(shrink(case) for case in cases)
    if options.rounds:
        cases = [replace(case, rounds=options.rounds) for case in cases]
    if not cases:
        groups = sorted({case.group for case in SETS[options.set]})
        parser.error(
            f"--only {' '.join(options.only)} names no group of the {options.set} set; there are {', '.join(groups)}."
        )
    cuda = options.set == "gpu" and torch.cuda.is_available()
    if options.set == "gpu" and not cuda and not options.smoke:
        parser.exit(
            1,
            "The GPU set needs a CUDA device, and torch sees none. `make bench` runs the CPU set; `python -m "
            "benchmarks gpu --smoke` only tries the code out.\n",
        )
    if options.peers.is_dir():
        sys.path.append(str(options.peers.resolve()))
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if cuda else "cpu")
    result = {"about": about(device, options.smoke), "rows": []}
    timer, output = Timer(device), options.output or RESULTS / f"{options.set}.json"
    progress, failed = tqdm(cases, unit="case"), []
    for number, case in enumerate(progress):
        progress.set_description(case.group)
        torch._dynamo.reset()
        try:
            rows = run_case(case, device, timer, repeat=not options.smoke)
        except Exception:
            traceback.print_exc()
            failed.append(case.group)
            rows = []
        result["rows"] += [{"case": number, **row} for row in rows]
        minutes = round(progress.format_dict["elapsed"] / 60, 2)
        result["about"] |= {"load_at_end": os.getloadavg()[0], "minutes": minutes}
        output.write_text(json.dumps(result, indent=1) + "\n")  # after each case: what was measured is kept
        gc.collect()  # models are cycles; two 7B ones are one too many
        if cuda:
            torch.cuda.empty_cache()
    print(f"{len(result['rows'])} rows in {output}")
    if failed:
        parser.exit(1, f"Cases that failed, see above: {', '.join(failed)}.\n")
    return output


if __name__ == "__main__":
    main()
