"""Tables, targets and figures from the benchmarks' result files: `python -m benchmarks.report`.

Prints a Markdown table for each group of cases. With `--summary` it prints the tables of docs/performance.md, with
`--check` every target of the project, the measured value and whether it is met; with `--plots` it draws
docs/images/performance-*.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import plot_scaling, plot_steps
from .rows import RESULTS, Case, Row, groups, labels, load, method_name, ratio, shown, variant
from .targets import check


IMAGES = Path(__file__).parent.parent / "docs" / "images"

# Rows of the summary of the GPU set: name, group, entries of the config, and the dtype of LoRAMoE's adapters.
DEVICE_BOUND = [
    ("layer 4096 -> 11008", "layer", {"in_features": 4096, "tokens": 8192, "dropout": 0.05}, "float32"),
    ("layer 11008 -> 4096", "layer", {"in_features": 11008, "tokens": 8192, "dropout": 0.05}, "float32"),
    ("layer 4096 -> 11008, NF4", "4-bit layer", {}, "float32"),
    ("layer 8192 -> 22016, bf16 adapters", "width", {"in_features": 8192}, "bfloat16"),
    ("training step, 8 layers of a 7B Llama", "training step of 8192 tokens", {}, "float32"),
]
HOST_BOUND = [
    ("training step of a 7B Llama, 2048 tokens", "training step", {}, "float32"),
    ("training step of a 135M Llama, 512 tokens", "training step of a small model", {}, "float32"),
    ("one layer, 64 tokens, bf16 adapters", "tokens", {"tokens": 64}, "bfloat16"),
    ("decoding, 7B Llama, dynamic cache", "decoding", {"cache": "dynamic"}, "float32"),
    ("decoding, 4 layers of it, compiled, static cache", "compiled decoding", {}, "float32"),
]
LORA_RIVALS = {
    "the frozen base": ("base", None),
    "PEFT LoRA, bf16 adapters": ("lora", "bfloat16"),
    "PEFT LoRA, float32 adapters": ("lora", "float32"),
}
RIVALS = {**LORA_RIVALS, "Unsloth's LoRA": ("unsloth", "float32")}
MEMORY = "peak MiB: LoRAMoE; base, LoRA bf16, LoRA float32, Unsloth"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def heading(result: Mapping[str, Any]) -> str:
    """Where and with what a set was measured."""
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    commit = about["commit"][:7] + about["commit"][40:]  # what follows the hash says that there were changes
    return (
        f"{about['device']}, {about['threads']} threads of {about['cores']} cores, load {about['load_at_start']:.1f} "
        f"to {about['load_at_end']:.1f}, {about['date']}, commit {commit}, Python {about['python']}, "
        f"{versions}{', CUDA ' + about['cuda'] if about['cuda'] else ''}; {about['minutes']} minutes."
        + (f" {about['note']}" if "note" in about else "")
    )


def table(cases: Sequence[Case]) -> str:
    """A Markdown table of a group."""
    decoding = cases[0][0]["kind"] == "decode"
    header = ["case", "variant", "adapters", "tokens/s" if decoding else "ms (20-80 %)", "/ frozen base"]
    header += ["/ PEFT LoRA", "/ expert loop", "CPU ms", "peak MiB", "saved B/token"]
    lines = []
    for case, label in zip(cases, labels(cases)):
        for row in case:
            config = row["config"]
            cells = [label, method_name(config["method"]), shown(config["adapter_dtype"])]
            if "skipped" in row:
                cells.append(f"not measured: {row['skipped']}")
                lines.append(cells + [""] * (len(header) - len(cells)))
                continue
            low, middle, high = (1e3 * value for value in row["seconds"])
            time = f"{1e3 * config['new_tokens'] / middle:.1f}" if decoding else f"{middle:.4g} ({low:.4g}-{high:.4g})"
            cells += [time, *(_ratio_cell(row, case, method) for method in ("base", "lora", "loop"))]
            saved = f"{row['saved_bytes'] / tokens(config):.0f}" if "saved_bytes" in row else ""
            lines.append([*cells, f"{1e3 * row['cpu_seconds'][1]:.4g}", f"{row['peak_bytes'] / 2**20:.4g}", saved])
    return markdown(header, lines)


def _ratio_cell(row: Row, case: Case, method: str) -> str:
    """A row's time relative to the frozen base, or to a method with the same dtype of adapters."""
    other = variant(case, method, None if method == "base" else row["config"]["adapter_dtype"])
    return "" if other is None or row["config"]["method"] == "base" else _with_quantiles(ratio(row, other))


