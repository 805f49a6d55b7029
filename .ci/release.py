"""Say what is missing for a release of the version in peft_loramoe/version.py. Exit status 1 if anything is.

python .ci/release.py
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def git(*arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def missing(version: str, home: str | None) -> list[str]:
    """One sentence for each thing that has to be done first."""
    found = []
    if home is None:
        found += ["HOME in peft_loramoe/version.py is None: register the name and set it (docs/release.md)."]
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", text("CHANGELOG.md"), re.MULTILINE):
        found += [f'CHANGELOG.md has no heading "## {version} (YYYY-MM-DD)".']
    if f"\nversion: {version}\n" not in text("CITATION.cff"):
        found += [f"CITATION.cff does not say version {version}."]
    if git("status", "--porcelain"):
        found += ["There are changes that are not committed."]
    tagged = git("tag", "--points-at", "HEAD").split()
    if f"v{version}" in git("tag").split() and f"v{version}" not in tagged:
        found += [f"The tag v{version} exists and is another commit: raise the version."]
    return found


if __name__ == "__main__":
    settings = runpy.run_path(str(ROOT / "peft_loramoe" / "version.py"))
    problems = missing(settings["__version__"], settings["HOME"])
    print("\n".join(problems) or f"Version {settings['__version__']} can be released.")
    sys.exit(bool(problems))
