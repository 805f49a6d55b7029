"""Runs PEFT's own test suite against LoRAMoE and reports passed / skipped with reason / failed.

    python tests/conformance/run.py [--workers 2] [--report PATH] [-k EXPRESSION] [FILE ...]

The tests are those of the installed PEFT version: its source distribution is downloaded once, through pip, into a
cache folder and unpacked there; nothing of it comes into the repository. Tiny models built from configs stand in for
the hub (tiny_hub.py), the plugin puts the LoRAMoE cases into PEFT's tables (plugin.py, cases.py), and pytest runs the
result.

Exit status: 0 if nothing failed and enough tests passed, else 1. Environment: LORAMOE_CONFORMANCE_CACHE is the cache
folder (default ~/.cache/peft_loramoe/conformance); LORAMOE_CONFORMANCE_SDIST names a folder or archive that holds
PEFT's tests, for machines without a package index.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(REPOSITORY)]

PYTEST_INI = """\
[pytest]
markers =
    single_gpu_tests: PEFT's
    multi_gpu_tests: PEFT's
    regression: PEFT's
    bitsandbytes: PEFT's
"""


def cache_folder():
    default = Path.home() / ".cache" / "peft_loramoe" / "conformance"
    return Path(os.environ.get("LORAMOE_CONFORMANCE_CACHE") or default)


def fetch_tests(version, cache):
    """The folder with the tests of this PEFT version, downloaded if need be."""
    given = os.environ.get("LORAMOE_CONFORMANCE_SDIST")
    if given and Path(given).is_dir():
        return next(p for p in (Path(given) / "tests", Path(given)) if list(p.glob("test_*.py")))
    unpacked = cache / "sdist" / f"peft-{version}"
    if not (unpacked / "tests").is_dir():
        archive = Path(given) if given else download(version, cache / "sdist")
        partial = unpacked.with_suffix(f".partial{os.getpid()}")
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and re.fullmatch(r"[^/]+/tests/[\w./-]+", m.name)]
            for member in members:
                target = partial / member.name.split("/", 1)[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
        if not list((partial / "tests").glob("test_*.py")):
            raise SystemExit(f"The source distribution {archive} contains no tests.")
        shutil.rmtree(unpacked, ignore_errors=True)
        partial.rename(unpacked)
    return unpacked / "tests"


def download(version, folder):
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft",
               f"peft=={version}", "--dest", str(folder)]  # fmt: skip
    for attempt in (1, 2, 3):
        if subprocess.run(command).returncode == 0:
            return folder / f"peft-{version}.tar.gz"
        time.sleep(5 * attempt)
    raise SystemExit(f"pip could not download the source distribution of peft {version}.")


def translated_suite(tests, version, cache):
    """A copy of the tests with LoRA's tensor names translated (cases.TRANSLATIONS).

    Returns its root and the line counts.
    """
    from conformance import cases

    stamp = hashlib.sha1(
        (HERE / "cases.py").read_bytes() + str(tests).encode() + Path(__file__).read_bytes()
    ).hexdigest()[:12]
    root = cache / "suites" / f"peft-{version}-{stamp}"
    if not (root / "translated.json").exists():
        for old in (cache / "suites").glob(f"peft-{version}-*"):
            shutil.rmtree(old, ignore_errors=True)
        (root / "tests").mkdir(parents=True, exist_ok=True)
        (root / "pytest.ini").write_text(PYTEST_INI)
        (root / "tests" / "__init__.py").write_text("")
        counts = {}
        for path in sorted(tests.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            new = text
            for pattern, old, replacement in cases.TRANSLATIONS:
                if re.fullmatch(pattern, path.stem):
                    new = re.sub(old, replacement, new)
            (root / "tests" / path.name).write_text(new, encoding="utf-8")
            changed = sum(a != b for a, b in zip(text.splitlines(), new.splitlines()))
            if changed:
                counts[path.name] = changed
        (root / "translated.json").write_text(json.dumps(counts))
    return root, json.loads((root / "translated.json").read_text())


def environment(hub):
    paths = [str(HERE.parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HOME": str(hub),
        "HF_HUB_CACHE": str(hub / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def summarise(data, version, seconds, translated, problems, whole_run):
    """The report's lines, and the list of what is wrong."""
    from conformance import cases

    results = data["results"]
    outcomes = collections.defaultdict(list)
    for result in results:
        outcome = result["outcome"]
        if outcome == "passed" and not result["touched"]:
            outcome = "untouched"
        if outcome == "skipped" and result["reason"].startswith("xfail"):
            outcome = "xfailed"
        outcomes[outcome].append(result)
    passed, failed, skipped = outcomes["passed"], outcomes["failed"], outcomes["skipped"]

    lines = [f"PEFT {version}'s own tests on LoRAMoE", ""]
    per_file = collections.defaultdict(collections.Counter)
    for outcome, group in outcomes.items():
        for result in group:
            per_file[result["test"].split("::")[0].split("/")[-1]][outcome] += 1
    lines += [f"{'file':40}{'passed':>8}{'skipped':>9}{'failed':>8}"]
    for file in sorted(per_file):
        count = per_file[file]
        lines += [f"{file:40}{count['passed']:8}{count['skipped'] + count['xfailed']:9}{count['failed']:8}"]
    lines += ["", "Skipped, by reason (* the test ran and the refusal was seen):"]
    reasons = collections.Counter((result["reason"], result.get("refused", False)) for result in skipped)
    for (reason, refused), count in reasons.most_common():
        lines += [f"{count:6} {'*' if refused else ' '} {reason}"]
    for reason, count in collections.Counter(result["reason"] for result in outcomes["xfailed"]).most_common():
        lines += [f"{count:6}   expected by PEFT to fail: {reason}"]
    lines += ["", "Not part of the run:"]
    for subject, count in sorted(data["dropped"].items(), key=lambda pair: -pair[1]):
        lines += [f"{count:6}  {subject}"]
    lines += [f"{len(outcomes['untouched']):6}  passed, but without making a LoRAMoE config or adapter; not counted"]
    lines += ["", f"LoRA's names translated in {sum(translated.values())} lines of {len(translated)} files."]
    lines += [f"No stand-in model for {repo_id}: {problem}" for repo_id, problem in problems.items()]

    wrong = [f"{len(failed)} tests failed"] if failed else []
    if whole_run:
        if len(passed) < cases.MINIMUM_PASSED:
            wrong += [f"only {len(passed)} tests passed; at least {cases.MINIMUM_PASSED} are expected"]
        wrong += [
            f"no test of {file} passed"
            for file, count in per_file.items()
            if not count["passed"] and file not in cases.ONLY_REFUSALS
        ]
    for result in failed:
        last = [line for line in result["reason"].splitlines() if line.strip()][-1:]
        error = next((line for line in result["reason"].splitlines() if line.startswith("E ")), *last)
        lines += ["", f"FAILED {result['test']}", f"    {error}"]
    lines += ["", f"Wall time {seconds:.0f} s."]
    lines += [f"WRONG: {problem}" for problem in wrong]
    lines += [
        f"conformance: {len(passed)} passed, {len(failed)} failed, {len(skipped) + len(outcomes['xfailed'])} skipped"
    ]
    return lines, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="test files to run instead of all, such as test_config.py")
    parser.add_argument("--workers", type=int, default=2, help="pytest-xdist processes; 0 for none")
    parser.add_argument("--report", type=Path, help="write the report here too")
    parser.add_argument("--json", type=Path, help="write every test's result here")
    parser.add_argument("-k", dest="expression", help="pytest's -k")
    parser.add_argument("--pytest", default="", help="further arguments for pytest, in one string")
    options = parser.parse_args()

    from conformance import cases

    start = time.time()
    version = importlib.metadata.version("peft")
    cache = cache_folder()
    tests = fetch_tests(version, cache)
    root, translated = translated_suite(tests, version, cache)
    files = [f for f in (options.files or cases.FILES) if (root / "tests" / f).exists()]

    hub = cache / "hubs" / f"transformers-{importlib.metadata.version('transformers')}-peft-{version}"
    (hub / "hub").mkdir(parents=True, exist_ok=True)
    env = environment(hub)
    command = [sys.executable, "-m", "conformance.tiny_hub", *(str(root / "tests" / f) for f in files)]
    built = subprocess.run(command, env=env, capture_output=True, text=True)
    if built.returncode:
        print(built.stderr, file=sys.stderr)
        raise SystemExit("The tiny models could not be built.")
    problems = json.loads(built.stdout.splitlines()[-1])["problems"]

    results = root / f"results-{os.getpid()}.json"
    env["LORAMOE_CONFORMANCE_RESULTS"] = str(results)
    command = [sys.executable, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider", "-q", "--no-header",
               "--tb=short", "--disable-warnings", "--rootdir", str(root), "-c", str(root / "pytest.ini")]  # fmt: skip
    if options.workers:
        command += ["-n", str(options.workers), "--maxprocesses", str(options.workers)]
    if options.expression:
        command += ["-k", options.expression]
    command += options.pytest.split()
    status = subprocess.run([*command, *(f"tests/{f}" for f in files)], env=env, cwd=root).returncode
    if not results.exists():
        raise SystemExit(f"pytest ended with status {status} and left no results.")
    data = json.loads(results.read_text())
    results.unlink()

    whole_run = not options.files and not options.expression
    lines, wrong = summarise(data, version, time.time() - start, translated, problems, whole_run)
    if status not in (0, 1, 5):
        wrong.append(f"pytest ended with status {status}")
        lines.insert(-1, f"WRONG: {wrong[-1]}")
    text = "\n".join(lines) + "\n"
    print("\n" + text, end="")
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(data, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
