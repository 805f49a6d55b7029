"""The first example of the README, on a small model in place of the one that it names, and the links of all pages."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from example_scripts import build_toy


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    *ROOT.glob("*.md"),
    *(page for name in ("docs", "research", "examples") for page in (ROOT / name).rglob("*.md")),
]


def anchors_of(page: Path) -> set[str]:
    """What `#...` may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or anchor in anchors_of(target)), link


def test_the_first_example_trains_and_saves(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    model = build_toy(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("Qwen/Qwen3-0.6B", str(model)), {})
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))
