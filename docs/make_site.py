"""Write the sources of the documentation site into build/docs, which mkdocs.yml names.

    python docs/make_site.py

They are the pages of docs/, with these changes:

- configuration.md gets every option of `LoRAMoEConfig` with its help, command-line.md every command with its flags.
- A link that is named like the page, [training.md](training.md), gets the page's title.
- Pages link to files beside docs/, such as ../research/toy/results/report.md, so that they read well on a Git host.
  Each file that is linked becomes part of the site, and what it links to as well.

It imports of the package what needs neither torch nor PEFT.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# The text of a link, its target and the anchor; links to other sites and within the page are left alone.
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#)([^)#\s]+)")
# The page's code blocks, which hold no links.
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# The option that each group of options begins with.
HEADINGS = {"r": "As in LoRA", "num_experts": "Experts and routers", "balance_loss_weight": "The balance term"}


def options_reference() -> str:
    """Every option of LoRAMoEConfig: default and help."""
    _without_torch()
    from peft_loramoe.fields import ConfigFields

    text = "## Every option\n"
    for field in dataclasses.fields(ConfigFields):
        if field.name in HEADINGS:
            text += f"\n### {HEADINGS[field.name]}\n"
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text += f"\n#### `{field.name}` {{ #{field.name} }}\n\n{field.metadata['help']}\n\nDefault: `{default!r}`\n"
    return text


def commands_reference() -> str:
    """The help of every command, from the parsers."""
    _without_torch()
    from peft_loramoe.cli.arguments import build_parser

    return "\n\n".join(_command(parser) for parser in _leaves(build_parser())) + "\n"


def _without_torch() -> None:
    """Import of the package what needs neither torch nor PEFT, as the command line does while it parses."""
    if "peft_loramoe" not in sys.modules:
        import _peft_loramoe_command

        _peft_loramoe_command.PARSING = True


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the commands, operations of commands included."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in nested for child in action.choices.values() for leaf in _leaves(child)] or [parser]


def _command(parser: argparse.ArgumentParser) -> str:
    os.environ["COLUMNS"] = "88"  # argparse wraps its help to this width
    title = parser.prog.removeprefix("peft-loramoe ")
    return f"## {title}\n\n```text\n{parser.format_help().strip()}\n```"


GENERATED = {"configuration.md": options_reference, "command-line.md": commands_reference}


def files_of_the_site() -> set[Path]:
    """The files of docs/, and those outside that its pages lead to over any number of links."""
    found = {file for file in DOCS.rglob("*") if file.suffix in (".md", ".png", ".css")}
    pages = [file for file in found if file.suffix == ".md"]
    while pages:
        page = pages.pop()
        for _, link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = (page.parent / link).resolve()
            if target.is_file() and target not in found:
                found.add(target)
                if target.suffix == ".md":
                    pages.append(target)
    return found


def site_path(file: Path) -> Path:
    """Where a file of the repository is in the site's sources."""
    return file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT)


def title(page: Path) -> str:
    """The first heading of a page, which stands for its file name in links to it."""
    return re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[1].replace("`", "")


def page_of_the_site(page: Path) -> str:
    """A page with links as they are in the site, and with what is generated for it."""

    def moved(match: re.Match) -> str:
        target = (page.parent / match[2]).resolve()
        if not target.is_file():
            return match[0]
        text = title(target) if match[1] == target.name and target.suffix == ".md" else match[1]
        return f"[{text}]({os.path.relpath(site_path(target), site_path(page).parent)}"

    text = LINK.sub(moved, page.read_text(encoding="utf-8"))
    generate = GENERATED.get(site_path(page).as_posix())
    return f"{text}\n{generate()}" if generate else text


def write_site(folder: Path) -> None:
    """Write all files into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in files_of_the_site():
        target = folder / site_path(file)
        if target.exists():
            raise ValueError(f"{file}: the site has a file {site_path(file)} already; link to one of the two only.")
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(page_of_the_site(file), encoding="utf-8")
        else:
            shutil.copyfile(file, target)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write_site(ROOT / "build" / "docs")
