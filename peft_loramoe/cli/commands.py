"""Commands that call `interop` and print the results."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from .. import interop
from ..interop.inspect import inspect_adapter
from ..version import needs
from . import tables
from .models import ADAPTER, SavedAdapter, read_batches
from .options import json_value


# Options of `train` that are about --dataset alone, and what to do in their place with --train-file.
OF_DATASET = {
    "dataset_config": "leave it out",
    "train_split": "leave it out",
    "eval_split": "with --train-file, give --eval-file",
}


def inspect(options: Namespace) -> None:
    """Print a summary of an adapter."""
    summary = inspect_adapter(options.adapter)
    if options.json:
        print_json(summary.to_dict())
    else:
        tables.show_summary(summary, options.layers)


def convert(options: Namespace) -> None:
    """Convert an adapter from or to the layout of another program."""
    interop.convert_checkpoint(options.source, options.output, options.to)
    print(f"Wrote {options.output}.")


def upcycle(options: Namespace) -> None:
    """Turn plain LoRAs into a mixture."""
    given = dict(_option(text) for text in options.set)
    config = interop.upcycle(
        options.sources, options.output, num_experts=options.num_experts, method=options.method, **given
    )
    print(
        f"Wrote {options.output}: {config.num_experts} experts of rank {config.r}, in groups of "
        f"{config.expert_groups}."
    )


def export_lora(options: Namespace) -> None:
    """Export a mixture to a plain LoRA."""
    if options.output.exists():  # before the model is loaded
        raise FileExistsError(f"The output folder '{options.output}' exists already; remove it or choose another one.")
    model, batches = load_with_texts(options)
    report = interop.export_lora(
        model,
        options.output,
        gates=options.gates,
        weights=options.weights,
        task_type=options.task_type,
        rank=options.rank,
        calibration=batches,
        max_kl_share=options.max_kl_share,
        each_layer=options.each_layer,
        show=not options.json,
    )
    if options.json:
        print_json(report.to_dict())
        return
    if options.layers:
        interop.print_report(report, each_layer=True)
    print(f"Wrote {options.output}.")


def list_experts(options: Namespace) -> None:
    """Print the experts of each layer."""
    model, batches = load_with_texts(options)
    records = interop.list_experts(model, batches)
    if options.json:
        print_json(records)
    else:
        tables.show_experts(records, options.layers)


def add_experts(options: Namespace) -> None:
    """Add experts to an adapter."""
    named = {name: getattr(options, name) for name in ("count", "group", "name", "start", "fill_with_null")}
    _operate(options, lambda model, batches: interop.add_experts(model, calibration=batches, **named))


def remove_experts(options: Namespace) -> None:
    """Remove experts from an adapter."""
    _operate(options, lambda model, batches: interop.remove_experts(model, options.experts, calibration=batches))


def reorder_experts(options: Namespace) -> None:
    """Reorder the experts of an adapter."""
    _operate(options, lambda model, batches: interop.reorder_experts(model, options.order))


def merge_experts(options: Namespace) -> None:
    """Merge two experts of an adapter."""
    _operate(options, lambda model, batches: interop.merge_experts(model, *options.experts, calibration=batches))


def _operate(options: Namespace, operation: Callable[[PeftModel, Any], interop.Surgery]) -> None:
    with interop.new_folder(options.output) as folder:
        model, batches = load_with_texts(options)
        change = operation(model, batches)
        tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        interop.write_adapter(folder, model.peft_config[ADAPTER], tensors)
    if options.json:
        print_json(change.to_dict())
    else:
        tables.show_change(change, "texts" in options, options.layers)
        print(f"Wrote {options.output}.")


def load_with_texts(options: Namespace) -> tuple[PeftModel, list[dict[str, Any]] | None]:
    """The model, with the base model's weights only if there are texts to run, and batches of these texts."""
    adapter = SavedAdapter.read(options.adapter, options)
    if getattr(options, "texts", None) is None:
        return adapter.load_without_base(), None
    batches = read_batches(options.texts, adapter.tokenizer(), options.batch_size, options.max_length)
    return adapter.load(), batches


def print_json(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(value, indent=2))


def _option(text: str) -> tuple[str, Any]:
    """Parse OPTION=VALUE."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text}: must be OPTION=VALUE.")
    return name, json_value(value)


def train(options: Namespace) -> None:
    """Train an adapter and save it."""
    if missing := [name for name in ("accelerate", "datasets", "trl") if find_spec(name) is None]:
        raise ImportError(needs("train", ", ".join(missing), "train"))
    if (options.train_file is None) == (options.dataset is None):
        raise ValueError("give either --train-file or --dataset.")
    for name, fix in OF_DATASET.items():
        if (value := getattr(options, name)) is not None and options.dataset is None:
            raise ValueError(f"--{name.replace('_', '-')} {value} has no effect without --dataset; {fix}.")
    from .train_run import run

    run(options)
