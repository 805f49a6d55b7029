"""Adapters of the authors' repository, built here from its formulas, against what they become."""

import json

import pytest
import torch
from damaged_adapters import convert_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import convert_checkpoint, read_adapter
from tiny import loramoe, tiny_llama, token_batch


N, R, ALPHA = 4, 2, 7.0
MODULES = [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
CONFIG = {
    "base_model_name_or_path": "/models/llama-2-7b",
    "bias": "none",
    "blc_alpha": 0.2,
    "blc_weight": 0.05,
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "lora_nums": N,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": R,
    "target_modules": ["down_proj", "gate_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
}
FIRST = "base_model.model.model.layers.0.mlp.gate_proj"


def authors_tensors(num_experts=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    base, tensors = tiny_llama(), {}
    for module in MODULES:
        linear = base.get_submodule(module)
        shapes = {f"lora_A{e}": (R, linear.in_features) for e in range(num_experts)}
        shapes |= {f"lora_B{e}": (linear.out_features, R) for e in range(num_experts)}
        shapes["lora_route"] = (num_experts, linear.in_features)
        for name, shape in shapes.items():
            tensors[f"base_model.model.{module}.{name}.weight"] = (0.3 * torch.randn(shape, generator=generator)).to(
                dtype
            )
    return tensors


def authors_adapter(folder, tensors=None, **options):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **options}))
    torch.save(authors_tensors() if tensors is None else tensors, folder / "adapter_model.bin")
    return folder


class AuthorsLinear(nn.Module):
    """The authors' formula for one linear, with their tensors.

    Softmax over experts in float32, one expert after the other.
    """

    def __init__(self, base, tensors, prefix):
        super().__init__()
        self.base, self.tensors, self.prefix = base, tensors, prefix

    def forward(self, x):
        route = torch.softmax(x @ self.tensors[f"{self.prefix}.lora_route.weight"].T, dim=-1, dtype=torch.float32)
        result = self.base(x)
        for e in range(N):
            A, B = self.tensors[f"{self.prefix}.lora_A{e}.weight"], self.tensors[f"{self.prefix}.lora_B{e}.weight"]
            result = result + route[:, :, e : e + 1] * (x @ A.T @ B.T) * (ALPHA / R)
        return result


