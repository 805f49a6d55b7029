"""A Griffe extension for the documentation site: docstrings in the dialect that Griffe parses."""

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """`Example:` becomes `Examples:`, whose content is code, and the `::` before an indented block a colon.

    The heading at the end of LoRAMoEConfig's, to which its options are added at run time, goes.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\n\s*Options:\s*\Z", "", text)
