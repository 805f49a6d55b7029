"""What a reader of a saved adapter has to know: that it needs this package, and how to load it."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


if TYPE_CHECKING:
    from .config import LoRAMoEConfig


TAGS = ("loramoe", "mixture-of-experts", "peft_loramoe")
BEGIN, END = "<!-- peft_loramoe: begin -->", "<!-- peft_loramoe: end -->"

TEXT = """\
## Loading this adapter

This is a LoRAMoE adapter (mixture of LoRA experts). PEFT loads it once `peft_loramoe` is imported; without the import
it stops with `KeyError: 'LORAMOE'`.

```bash
pip install peft_loramoe
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


def loading_snippet(adapter: str, config: LoRAMoEConfig) -> str:
    """The lines of Python that load the adapter in that folder or Hub repository on its base model."""
    auto_class = AUTO_CLASSES.get(config.task_type, "AutoModel")
    return (
        "import peft_loramoe  # registers LORAMOE with PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f"base_model = {auto_class}.from_pretrained({_literal(config.base_model_name_or_path or 'BASE_MODEL')})\n"
        f"model = PeftModel.from_pretrained(base_model, {_literal(adapter)})"
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


def write_card(path: str, config: LoRAMoEConfig) -> None:
    """Add the loading snippet, the configuration and the tags to the model card at `path`; write one if there is none.

    Everything else in the card is kept; saving again replaces what an earlier call added.
    """
    if os.path.exists(path):
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        base_model = config.base_model_name_or_path
        named = base_model if base_model and is_hub_name(base_model) else None
        card = ModelCard.from_template(ModelCardData(library_name="peft", base_model=named))
    tags = {*(card.data.get("tags") or ()), *TAGS}
    base_model = card.data.get("base_model")
    if isinstance(base_model, str) and not is_hub_name(base_model):
        tags -= {f"base_model:adapter:{base_model}"}
        card.data["base_model"] = None
    card.data["tags"] = sorted(tags)

    options = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    text = TEXT.format(
        snippet=loading_snippet("ADAPTER", config),
        config=json.dumps({key: value for key, value in options.items() if value not in (None, {}, [])}, indent=2).replace(
            "<", r"\u003c"
        ),
    )
    block = f"{BEGIN}\n{text}{END}\n"
    rest = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", "", card.text, flags=re.DOTALL)
    card.text = f"{rest.rstrip()}\n\n{block}"
    card.save(path)
