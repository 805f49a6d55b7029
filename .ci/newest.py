"""Run tests with the newest transformers, peft and TRL on PyPI, if any is newer than the installed one.

    .venv/bin/python .ci/newest.py [-- PYTEST_ARGUMENTS]

The newest versions, and what they need newer, go to build/newest, in front of the environment that runs this; the
environment stays as it is. The last line says which versions were tried and how it went; so does the exit status.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


PACKAGES = ("transformers", "peft", "trl")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "newest"
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def newer_versions() -> list[str]:
    """Requirements, "name==version", of what `pip install --upgrade` would install."""
    done = subprocess.run(
        [*PIP, "--dry-run", "--report", "-", "--upgrade", *PACKAGES], check=True, stdout=subprocess.PIPE
    )
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return sorted(f"{metadata['name']}=={metadata['version']}" for metadata in found)


def main(pytest_arguments: list[str]) -> int:
    """Return pytest's exit status, or 0 if there is nothing newer."""
    versions = newer_versions()
    if not versions:
        print(f"newest: {', '.join(PACKAGES)} are the newest already")
        return 0
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([*PIP, "--no-deps", "--target", str(FOLDER), *versions], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    status = subprocess.run([sys.executable, "-m", "pytest", *pytest_arguments], cwd=ROOT, env=environment).returncode
    print(f"newest: {'passed' if status == 0 else 'failed'} with {', '.join(versions)}")
    return status


if __name__ == "__main__":
    sys.exit(main([argument for argument in sys.argv[1:] if argument != "--"]))
