"""The model that an adapter belongs to, and calibration data from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..card import AUTO_CLASSES
from ..interop import read_adapter
from ..interop.files import EXPERT_KEY, experts_by_module
from ..interop.inspect import loramoe_config


ADAPTER = "default"  # the name under which it is loaded


@dataclass(frozen=True)
class Calibration:
    """Calibration data: a file with one JSON record a line, and how it is cut into batches."""

    file: Path
    batch_size: int
    max_length: int


def load_model(
    source: str, base_model: str | None, device: str | None, calibration: Calibration | None
) -> tuple[PeftModel, list[dict[str, Any]] | None]:
    """Load an adapter on its base model, and the calibration data.

    Without calibration data the base model's weights are not needed, unless the adapter trains some of them: then it is built
    from its configuration, without memory for its weights.

    Args:
        source: an adapter folder or Hub id.
        base_model: folder or Hub id of the base model; None for the one that the adapter names.
        device: where the base model's weights go; None for the GPU, if there is one.
        calibration: None for none.

    Returns:
        The model, in evaluation mode, with the adapter "default" active, and the batches, or None.

    Raises:
        FileNotFoundError: the adapter or the file does not exist.
        ValueError: it is no LoRAMoE adapter, no base model is named, or the calibration data are not what they must be.
    """
    options, tensors = read_adapter(source)
    config = loramoe_config(source, options)
    experts_by_module(tensors)
    base = base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"'{source}' does not say which base model it belongs to; name it with --base-model.")
    batches = None
    if calibration is not None:
        if config.task_type != "CAUSAL_LM":
            raise ValueError(f"--calibration is for causal language models; '{source}' has task_type={config.task_type!r}.")
        batches = list(read_batches(calibration, AutoTokenizer.from_pretrained(base)))
    auto_class = getattr(transformers, AUTO_CLASSES.get(config.task_type or "CAUSAL_LM", "AutoModel"))
    if batches is None and all(EXPERT_KEY.fullmatch(key) for key in tensors):
        with torch.device("meta"):
            model = PeftModel(auto_class.from_config(AutoConfig.from_pretrained(base)), config, ADAPTER)
        named = {key.replace(".loramoe_experts.", f".loramoe_experts.{ADAPTER}."): t for key, t in tensors.items()}
        model.load_state_dict(named, strict=False, assign=True)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = auto_class.from_pretrained(base, dtype="auto", device_map={"": device})
        model = PeftModel.from_pretrained(loaded, source, ADAPTER)
    model.peft_config[ADAPTER].base_model_name_or_path = base
    return model.eval(), batches


def read_batches(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the model, batch by batch.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is no JSON record with a `text`, or there is none.
    """
    records = _read_records(calibration.file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    typed = any("task_type" in record for record in records)
    for start in range(0, len(records), calibration.batch_size):
        rows = records[start : start + calibration.batch_size]
        texts = [record["text"] for record in rows]
        batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=calibration.max_length))
        batch.pop("token_type_ids", None)
        yield {**batch, "task_types": [record.get("task_type", -1) for record in rows]} if typed else batch


def _read_records(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no valid JSON ({error}).") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
            raise ValueError(
                f'{file}, line {number}: must be a record like {{"text": "...", "task_type": 0}}; text is missing.'
            )
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no record.")
    return records
