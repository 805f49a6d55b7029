"""A UNet of diffusers, adapted through `inject_adapter_in_model` and its own `add_adapter`."""

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from peft_loramoe import LoRAMoEConfig, balance_loss, layer_routing


diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_v", "ff.net.0.proj", "ff.net.2"]


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )


def inputs():
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return image, torch.tensor([1, 2]), text


def test_an_injected_adapter_trains_balances_and_reloads():
    config = LoRAMoEConfig(r=2, target_modules=TARGETS, init_weights=False)
    unet = inject_adapter_in_model(config, tiny_unet()).train()
    output = unet(*inputs(), task_types=[0, 1]).sample
    # image patches and text tokens alike are attributed to the sample that they come from
    assert {len(record.token_counts) for record in layer_routing(unet)} == {2}
    (output.mean() + balance_loss(unet)).backward()
    assert all(p.grad is not None for name, p in unet.named_parameters() if "loramoe" in name)
    other = inject_adapter_in_model(config, tiny_unet())
    set_peft_model_state_dict(other, get_peft_model_state_dict(unet))
    with torch.no_grad():
        assert torch.equal(other.eval()(*inputs()).sample, unet.eval()(*inputs()).sample)


def test_the_models_own_add_adapter():
    unet = tiny_unet()
    unet.add_adapter(LoRAMoEConfig(r=2, target_modules=TARGETS), adapter_name="style")
    assert unet.active_adapters() == ["style"]
