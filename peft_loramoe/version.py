"""The package's version, and where it is published; setup.cfg and setup.py read both from here."""

from __future__ import annotations


__version__ = "0.1.0"

# The address of the public repository, such as "https://github.com/OWNER/peft_loramoe". It is None until the name is
# registered on the package index (docs/release.md), and till then nothing may tell a stranger to install by name.
HOME: str | None = None

if HOME:
    INSTALL = "pip install peft_loramoe"
else:
    INSTALL = f"pip install ./peft_loramoe  # a checkout or wheel of version {__version__}; not on the public index"


def needs(what: str, package: str, extra: str) -> str:
    """The message that something needs a package of an extra. The name is installed, so pip asks no index for it.

    Example:
        >>> needs("--load-in-4bit", "bitsandbytes", "bnb")
        '--load-in-4bit needs bitsandbytes: pip install "peft_loramoe[bnb]"'
    """
    return f'{what} needs {package}: pip install "peft_loramoe[{extra}]"'
