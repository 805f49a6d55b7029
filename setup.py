"""What setup.cfg cannot say: addresses, which depend on `HOME` in peft_loramoe/version.py."""

import re
import runpy
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
HOME = runpy.run_path(str(ROOT / "peft_loramoe" / "version.py"))["HOME"]
PAGES = {
    "Source": "",
    "Documentation": "/tree/main/docs",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}


def index_page(text: str, home: str | None) -> str:
    """The README for a package index, where relative links lead nowhere.

    They become absolute. Without a public repository, images are left out, and of links only the text is kept.
    """

    def replace(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        if home is None:
            return "" if mark else label
        return f"{mark}[{label}]({home}/{'raw' if mark else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", replace, text)


if __name__ == "__main__":
    setup(
        long_description=index_page((ROOT / "README.md").read_text(encoding="utf-8"), HOME),
        long_description_content_type="text/markdown",
        project_urls={
            "Paper": "https://arxiv.org/abs/2312.09979",
            **({name: f"{HOME}{path}" for name, path in PAGES.items()} if HOME else {}),
        },
    )
