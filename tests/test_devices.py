"""Dtypes, meta tensors and offloading: where the adapter's tensors live."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from peft_loramoe import LoRAMoEConfig, balance_loss
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from tiny import labelled, loramoe, tiny_llama, token_batch


TYPES = [0, 1, 1]


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a base model and an adapter, and the logits that they give."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    model = loramoe(AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "adapter")
    return folder, logits(model)


disk = pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="PEFT 0.20 loads no adapter on a disk-offloaded model")


@pytest.mark.parametrize("where", ["cpu", pytest.param("disk", marks=disk)])
def test_an_offloaded_base_model(saved, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes files of its own below the working directory
    folder, expected = saved
    modules = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(modules, "cpu"), "model.layers.1": where}
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=tmp_path / "weights"
    )
    model = PeftModel.from_pretrained(
        base,
        folder / "adapter",
        device_map={f"base_model.model.{name}": device for name, device in device_map.items()},
        offload_folder=tmp_path / "adapter",
    )
    assert torch.equal(logits(model), expected)


def test_low_cpu_mem_usage_creates_the_adapter_on_meta_and_loads_into_it(saved):
    folder, expected = saved
    model = tiny_llama()
    injected = inject_adapter_in_model(LoRAMoEConfig(r=2), copy.deepcopy(model), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in injected.named_parameters() if "loramoe" in name} == {"meta"}
    loaded = PeftModel.from_pretrained(model, folder / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), expected)


def test_a_base_model_on_meta_gets_its_adapter_there():
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(), LoRAMoEConfig(r=2))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    empty = model.to_empty(device="cpu")
    assert empty(**token_batch()).logits.shape == (3, 7, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_the_whole_model_to_another_dtype_moves_the_adapter(dtype):
    model = loramoe().to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model(**labelled(token_batch()), task_types=TYPES).loss.backward()
    assert balance_loss(model).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", [torch.float32, torch.bfloat16])
def test_autocast(dtype, backbone):
    model = get_peft_model(tiny_llama().to(backbone), LoRAMoEConfig(r=2, init_weights=False))
    with torch.autocast("cpu", dtype=dtype):
        output = model(**labelled(token_batch()), task_types=TYPES)
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_a_bfloat16_adapter_agrees_with_the_float32_one():
    exact, rounded = loramoe(), loramoe().to(torch.bfloat16)
    torch.testing.assert_close(logits(rounded).float(), logits(exact), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("save", ["torch", "state_dict"])
def test_whole_models_can_be_saved(save, tmp_path):
    model = loramoe()
    if save == "torch":
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        torch.save(model.state_dict(), tmp_path / "state.pt")
        loaded = loramoe(tiny_llama(seed=5), seed=6)
        loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_the_cpu(dtype):
    model = loramoe()
    expected = logits(model)
    moved = model.to("cuda", dtype)
    batch = {name: value.cuda() for name, value in token_batch().items()}
    with torch.no_grad():
        result = moved(**batch).logits.float().cpu()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    moved.train()(**labelled(batch), task_types=TYPES).loss.backward()
    assert all(p.grad.isfinite().all() for p in moved.parameters() if p.requires_grad)
