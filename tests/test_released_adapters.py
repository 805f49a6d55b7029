"""The checkpoint is a contract: what a released version saved, every later one loads."""

from pathlib import Path

import pytest
import torch
from fixtures.make_adapter import INPUT_IDS, base_model
from peft import PeftModel
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("adapter-*")), ids=lambda path: path.name)
def test_adapters_of_released_versions_load(folder):
    model = PeftModel.from_pretrained(base_model(), folder)
    with torch.no_grad():
        logits = model(input_ids=INPUT_IDS).logits
    torch.testing.assert_close(logits, load_file(folder / "expected.safetensors")["logits"])
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(input_ids=INPUT_IDS).logits, logits)


def test_there_is_a_fixture():
    assert (FIXTURES / "adapter-0.1.0" / "adapter_model.safetensors").is_file()
