"""Random damage to adapters of other projects, for the tests of their conversion."""

import json

import torch
from hypothesis import strategies as st

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import convert_checkpoint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FAULTS = {
    "shape": lambda tensor: tensor[:, 1:],
    "scalar": lambda tensor: tensor.sum(),
    "empty": lambda tensor: tensor[:0],
    "half": lambda tensor: tensor.half(),
}


def convert_damaged(config, tensors, data, source, convert=convert_checkpoint):
    """Damage an adapter and convert it: it is converted whole, or refused with a ValueError that leaves no output.

    Args:
        config: content of `adapter_config.json`.
        tensors: content of `adapter_model.bin`.
        data: of hypothesis.
        source: an empty folder.
        convert: called with the folder of the adapter and that of the output.
    """
    config, tensors = dict(config), dict(tensors)
    for option in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2), label="options"):
        config[option] = data.draw(JSON, label=option)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True), label="tensors"):
        fault = data.draw(st.sampled_from(["missing", "renamed", *FAULTS]), label=name)
        tensor = tensors.pop(name)
        if fault == "renamed":
            tensors[data.draw(st.text(max_size=20)) + name[data.draw(st.integers(0, len(name))) :]] = tensor
        elif fault != "missing":
            tensors[name] = FAULTS[fault](tensor)
    (source / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, source / "adapter_model.bin")
    try:
        convert(source, source / "ours")
    except ValueError:
        assert not (source / "ours").exists()
    else:
        assert LoRAMoEConfig.from_pretrained(source / "ours").num_experts >= 2
