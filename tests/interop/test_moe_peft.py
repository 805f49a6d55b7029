"""Adapters of MoE-PEFT, built here from its formulas, against what they become."""

import json

import pytest
import torch
from damaged_adapters import convert_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import convert_checkpoint
from tiny import tiny_llama, token_batch


N, R, ALPHA = 3, 2, 6
MIXTURES, PLAIN = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")
CONFIG = {
    "bias": "none",
    "peft_type": "LORAMOE",
    "r": R,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "target_modules": [*PLAIN, *MIXTURES],
    "routing_strategy": "loramoe",
    "num_experts": N,
    "base_model_name_or_path": "base",
    "task_type": "CAUSAL_LM",
}
FIRST = "loramoe.layers.0.mlp.gate_proj"


def linears(plain=PLAIN):
    base = tiny_llama()
    for layer in range(2):
        for part, names in (("mlp", MIXTURES), ("self_attn", plain)):
            for name in names:
                module = f"layers.{layer}.{part}.{name}"
                yield module, base.get_submodule(f"model.{module}"), N if part == "mlp" else None


def moe_peft_tensors(plain=PLAIN):
    generator, tensors = torch.Generator().manual_seed(4), {}
    for module, linear, experts in linears(plain):
        stems = [f"experts.{e}.lora" for e in range(experts)] if experts else ["lora"]
        for stem in stems:
            tensors[f"loramoe.{module}.{stem}_A.weight"] = 0.3 * torch.randn(
                R, linear.in_features, generator=generator
            )
            tensors[f"loramoe.{module}.{stem}_B.weight"] = 0.3 * torch.randn(
                linear.out_features, R, generator=generator
            )
        if experts:
            tensors[f"loramoe.{module}.moe_gate.weight"] = 0.3 * torch.randn(
                experts, linear.in_features, generator=generator
            )
    return tensors


def moe_peft_adapter(folder, tensors=None, **options):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **options}))
    torch.save(moe_peft_tensors() if tensors is None else tensors, folder / "adapter_model.bin")
    return folder


class MoEPEFTLinear(nn.Module):
    """MoE-PEFT's formula for one linear: a mixture if it has experts, else a plain LoRA."""

    def __init__(self, base, tensors, experts, scaling):
        super().__init__()
        self.base, self.tensors, self.experts, self.scaling = base, tensors, experts, scaling

    def forward(self, x):
        def lora(stem):
            return x @ self.tensors[f"{stem}_A.weight"].T @ self.tensors[f"{stem}_B.weight"].T * self.scaling

        if self.experts is None:
            return self.base(x) + lora("lora")
        weights = torch.softmax(x.float() @ self.tensors["moe_gate.weight"].T, dim=-1, dtype=torch.float32)
        result = self.base(x)
        for e in range(self.experts):
            result = result + weights[:, :, e, None] * lora(f"experts.{e}.lora")
        return result


@pytest.mark.parametrize("plain", [PLAIN, ()])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_moe_pefts_formula(tmp_path, plain, rslora):
    tensors = moe_peft_tensors(plain)
    options = {"use_rslora": True} if rslora else {}
    source = moe_peft_adapter(tmp_path / "theirs", tensors, target_modules=[*plain, *MIXTURES], **options)
    convert_checkpoint(source, tmp_path / "ours")
    theirs = tiny_llama().eval()
    for module, linear, experts in linears(plain):
        prefix = f"loramoe.{module}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        replacement = MoEPEFTLinear(linear, own, experts, ALPHA / R**0.5 if rslora else ALPHA / R)
        theirs.set_submodule(f"model.{module}", replacement)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        expected, unadapted = theirs(**token_batch()).logits, tiny_llama().eval()(**token_batch()).logits
        assert (expected - unadapted).norm() / unadapted.norm() > 0.1
        torch.testing.assert_close(ours(**token_batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_converted_options(tmp_path):
    convert_checkpoint(moe_peft_adapter(tmp_path / "theirs"), tmp_path / "ours")
    config = LoRAMoEConfig.from_pretrained(tmp_path / "ours")
    assert (config.r, config.lora_alpha, config.lora_dropout, list(config.groups_of().sizes)) == (R, ALPHA, 0.05, [N])
    assert config.num_experts_pattern == {"q_proj": [2], "v_proj": [2]}
    assert (config.balance_loss_weight, config.task_type, config.base_model_name_or_path) == (0.0, "CAUSAL_LM", "base")


def test_pefts_own_reader_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"written by MoE-PEFT \(it has routing_strategy='loramoe'\).*interop\.convert_checkpoint"
    ):
        PeftModel.from_pretrained(tiny_llama(), moe_peft_adapter(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({f"{FIRST}.experts.1.lora_A.weight": None}, {}, r"'model\.layers\.0\.mlp\.gate_proj' lacks A of expert 1"),
        ({f"{FIRST}.moe_gate.weight": None}, {}, "has experts but no router"),
        (
            {f"{FIRST}.experts.1.lora_B.weight": torch.ones(48, 5)},
            {},
            r"r=2, but the ranks of B are expert 0: 2, expert 1: 5",
        ),
        (
            {"loramoe.layers.0.self_attn.q_proj.lora_A.weight": None},
            {},
            r"'model\.layers\.0\.self_attn\.q_proj' lacks A of expert",
        ),
        (
            {"loramoe.layers.0.self_attn.q_proj.lora_A.weight": torch.tensor(1.0)},
            {},
            r"A of expert 0 of 'model\.layers\.0\.self_attn\.q_proj' has shape \(\), not that of a matrix",
        ),
        (
            {f"{FIRST}.lora_A.weight": torch.ones(2, 32)},
            {},
            "'gate_proj' have experts in some layers and a plain LoRA in others",
        ),
        (
            {"classifier": torch.ones(2, 32)},
            {},
            "Only tensors of experts and gates can be converted, not: 'classifier'",
        ),
        (
            {},
            {"use_dora": True},
            "use_dora=True has no counterpart here; MoE-PEFT applies it to .* 'q_proj', 'v_proj'",
        ),
        ({}, {"r": None}, "lacks r; it is incomplete"),
        ({}, {"num_experts": 1}, "num_experts=1 must be at least 2"),
        (
            {"loramoe.layers.0.mlp.dense_4h_to_h.lora_A.weight": torch.ones(2, 3)},
            {},
            r"ChatGLM's modules have other names",
        ),
    ],
)
def test_what_cannot_be_converted(tmp_path, change, options, message):
    tensors = {key: tensor for key, tensor in {**moe_peft_tensors(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(moe_peft_adapter(tmp_path / "theirs", tensors, **options), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_adapters_are_converted_or_refused_in_our_words(data, tmp_path_factory):
    convert_damaged(CONFIG, moe_peft_tensors(), data, tmp_path_factory.mktemp("theirs"))