def _with_quantiles(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one step."""
    return config["tokens"] if "tokens" in config else config["rows"] * config["width"]


def slopes(cases: Sequence[Case]) -> str:
    """How memory grows with the tokens, from the two largest cases of the group "tokens"."""
    first, second = cases[-2:]
    config = second[0]["config"]
    added = tokens(config) - tokens(first[0]["config"])
    size = {"float32": 4}.get(config["dtype"], 2)
    lines = [f"x is {size * config['in_features']} B/token, the output {size * config['out_features']}."]
    for small, large in zip(first, second):
        if "skipped" not in small and "skipped" not in large:
            saved, peak = ((large[name] - small[name]) / added for name in ("saved_bytes", "peak_bytes"))
            name = method_name(large["config"]["method"])
            lines.append(f"{name}: saved {saved:.0f} B/token, peak {peak:.0f} B/token.")
    return "\n".join(lines)


WAYS = ("loramoe", "loramoe-node", "loramoe-autograd")


def cpu_summary(result: Mapping[str, Any]) -> str:
    """Three tables of the CPU set: one layer, a small model, and the ways to compute few tokens."""
    cases = groups(result["rows"])
    return "\n\n".join([_table_of_layers(cases), _table_of_models(cases), _table_of_ways(cases)])


def _table_of_layers(cases: Mapping[str, Sequence[Case]]) -> str:
    lines = []
    for case in [*cases.get("layer", []), *cases.get("4-bit layer", [])]:
        for dtype in ("float32", "bfloat16"):
            row, lora, loop = (variant(case, method, dtype) for method in ("loramoe", "lora", "loop"))
            if row is None or lora is None or loop is None:
                continue
            config = row["config"]
            name = f"{shown(config['dtype'])}, {shown(dtype)}, {config['dropout']:g}"
            quantised = f", {config['quantization'].upper()} backbone" if config["quantization"] else ""
            saved = ", ".join(f"{other['saved_bytes'] / tokens(config):.0f}" for other in (row, lora, loop))
            lines.append([name + quantised, _with_quantiles(ratio(row, lora)), f"{ratio(row, loop)[1]:.2f}", saved])
    header = ["backbone, adapters, dropout", "/ PEFT LoRA, same dtypes", "/ expert loop"]
    return markdown([*header, "saved bytes per token: here, LoRA, loop"], lines)


def _table_of_models(cases: Mapping[str, Sequence[Case]]) -> str:
    lines = []
    for method in ("loramoe", "moe_peft"):
        for group in ("training step", "compiled training step", "decoding"):
            for case in cases.get(group, []):
                for dtype in ("float32", "bfloat16"):
                    row, lora = variant(case, method, dtype), variant(case, "lora", dtype)
                    base = variant(case, "base", None)
                    if row is None or lora is None or base is None:
                        continue
                    cache = f", {row['config']['cache']} cache" if group == "decoding" else ""
                    name = f"{method_name(method)}, {group}{cache}, {shown(dtype)} adapters"
                    lines.append([name, *(_with_quantiles(ratio(row, other)) for other in (base, lora))])
    return markdown(["", "/ frozen base", "/ PEFT LoRA, same dtypes"], lines)


def _table_of_ways(cases: Mapping[str, Sequence[Case]]) -> str:
    lines = []
    for case in cases.get("small inputs", []):
        config = case[0]["config"]
        lora, *ways = (variant(case, method, "bfloat16") for method in ("lora", *WAYS))
        cells = ["" if way is None or lora is None else _with_quantiles(ratio(way, lora)) for way in ways]
        lines.append([f"{config['in_features']} -> {config['out_features']}", str(config["tokens"]), *cells])
    return markdown(["layer", "tokens", "/ PEFT LoRA", "always one node", "always by autograd"], lines)


def gpu_summary(result: Mapping[str, Any]) -> str:
    """Two tables of the GPU set: LoRAMoE against its rivals where the device decides the time, and where the host."""
    cases = groups(result["rows"])
    device_bound = _table_of_rivals(cases, DEVICE_BOUND, RIVALS, memory=True)
    host_bound = _table_of_rivals(cases, HOST_BOUND, LORA_RIVALS)
    return f"{device_bound}\n\n{host_bound}"


def _table_of_rivals(
    cases: Mapping[str, Sequence[Case]],
    rows: Sequence[tuple[str, str, dict[str, Any], str]],
    rivals: Mapping[str, tuple[str, str | None]],
    memory: bool = False,
) -> str:
    lines = []
    for name, group, where, dtype in rows:
        (case,) = (c for c in cases[group] if all(c[0]["config"][key] == value for key, value in where.items()))
        row, others = variant(case, "loramoe", dtype), [variant(case, *rival) for rival in rivals.values()]
        cells = [name, *("" if other is None else _with_quantiles(ratio(row, other)) for other in others)]
        if memory:
            ours, *theirs = ("-" if r is None else f"{r['peak_bytes'] / 2**20:.0f}" for r in (row, *others))
            cells.append(f"{ours}; {', '.join(theirs)}")
        lines.append(cells)
    return markdown(["", *(f"/ {rival}" for rival in rivals), *([MEMORY] if memory else [])], lines)


SUMMARIES = {"cpu": cpu_summary, "gpu": gpu_summary}


def main(arguments: list[str] | None = None) -> None:
    """Print tables or targets, or draw figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "set", nargs="?", choices=("cpu", "gpu"), help="the set whose tables are printed (default: both)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the targets instead")
    parser.add_argument("--summary", action="store_true", help="print the tables of docs/performance.md instead")
    parser.add_argument("--plots", action="store_true", help="draw the figures instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with cpu.json and gpu.json")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the figures")
    options = parser.parse_args(arguments)
    results = {name: result for name in ("cpu", "gpu") if (result := load(name, options.results)) is not None}
    if not results or options.set not in (None, *results):
        what = f"of the {options.set} set " if options.set else ""
        parser.exit(1, f"No result {what}in {options.results}; run `make bench` or `make bench-gpu` first.\n")
    if options.check:
        print(*check(results), sep="\n")
        return
    for name in [options.set] if options.set else results:
        if options.summary:
            print(f"{SUMMARIES[name](results[name])}\n")
            continue
        cases = groups(results[name]["rows"])
        if options.plots:
            for kind, plot in (("steps", plot_steps), ("scaling", plot_scaling)):
                path = options.images / f"performance-{name}-{kind}.png"
                plot(cases, path)
                print(path)
            continue
        print(f"## {name}\n\n{heading(results[name])}\n")
        for group, members in cases.items():
            print(f"### {group}\n\n{table(members)}\n")
            if group == "tokens":
                print(f"{slopes(members)}\n")


if __name__ == "__main__":
    main()
