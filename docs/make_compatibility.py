"""Write the tables of docs/results/compatibility.md, which follow `MARK` there, from test runs.

    python docs/make_compatibility.py --run      run the tests below in this environment, then write the tables
    python docs/make_compatibility.py            write the tables from what is in docs/results

A run is docs/results/compatibility-PEFT_VERSION.json, a report of PEFT's own tests
docs/results/conformance-PEFT_VERSION.txt. `make compatibility` makes those that are committed, in the environments of
the two constraints files.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGE = RESULTS / "compatibility.md"
MARK = "<!-- Written by `make compatibility` from here on. -->"
# Test file -> heading of its table.
TABLES = {
    "test_architectures": "Architectures",
    "test_quantization": "Quantised backbones",
    "test_loading": "Loading, and what is refused",
    "test_adapters": "Several adapters",
    "test_devices": "Dtypes and devices",
    "test_compile": "torch.compile",
    "test_diffusers": "Diffusers",
}
CASES_SHOWN = 24
LIBRARIES = ("peft", "transformers", "torch", "accelerate", "bitsandbytes", "torchao", "diffusers", "huggingface_hub")


def version(library: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def run() -> None:
    """Run the tests of `TABLES` and write their outcomes with the versions that they ran with."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/{name}.py" for name in TABLES]
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files], cwd=DOCS.parent)
        cases = [outcome(case) for case in ElementTree.parse(report).iter("testcase")]
    about = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {library: version(library) for library in LIBRARIES},
    }
    path = RESULTS / f"compatibility-{about['versions']['peft']}.json"
    path.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")
    print(f"wrote {path}")


def outcome(case: ElementTree.Element) -> dict[str, str]:
    """One test case of a JUnit report as a row."""
    problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    row = {"file": case.get("classname").split(".")[-1], "case": case.get("name")}
    row["outcome"] = "passed" if problem is None else {"skipped": "skipped"}.get(problem.tag, "failed")
    if problem is not None:
        row["reason"] = re.sub(r"^.*?: ", "", problem.get("message", "")).splitlines()[0]
    return row


def sentence(name: str) -> tuple[str, str]:
    """A test's name as words, and the case in its brackets."""
    test, _, case = name.partition("[")
    return test.removeprefix("test_").replace("_", " "), case.removesuffix("]")


def table(file: str, runs: list[dict]) -> list[str]:
    """Markdown table of one test file: what was checked, with which cases, and how it went in each run."""
    rows: dict[str, dict[str, list[tuple[str, str, str]]]] = {}
    for run_ in runs:
        for case in run_["cases"]:
            if case["file"] == file:
                test, parameter = sentence(case["case"])
                entry = rows.setdefault(test, {}).setdefault(run_["about"]["versions"]["peft"], [])
                entry.append((parameter, case["outcome"], case.get("reason", "")))
    versions = [run_["about"]["versions"]["peft"] for run_ in runs]
    lines = ["| checked | " + " | ".join(f"peft {v}" for v in versions) + " |", "|---|" + "---|" * len(versions)]
    for test, by_version in rows.items():
        lines.append(f"| {test} | " + " | ".join(cell(by_version.get(v, [])) for v in versions) + " |")
    return lines


def cell(cases: list[tuple[str, str, str]]) -> str:
    """How the cases of one test went, with the reason of everything that did not pass."""
    groups: dict[tuple[str, str], list[str]] = {}
    for parameter, outcome_, reason in cases:
        groups.setdefault((outcome_, reason), []).append(parameter)
    parts = []
    for (outcome_, reason), parameters in groups.items():
        named = [parameter for parameter in parameters if parameter and "<" not in parameter]
        shown = ", ".join(named[:CASES_SHOWN]) + (
            f" and {len(named) - CASES_SHOWN} more" if len(named) > CASES_SHOWN else ""
        )
        parts.append(outcome_ + (f" ({reason})" if reason else "") + (f": {shown}" if shown else ""))
    return "; ".join(parts).replace("|", "\\|") or "-"


def overview(runs: list[dict]) -> list[str]:
    """Markdown table of the combinations of versions: one row for each run, and how many of its cases passed."""
    lines = [
        "| " + " | ".join(("date", "device", "Python", *LIBRARIES, "cases")) + " |",
        "|" + "---|" * (len(LIBRARIES) + 4),
    ]
    for run_ in runs:
        about, counts = run_["about"], Counter(case["outcome"] for case in run_["cases"])
        cases = ", ".join(f"{counts[outcome_]} {outcome_}" for outcome_ in ("passed", "failed", "skipped"))
        versions = [about["versions"].get(library) or "-" for library in LIBRARIES]
        lines.append("| " + " | ".join((about["date"], about["device"], about["python"], *versions, cases)) + " |")
    return lines


def write_page() -> None:
    """Replace what follows `MARK` in docs/results/compatibility.md."""
    text, mark, _ = PAGE.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} has no line {MARK!r}; put it where the tables shall begin.")
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("compatibility-*.json"), reverse=True)]
    lines = [text.rstrip(), "", MARK, "", "## Runs", "", *overview(runs)]
    for file, heading in TABLES.items():
        lines += ["", f"## {heading}", "", f"`tests/{file}.py`", "", *table(file, runs)]
    lines += ["", "## PEFT's own tests", "", "`make conformance`", ""]
    for path in sorted(RESULTS.glob("conformance-*.txt"), reverse=True):
        lines += ["```text", path.read_text().rstrip(), "```", ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the tests in this environment first")
    if parser.parse_args().run:
        run()
    write_page()
