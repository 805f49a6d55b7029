"""Recognising the layout of an adapter folder."""

import json

import pytest
import torch

from peft_loramoe.interop import convert_checkpoint
from tiny import loramoe


def folder_with(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({name: torch.ones(1) for name in tensors}, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(
    "config, tensors, found",
    [
        (
            {"peft_type": "MIXLORA", "routing_strategy": "mixlora"},
            ["mixlora.layers.0.mlp.moe_gate.weight"],
            "'MIXLORA'",
        ),
        (
            {"peft_type": "LORA", "lora_nums": 4},
            ["m.q_proj.lora_A.weight"],
            "'lora_nums', 'peft_type', the tensors 'm.q_proj",
        ),
        (
            {"peft_type": "LORA"},
            ["m.q_proj.lora_A0.weight"],
            "To turn plain LoRAs into experts, use .*interop.upcycle",
        ),
        ({"peft_type": "LORAMOE", "routing_strategy": "loramoe"}, ["a"], "peft_type='LORAMOE'"),
        ({}, [], "peft_type=None, the options none, the tensors none"),
    ],
)
def test_unrecognised_layout_says_what_was_looked_for_and_found(tmp_path, config, tensors, found):
    looked_for = r"Expected the authors' layout: .*lora_A0.*or MoE-PEFT's layout: .*moe_gate"
    with pytest.raises(ValueError, match=rf"is unknown\. {looked_for}.* Found .*{found}"):
        convert_checkpoint(folder_with(tmp_path / "theirs", config, tensors), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_adapter_of_this_package_needs_no_conversion(tmp_path):
    loramoe().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="already has this package's layout"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "new")


def test_only_this_packages_adapters_convert_to_the_authors_layout(tmp_path):
    source = folder_with(tmp_path / "theirs", {"peft_type": "LORA"}, ["a"])
    with pytest.raises(ValueError, match=r"has peft_type='LORA': convert it to 'loramoe' first"):
        convert_checkpoint(source, tmp_path / "new", to="authors")


def test_unknown_target(tmp_path):
    with pytest.raises(ValueError, match="to='lora' is not one of 'loramoe', 'authors'"):
        convert_checkpoint(tmp_path, tmp_path / "new", to="lora")


def test_existing_output(tmp_path):
    loramoe().save_pretrained(tmp_path / "ours")
    before = (tmp_path / "ours" / "adapter_config.json").read_text()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "ours", to="authors")
    assert (tmp_path / "ours" / "adapter_config.json").read_text() == before


def test_damaged_source_leaves_no_output(tmp_path):
    loramoe().save_pretrained(tmp_path / "ours")
    weights = tmp_path / "ours" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "new", to="authors")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
