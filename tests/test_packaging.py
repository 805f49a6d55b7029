"""What the package says about itself: where it is published, its extras and the oldest versions that it works with.

`make check-wheel` checks the archives themselves.
"""

import configparser
import re
import runpy
from pathlib import Path

import pytest
import yaml

from peft_loramoe.card import write_card
from peft_loramoe.version import HOME, INSTALL, __version__


pytestmark = pytest.mark.version_independent

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]
DEVELOPMENT = {"demo", "dev", "docs", "research"}  # named where they are needed

index_page = runpy.run_path(str(ROOT / "setup.py"))["index_page"]


@pytest.mark.parametrize(
    ("link", "with_home", "without"),
    [
        ("[a page](docs/a.md#part)", "[a page](https://host/blob/main/docs/a.md#part)", "a page"),
        ("![a figure](images/a.png)", "![a figure](https://host/raw/main/images/a.png)", ""),
        ("[elsewhere](https://other/a)", "[elsewhere](https://other/a)", "[elsewhere](https://other/a)"),
        ("[below](#part)", "[below](#part)", "[below](#part)"),
    ],
)
def test_links_of_an_index_page_are_absolute_or_text(link, with_home, without):
    assert index_page(f"See {link}.", "https://host") == f"See {with_home}."
    assert index_page(f"See {link}.", None) == f"See {without}."


def test_a_model_card_says_how_to_install(tmp_path):
    write_card(str(tmp_path / "README.md"), {})
    assert f"```bash\n{INSTALL}\n```" in (tmp_path / "README.md").read_text()


TEXTS = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "peft_loramoe").rglob("*.py")} - {
    ROOT / "peft_loramoe" / "version.py"
}


@pytest.mark.skipif(HOME is not None, reason="the name is registered")
def test_nobody_is_told_to_install_a_name_that_is_not_registered():
    by_name = re.compile(r"pip install (-\S+ )*[\"']?peft[-_]loramoe")
    assert [path for path in TEXTS if by_name.search(path.read_text(encoding="utf-8"))] == []


def test_the_readme_knows_whether_the_name_is_registered():
    assert ("not on the public index" in README) == (HOME is None)


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - DEVELOPMENT))
def test_the_readme_names_every_extra(extra):
    assert f"`{extra}`" in README


@pytest.mark.parametrize(
    "package", ["accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "transformers", "trl"]
)
def test_the_oldest_allowed_versions_are_those_that_are_tested(package):
    requirements = "\n".join([SETUP["options"]["install_requires"], *EXTRAS.values()])
    oldest = re.search(rf"^{package}>=([\d.]+)", requirements, re.MULTILINE)[1]
    pinned = re.search(rf"^{package}==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)[1]
    assert pinned == oldest or pinned == f"{oldest}.0"


def test_the_citation_and_the_changelog_are_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_a_version_that_is_not_ready_is_not_released():
    missing = runpy.run_path(str(ROOT / ".ci" / "release.py"))["missing"]("99.0", None)
    assert [sentence.split()[0] for sentence in missing[:3]] == ["HOME", "CHANGELOG.md", "CITATION.cff"]


def test_workflows_run_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        used = {target for job in jobs for target in job.get("strategy", {}).get("matrix", {}).get("target", [])}
        commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        assert all(command.startswith("make ") for command in commands), path
        used |= {command.removeprefix("make ") for command in commands} - {"${{ matrix.target }}"}
        assert used <= targets, path


def test_one_version_of_ruff():
    texts = ["constraints.txt", "constraints-oldest.txt", "setup.cfg", ".pre-commit-config.yaml"]
    assert (
        len({version for name in texts for version in re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text())}) == 1
    )
