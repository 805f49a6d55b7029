"""Load the model of a saved adapter, and read texts from a file."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..analysis.adapted import adds_special_tokens
from ..card import AUTO_CLASSES
from ..config import LoRAMoEConfig
from ..interop import read_adapter
from ..interop.files import EXPERT_KEY, experts_by_module
from ..interop.inspect import loramoe_config
from ..reading import read_json_lines
from .base_model import BaseModel, same_model


ADAPTER = "default"  # name of the loaded adapter


@dataclass(frozen=True)
class SavedAdapter:
    """The content of a LoRAMoE adapter's files, and its base model."""

    source: str
    config: LoRAMoEConfig
    tensors: dict[str, Tensor]
    base: BaseModel

    @classmethod
    def read(cls, source: str, command: Namespace) -> SavedAdapter:
        """Read an adapter.

        Args:
            source: an adapter folder or Hub id.
            command: the options of the command, those of `options.model_options` among them.

        Raises:
            FileNotFoundError: the adapter does not exist.
            ValueError: it is not a LoRAMoE adapter, or the base model is unknown.
        """
        options, tensors = read_adapter(source)
        config = loramoe_config(source, options)
        experts_by_module(tensors)
        named = config.base_model_name_or_path
        base = command.base_model or named
        if not base:
            raise ValueError(f"'{source}' does not name its base model; pass it as --base-model.")
        if not (named and same_model(base, named)):
            config.revision = None  # it is the other model's
        config.base_model_name_or_path = base
        model = BaseModel.of(command, base, flag="--base-model", revision=config.revision or "main")
        return cls(source, config, tensors, model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer.

        Raises:
            ValueError: the model is not a causal language model, which the commands require for texts.
        """
        if self.config.task_type != "CAUSAL_LM":
            kind = f"'{self.source}' has task_type={self.config.task_type!r}"
            raise ValueError(f"Texts need a causal language model; {kind}.")
        return self.base.tokenizer()

    def load(self) -> PeftModel:
        """Load the base model with the adapter in eval mode."""
        model = PeftModel.from_pretrained(self.base.load(self._auto_class), self.source, ADAPTER)
        return self._on_base_model(model)

    def load_without_base(self) -> PeftModel:
        """Load without the base model's weights, unless the adapter trains some of them.

        Raises:
            ValueError: the options say how to load these weights.
        """
        if not all(EXPERT_KEY.fullmatch(key) for key in self.tensors):
            return self.load()
        for flag, given in (("--load-in-4bit", self.base.load_in_4bit), ("--dtype", self.base.dtype != "auto")):
            if given:
                raise ValueError(f"{flag} has no effect without --calibration: the base model's weights are not read.")
        with torch.device("meta"):
            model = PeftModel(self._auto_class.from_config(self.base.config()), self.config, ADAPTER)
        named = {
            key.replace(".loramoe_experts.", f".loramoe_experts.{ADAPTER}."): t for key, t in self.tensors.items()
        }
        model.load_state_dict(named, strict=False, assign=True)
        return self._on_base_model(model)

    def _on_base_model(self, model: PeftModel) -> PeftModel:
        """The model in eval mode, with the base model that was loaded in its configuration."""
        config = model.peft_config[ADAPTER]
        config.base_model_name_or_path, config.revision = self.config.base_model_name_or_path, self.config.revision
        return model.eval()

    @property
    def _auto_class(self) -> type:
        return getattr(transformers, AUTO_CLASSES.get(self.config.task_type or "CAUSAL_LM", "AutoModel"))


def read_batches(
    file: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """Read batches of keyword arguments of the model from a JSON Lines file.

    Padding is always on the right, since some models count positions from the left. Texts that begin with BOS get no
    special tokens.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON record with a `text`, a `task_type` is not an integer or name, or the file is
            empty.
    """
    records = _read_records(file)
    typed = any("task_type" in record for record in records)

    def encode(text: str) -> Tensor:
        special = adds_special_tokens(tokenizer, text)
        ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=max_length)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [encode(record["text"]) for record in rows]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        return {**inputs, "task_types": [record.get("task_type", -1) for record in rows]} if typed else inputs

    return [batch(records[start : start + batch_size]) for start in range(0, len(records), batch_size)]


def _read_records(file: Path) -> list[dict[str, Any]]:
    records = []
    for where, record in read_json_lines(file):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
            raise ValueError(f'{where}: must be a record like {{"text": "...", "task_type": 0}}; text is missing.')
        task_type = record.get("task_type", -1)
        if isinstance(task_type, bool) or not isinstance(task_type, (int, str)):
            raise ValueError(f"{where}: task_type={task_type!r} must be an index or a name; omit it if unknown.")
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no record.")
    return records