def test_logits_are_those_of_the_authors_formula(tmp_path):
    convert_checkpoint(authors_adapter(tmp_path / "theirs"), tmp_path / "ours")
    tensors, theirs = authors_tensors(), tiny_llama().eval()
    for module in MODULES:
        theirs.set_submodule(
            module, AuthorsLinear(theirs.get_submodule(module), tensors, f"base_model.model.{module}")
        )
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        expected, unadapted = theirs(**token_batch()).logits, tiny_llama().eval()(**token_batch()).logits
        assert (expected - unadapted).norm() / unadapted.norm() > 0.1
        torch.testing.assert_close(ours(**token_batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_options_that_reproduce_the_authors_training(tmp_path):
    convert_checkpoint(authors_adapter(tmp_path / "theirs"), tmp_path / "ours")
    config = LoRAMoEConfig.from_pretrained(tmp_path / "ours")
    assert (config.r, config.lora_alpha, config.num_experts, list(config.groups_of().sizes)) == (
        R,
        ALPHA,
        N,
        [N // 2, N // 2],
    )
    assert (config.balance_delta, config.balance_loss_weight, config.lora_dropout) == (0.2, 0.05, 0.05)
    assert (config.balance_formula, config.balance_target, config.balance_importance) == ("cv_squared", "paper", "sum")
    assert config.target_modules == {"down_proj", "gate_proj", "up_proj"}
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "/models/llama-2-7b")
    assert "lora_nums" not in (tmp_path / "ours" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_nums": 3, "blc_weight": 0.0, "task_type": None},
        {"target_modules": r".*\.mlp\.(gate|up|down)_proj", "fan_in_fan_out": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_bit_by_bit(tmp_path, options, dtype):
    tensors = authors_tensors(options.get("lora_nums", N), dtype)
    source = authors_adapter(tmp_path / "theirs", tensors, **options)
    convert_checkpoint(source, tmp_path / "ours")
    back = convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="authors")
    assert json.loads((back / "adapter_config.json").read_text()) == {**CONFIG, **options}
    found = torch.load(back / "adapter_model.bin", weights_only=True)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == dtype and found[key].is_contiguous() and torch.equal(found[key], tensor)


def test_own_adapters_convert_to_the_authors_layout_and_back(tmp_path):
    model = loramoe(num_experts=4, layers_to_transform=[1], balance_loss_weight=0.0).eval()
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors")
    config, tensors = read_adapter(tmp_path / "theirs")
    assert config["target_modules"] == sorted(MODULES[3:]) and len(tensors) == 3 * (4 + 4 + 1)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**token_batch()).logits, model(**token_batch()).logits)


def test_targets_that_match_in_the_middle_of_a_word(tmp_path):
    convert_checkpoint(
        authors_adapter(tmp_path / "theirs", target_modules=["e_proj", "p_proj", "n_proj"]), tmp_path / "ours"
    )
    assert LoRAMoEConfig.from_pretrained(tmp_path / "ours").target_modules == set(MODULES)


def test_a_balance_term_that_the_authors_code_does_not_have(tmp_path):
    loramoe(num_experts=4, expert_groups=[1, 3]).save_pretrained(tmp_path / "ours")
    unknown = (
        "balance_target='corrected', balance_importance='mean', balance_detach=True, router_lr_multiplier=10.0, expert"
    )
    with pytest.warns(UserWarning, match=f"does not support {unknown}.*another balance term or router learning rate"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors")


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"null_groups": [0]},
        {"router_temperature": 2.0},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 3}},
        {"num_experts_pattern": {"up_proj": 4}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_options_without_counterpart_in_the_authors_code(tmp_path, options):
    loramoe(**options).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.* has no counterpart in the authors' code"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_tensors_without_counterpart_in_the_authors_code(tmp_path):
    loramoe().save_pretrained(tmp_path / "ours")
    _, tensors = read_adapter(tmp_path / "ours")
    (tmp_path / "ours" / "adapter_model.safetensors").unlink()
    torch.save({**tensors, "base_model.model.lm_head.weight": torch.ones(1)}, tmp_path / "ours" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no counterpart for the tensors 'base_model\.model\.lm_head\.weight'"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors")


def test_ranks_that_are_not_those_of_the_configuration(tmp_path):
    loramoe(r=2, balance_loss_weight=0.0).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": 4'))
    with pytest.raises(
        ValueError, match=r"has A and B of rank \(12, 12\), not num_experts \* r = 24; the file is damaged"
    ):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors")


def without(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


def with_(key, *shape):
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without(f"{FIRST}.lora_A2.weight"),
            r"lacks A of expert 2, with 4 experts: the experts have different target modules",
        ),
        (without(f"{FIRST}.lora_B0.weight", f"{FIRST}.lora_B3.weight"), r"lacks B of expert 0, 3, with 4 experts"),
        (without(f"{FIRST}.lora_route.weight"), r"has experts but no router"),
        (with_(f"{FIRST}.lora_A4.weight", 2, 32), r"has A of expert 4, but there are 4 experts"),
        (
            with_(f"{FIRST}.lora_A1.weight", 8, 32),
            r"cannot be stacked: r=2, but the ranks of A are expert 0: 2, expert 1: 8, ",
        ),
        (
            with_(f"{FIRST}.lora_B1.weight", 48, 8),
            r"cannot be stacked: r=2, but the ranks of B are expert 0: 2, expert 1: 8, ",
        ),
        (with_(f"{FIRST}.lora_A1.weight", 2, 33), r"cannot be stacked: the widths of A are \[32, 33\]"),
        (
            with_(f"{FIRST}.lora_A1.weight", 0),
            r"A of expert 1 .* has shape \(0,\), not that of a matrix. \(ZeRO-3",
        ),
        (with_(f"{FIRST}.lora_route.weight", 5, 32), r"router of .* has shape \(5, 32\), not \(4, 32\)"),
        (
            with_("base_model.model.lm_head.weight", 4, 4),
            r"Only tensors of experts and routers can be converted, not: 'base_model.model.lm_head.weight'",
        ),
    ],
)
def test_tensors_that_cannot_be_converted(tmp_path, change, message):
    tensors = authors_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(authors_adapter(tmp_path / "theirs", tensors), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": None}, "lacks r; it is incomplete"),
        ({"lora_nums": 1}, r"num_experts=1 must be at least 2.*\(lora_nums is num_experts here"),
        ({"blc_alpha": 1.0}, r"balance_delta=1\.0 must be in \[0, 1\).*blc_alpha balance_delta"),
        ({"bias": "all"}, "bias='all' has no counterpart here"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] has no counterpart here"),
        ({"enable_lora": [True]}, r"enable_lora=\[True\] has no counterpart here"),
        ({"r": 4}, "r=4, but the ranks of A are expert 0: 2"),
    ],
)
def test_options_that_cannot_be_converted(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(authors_adapter(tmp_path / "theirs", **options), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_two_spellings_of_one_expert_are_refused(tmp_path):
    tensors = authors_tensors()
    tensors[f"{FIRST}.lora_A00.weight"] = tensors[f"{FIRST}.lora_A0.weight"] + 1
    source = authors_adapter(tmp_path / "source", tensors)
    with pytest.raises(
        ValueError, match="Only tensors of experts and routers can be converted, not: '.*lora_A00.weight'"
    ):
        convert_checkpoint(source, tmp_path / "output")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_adapters_are_converted_or_refused_in_our_words(data, tmp_path_factory):
    convert_damaged(CONFIG, authors_tensors(), data, tmp_path_factory.mktemp("theirs"))
