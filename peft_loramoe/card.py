"""The model card of a saved adapter: it needs this package, and is loaded like this."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .version import INSTALL


TAGS = ("loramoe", "mixture-of-experts", "peft_loramoe")
BEGIN, END = "<!-- peft_loramoe: begin -->", "<!-- peft_loramoe: end -->"

TEXT = """\
## Loading this adapter

This is a LoRAMoE adapter (mixture of LoRA experts). PEFT loads it once `peft_loramoe` is imported; without the import
it stops with `KeyError: 'LORAMOE'`.

```bash
{install}
```

```python
{snippet}
```

## LoRAMoE configuration

```json
{config}
```
"""


# transformers' class for each of PEFT's task types.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def loading_snippet(adapter: str, options: Mapping[str, Any], gguf_file: str | None = None) -> str:
    """Python code that loads an adapter on its base model.

    Args:
        adapter: its folder or Hub repository.
        options: the adapter's configuration by name, as in ``adapter_config.json``.
        gguf_file: the file that the base model is read from, if it is a GGUF file.
    """
    auto_class = AUTO_CLASSES.get(options.get("task_type") or "", "AutoModel")
    base_model = options.get("base_model_name_or_path") or "BASE_MODEL"
    given = {"revision": options.get("revision"), "gguf_file": gguf_file}
    more = "".join(f", {name}={_literal(value)}" for name, value in given.items() if value is not None)
    return (
        "import peft_loramoe  # registers LORAMOE with PEFT\nfrom peft import PeftModel\nfrom transformers import "
        f"{auto_class}\n\nbase_model = {auto_class}.from_pretrained({_literal(base_model)}{more})\nmodel = "
        f"PeftModel.from_pretrained(base_model, {_literal(adapter)})"
    )


def _literal(text: str) -> str:
    """The Python literal of a name that somebody else may have chosen: on one line, and without a mark of HTML."""
    # `repr` takes double quotes for a text with a single one in it; that one is cut off again.
    quoted = repr(text) if '"' in text else '"' + repr("'" + text)[2:]
    return quoted.replace("<", "\\x3c")


def is_hub_name(base_model: str) -> bool:
    """Whether a card's metadata may name this base model: the Hub refuses cards that name a local folder, or worse."""
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return False
    return not os.path.isdir(base_model)


def write_card(path: str, options: Mapping[str, Any], gguf_file: str | None = None) -> None:
    """Add the loading snippet, the configuration and the tags to a model card, or write a new card.

    Everything else in the card is kept; saving again replaces what an earlier call added.

    Args:
        path: the card, ``README.md`` of the adapter's folder.
        options: the adapter's configuration by name, as in ``adapter_config.json``.
        gguf_file: the file that the base model is read from, if it is a GGUF file.
    """
    if os.path.exists(path):
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        base_model = options.get("base_model_name_or_path")
        named = base_model if base_model and is_hub_name(base_model) else None
        card = ModelCard.from_template(ModelCardData(library_name="peft", base_model=named))
    tags = {*(card.data.get("tags") or ()), *TAGS}
    base_model = card.data.get("base_model")
    if isinstance(base_model, str) and not is_hub_name(base_model):
        tags -= {f"base_model:adapter:{base_model}"}
        card.data["base_model"] = None
    card.data["tags"] = sorted(tags)

    options = {key: sorted(value) if isinstance(value, set) else value for key, value in options.items()}
    text = TEXT.format(
        install=INSTALL,
        snippet=loading_snippet("ADAPTER", options, gguf_file),
        config=json.dumps(
            {key: value for key, value in options.items() if value not in (None, {}, [])}, indent=2
        ).replace("<", r"\u003c"),
    )
    block = f"{BEGIN}\n{text}{END}\n"
    rest = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", "", card.text, flags=re.DOTALL)
    card.text = f"{rest.rstrip()}\n\n{block}"
    card.save(path)
