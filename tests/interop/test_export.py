import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear
from peft_loramoe.interop import export_lora
from tiny import loramoe, tiny_llama, token_batch


STOCK = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from peft import PeftModel
from tiny_base import tiny_llama
base, batch = torch.load(sys.argv[2])
model = tiny_llama()
model.load_state_dict(base)
model = PeftModel.from_pretrained(model, sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[2] + ".logits")
assert not [name for name in sys.modules if name.startswith("peft_loramoe")]
assert {type(module).__module__ for module in model.modules() if "lora" in type(module).__module__} == {
    "peft.tuners.lora.layer", "peft.tuners.lora.model"
}
"""
TINY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
"""


def logits(model, batch=None):
    model.eval()
    with torch.no_grad():
        return model(**(batch or token_batch())).logits


def strong(**options):
    """A mixture whose effect on the logits is not small, and whose routers decide."""
    return strong_model(loramoe(**{"lora_alpha": 16, "num_experts": 4, **options}).eval())


def strong_model(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router"):
                parameter.mul_(10)
    return model


def constant_gates(model):
    """The model with routers of zeros: its gates are fixed and equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loramoe_experts." in name and name.endswith("router"):
                parameter.zero_()
    return model


def quiet_export(model, output, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return export_lora(model, output, show=False, **options)


def reload(folder, base=None, **options):
    return PeftModel.from_pretrained(base or tiny_llama(), folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_rslora=True, lora_alpha=5),
        dict(rank_pattern={"up_proj": 3, "layers.0.mlp.down_proj": 1}, alpha_pattern={"up_proj": 7}),
        dict(expert_groups=[1, 3], null_groups=[0]),
        dict(num_experts_pattern={"down_proj": [1, 2]}),
        dict(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"),
        dict(modules_to_save=["lm_head"]),
        dict(trainable_token_indices=[3, 5]),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_export_of_a_uniform_router_is_exact(tmp_path, options):
    model = constant_gates(strong(**options))
    if "modules_to_save" in options or "trainable_token_indices" in options:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens" in name:
                    parameter.add_(0.1)
    quiet_export(model, tmp_path / "lora")
    torch.testing.assert_close(logits(reload(tmp_path / "lora")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # imports PEFT anew
def test_stock_peft_loads_the_export_in_a_process_without_this_package(tmp_path):
    model = constant_gates(strong())
    quiet_export(model, tmp_path / "lora")
    (tmp_path / "tiny_base.py").write_text(TINY)
    (tmp_path / "stock.py").write_text(STOCK)
    torch.save((tiny_llama().state_dict(), token_batch()), tmp_path / "base")
    command = [sys.executable, tmp_path / "stock.py", tmp_path / "lora", tmp_path / "base", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "base.logits"), logits(model), atol=1e-5, rtol=1e-5)


def test_export_is_a_lora_of_scale_one_and_the_largest_rank(tmp_path):
    report = quiet_export(strong(rank_pattern={"up_proj": 3}), tmp_path / "lora")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.r, config.lora_alpha, config.rank_pattern) == (12, 12, config.alpha_pattern)
    assert set(config.rank_pattern.values()) == {8}
    assert (report.rank, report.vllm_max_lora_rank) == (12, 16)


def test_export_names_targets_by_their_last_part_where_that_is_enough(tmp_path):
    quiet_export(strong(), tmp_path / "lora")
    assert LoraConfig.from_pretrained(tmp_path / "lora").target_modules == {"gate_proj", "up_proj", "down_proj"}


class TwoUps(nn.Module):
    """A linear whose whole name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"up": nn.Linear(8, 8)})

    def forward(self, x):
        return self.inner["up"](self.up(x))


def test_export_adapts_the_same_linears_and_no_others(tmp_path):
    config = LoRAMoEConfig(target_modules=r"up", r=2, num_experts=2, init_weights=False)
    quiet_export(get_peft_model(TwoUps(), config), tmp_path / "lora")
    model = reload(tmp_path / "lora", TwoUps())
    assert [name for name, module in model.named_modules() if hasattr(module, "lora_A")] == ["base_model.model.up"]


def test_export_of_conv1d(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))

    model = constant_gates(loramoe(gpt2(), num_experts=2, lora_alpha=16))
    quiet_export(model, tmp_path / "exact")
    torch.testing.assert_close(logits(reload(tmp_path / "exact", gpt2())), logits(model), atol=1e-5, rtol=1e-5)
    quiet_export(model, tmp_path / "svd", rank=1.0)
    torch.testing.assert_close(logits(reload(tmp_path / "svd", gpt2())), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "gates, weights, expected",
    [
        ("uniform", None, [0.2] * 5),
        ("groups", [1, 3], [0.125, 0.125, 0.25, 0.25, 0.25]),
        ("experts", [2, 0, 1, 1, 0], [0.5, 0, 0.25, 0.25, 0]),
    ],
)
def test_given_gates(tmp_path, gates, weights, expected):
    report = quiet_export(strong(num_experts=5, expert_groups=[2, 3]), tmp_path / "lora", gates=gates, weights=weights)
    assert all(layer.gates == pytest.approx(expected) for layer in report.layers)


def test_gates_are_multiplied_into_B_and_null_experts_are_left_out(tmp_path):
    model = strong(expert_groups=[2, 2], null_groups=[0])
    quiet_export(model, tmp_path / "lora", gates="experts", weights=[1, 1, 2, 4])
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").loramoe_experts["default"]
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    torch.testing.assert_close(saved[f"{prefix}A.weight"], experts.A.detach())
    gates = torch.tensor([2 / 8, 2 / 8, 4 / 8, 4 / 8]) * experts.scaling
    torch.testing.assert_close(saved[f"{prefix}B.weight"], experts.B.detach() * gates)


def expected_gates(model, name, batch, rows):
    """Mean gates by hand, over the real tokens of some rows."""
    layer, seen = model.get_submodule(f"base_model.model.{name}"), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, batch)
    handle.remove()
    experts = layer.loramoe_experts["default"]
    real = batch["attention_mask"].bool()
    real[[row for row in range(len(real)) if row not in rows]] = False
    gates = (seen[0][real] @ experts.router.T).softmax(-1)
    if experts.options.top_k:
        kept = gates >= gates.topk(experts.options.top_k).values[:, -1:]
        gates = gates * kept / (gates * kept).sum(-1, keepdim=True)
    return gates.mean(0).tolist()


@pytest.mark.parametrize(
    "task_type, rows, options",
    [
        (None, [0, 1, 2], dict()),
        (1, [1], dict()),
        ("knowledge", [0, 2], dict()),
        (None, [0, 1, 2], dict(top_k=2)),
    ],
)
def test_mean_gates_are_those_of_the_real_tokens(tmp_path, task_type, rows, options):
    model = strong(task_type_names=["knowledge", "tasks"], **options)
    batch = token_batch()
    calibration = [{**batch, "task_types": torch.tensor([0, 1, 0])}]
    report = quiet_export(model, tmp_path / "lora", gates="mean", task_type=task_type, calibration=calibration)
    for layer in report.layers:
        assert layer.gates == pytest.approx(expected_gates(model, layer.layer, batch, rows), abs=1e-6)


def test_measured_errors_are_those_of_the_saved_lora(tmp_path):
    model, batch = strong(), token_batch()
    report = quiet_export(model, tmp_path / "lora", gates="mean", calibration=[batch])
    real = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~real, -100)
    with torch.no_grad():
        mixture = model(**batch, labels=labels)
        with model.disable_adapter():
            without = model(**batch, labels=labels)
        export = reload(tmp_path / "lora").eval()(**batch, labels=labels)

    def kl(other):
        p, q = (o.logits[real].double().log_softmax(-1) for o in (mixture, other))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert report.kl_divergence == pytest.approx(kl(export), rel=1e-3)
    assert report.kl_without == pytest.approx(kl(without), rel=1e-3)
    expected = {"mixture": mixture.loss.item(), "export": export.loss.item(), "without": without.loss.item()}
    assert report.loss == pytest.approx(expected, rel=1e-5)
    assert report.tokens == real.sum()


def test_relative_error_of_a_layer_is_that_of_its_output_on_real_tokens(tmp_path):
    model, batch = strong(), token_batch()
    report = quiet_export(model, tmp_path / "lora", calibration=[batch])
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, batch)
    x = seen[0][batch["attention_mask"].bool()]
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (saved[f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.weight"] for part in "AB")
    with torch.no_grad():
        true = layer(x) - layer.base_layer(x)
    error = (x @ A.T @ B.T - true).norm() / true.norm()
    measured = {one.layer: one.relative_error for one in report.layers}
    assert measured["model.layers.1.mlp.down_proj"] == pytest.approx(error.item(), rel=1e-3)


def test_each_layer_is_measured_alone(tmp_path):
    model, batch = strong(target_modules=["up_proj"]), token_batch()
    report = quiet_export(model, tmp_path / "lora", calibration=[batch])
    for layer in report.layers:
        other = constant_gates_of(strong(target_modules=["up_proj"]), layer.layer)
        real = batch["attention_mask"].bool()
        p, q = (logits(m)[real].double().log_softmax(-1) for m in (model, other))
        assert layer.kl_divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
        with torch.no_grad():
            loss = other(**batch, labels=batch["input_ids"].masked_fill(~real, -100)).loss.item()
        assert layer.loss == pytest.approx(loss, rel=1e-5)


def constant_gates_of(model, layer):
    model.get_submodule(f"base_model.model.{layer}").loramoe_experts["default"].router.data.zero_()
    return model


def test_measuring_each_layer_can_be_left_out(tmp_path):
    report = quiet_export(strong(), tmp_path / "lora", calibration=[token_batch()], each_layer=False)
    assert {(layer.kl_divergence, layer.loss) for layer in report.layers} == {(None, None)}
    assert report.kl_divergence > 0 and all(layer.relative_error > 0 for layer in report.layers)


def tiny_t5():
    torch.manual_seed(0)
    config = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**config))


def test_encoder_decoder_is_measured_on_the_decoders_tokens(tmp_path):
    model = strong_model(loramoe(tiny_t5(), num_experts=2, lora_alpha=32, task_type=None))
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]])
    batch = {**token_batch(), "labels": labels}
    report = quiet_export(model, tmp_path / "lora", gates="mean", calibration=[batch])
    assert report.tokens == 9
    with torch.no_grad():
        assert report.loss["export"] == pytest.approx(
            reload(tmp_path / "lora", tiny_t5()).eval()(**batch).loss.item(), rel=1e-5
        )


def test_classifier_is_measured_on_its_classes(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_llama().config)

    model = loramoe(classifier(), num_experts=2, lora_alpha=32, task_type="SEQ_CLS")
    report = quiet_export(model, tmp_path / "lora", calibration=[token_batch()])
    assert (report.tokens, report.loss) == (3, None)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "lora")
    p, q = (logits(m).double().log_softmax(-1) for m in (model, loaded))
    assert report.kl_divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_classes_that_the_model_masks_do_not_count(tmp_path):
    model = strong()

    def mask(module, args, output):
        return output.index_fill(-1, torch.tensor([0]), float("-inf"))

    model.get_submodule("base_model.model.lm_head").register_forward_hook(mask)
    report = quiet_export(model, tmp_path / "lora", calibration=[token_batch()])
    assert 0 < report.kl_divergence < 1


def test_a_divergence_that_is_no_number_is_poor(tmp_path):
    model = strong()
    model.get_submodule("base_model.model.lm_head").register_forward_hook(
        lambda module, args, output: output * float("nan")
    )
    with pytest.warns(UserWarning, match="poor approximation"):
        assert export_lora(model, tmp_path / "lora", calibration=[token_batch()], show=False).poor


def test_losses_of_several_batches_are_weighted_by_their_labels(tmp_path):
    model, batches = strong(), [token_batch(), token_batch(2, 12, seed=7)]
    separate = [quiet_export(model, tmp_path / str(i), calibration=[batch]) for i, batch in enumerate(batches)]
    together = quiet_export(model, tmp_path / "both", calibration=iter(batches))
    counts = [int(batch["attention_mask"][:, 1:].sum()) for batch in batches]
    expected = sum(n * one.loss["export"] for n, one in zip(counts, separate)) / sum(counts)
    assert together.loss["export"] == pytest.approx(expected, rel=1e-5)


def test_model_is_as_before(tmp_path):
    model = strong(lora_dropout=0.1).train()
    before = logits(model)
    model.train()
    quiet_export(model, tmp_path / "lora", gates="mean", rank=3, calibration=[token_batch()])
    assert model.training
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    layers = [module for module in model.modules() if isinstance(module, LoRAMoELinear)]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_truncation_keeps_the_largest_singular_values(tmp_path):
    model = constant_gates(strong())
    quiet_export(model, tmp_path / "lora", rank=3)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    experts = layer.loramoe_experts["default"]
    U, S, V = torch.linalg.svd(experts.scaling / 4 * (experts.B @ experts.A).detach(), full_matrices=False)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (saved[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(B @ A, (U[:, :3] * S[:3]) @ V[:3], atol=1e-6, rtol=1e-4)


def test_truncation_leaves_smaller_layers_exact(tmp_path):
    report = quiet_export(strong(rank_pattern={"up_proj": 1}), tmp_path / "lora", rank=5)
    assert {layer.layer.rpartition(".")[2]: layer.rank for layer in report.layers} == {
        "gate_proj": 5,
        "up_proj": 4,
        "down_proj": 5,
    }


def test_truncation_by_energy_chooses_the_rank_of_each_layer(tmp_path):
    model = constant_gates(strong())
    report = quiet_export(model, tmp_path / "lora", rank=0.9)
    assert all(1 < layer.rank < 8 for layer in report.layers)
    quiet_export(model, tmp_path / "all", rank=1.0)
    torch.testing.assert_close(logits(reload(tmp_path / "all")), logits(model), atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_truncated_keep_their_factors(tmp_path):
    model = strong()
    report = quiet_export(model, tmp_path / "lora", rank=1.0)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    full = [layer for layer in report.layers if layer.rank == 8]
    assert full
    for layer in full:
        A = model.get_submodule(f"base_model.model.{layer.layer}").loramoe_experts["default"].A.detach()
        torch.testing.assert_close(saved[f"base_model.model.{layer.layer}.lora_A.weight"], A, atol=0, rtol=0)


def test_what_is_saved_beside_the_experts_is_in_the_config(tmp_path):
    quiet_export(strong(modules_to_save=["lm_head"], trainable_token_indices=[3]), tmp_path / "lora")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.modules_to_save, config.trainable_token_indices) == (["lm_head"], [3])


def test_another_adapter_on_other_layers_stays_out(tmp_path):
    model = constant_gates(strong(target_modules=["up_proj"]))
    model.add_adapter("other", LoRAMoEConfig(target_modules=["down_proj"], r=2, num_experts=2, init_weights=False))
    quiet_export(model, tmp_path / "lora", rank=4, adapter_name="default", calibration=[token_batch()])
    assert LoraConfig.from_pretrained(tmp_path / "lora").target_modules == {"up_proj"}


def test_the_dtype_of_the_adapter_is_kept(tmp_path):
    model = strong()
    for layer in adapted(model):
        layer.loramoe_experts.to(torch.bfloat16)
    quiet_export(model, tmp_path / "lora")
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def adapted(model):
    return [module for module in model.modules() if isinstance(module, LoRAMoELinear)]


def test_report_is_printed_and_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = export_lora(strong(), tmp_path / "lora", gates="mean", calibration=[token_batch()])
    printed = capsys.readouterr().out
    for shown in ("down_proj", f"{report.kl_divergence:.4g} nats", f"{report.loss['export']:.4g}"):
        assert shown in printed
    assert json.loads((tmp_path / "lora" / "export_report.json").read_text()) == report.to_dict()
    assert f"{report.kl_divergence:.4g} nats" in (tmp_path / "lora" / "README.md").read_text()


def test_without_calibration_data_the_error_is_said_to_be_unmeasured(tmp_path, capsys):
    with pytest.warns(UserWarning, match="unmeasured.*Pass calibration"):
        report = export_lora(strong(), tmp_path / "lora")
    assert (report.kl_divergence, report.relative_error, report.loss, report.poor) == (None, None, None, None)
    assert "unmeasured" in capsys.readouterr().out
    assert "unmeasured" in (tmp_path / "lora" / "README.md").read_text()


def test_a_poor_approximation_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"poor approximation.*max_kl_share=0.1.*gates='mean'"):
        report = export_lora(strong(), tmp_path / "lora", gates="experts", weights=[1, 0, 0, 0], show=False,
                             calibration=[token_batch()])  # fmt: skip
    assert report.poor


def test_what_was_tried_is_not_advised(tmp_path):
    given = {"gates": "mean", "show": False, "calibration": [{**token_batch(), "task_types": [0, 1, 1]}]}
    with pytest.warns(
        UserWarning, match=r"without the adapter, [^ ]+ nats. Try one export per task_type[^,]*mean'\.$"
    ):
        export_lora(strong(), tmp_path / "lora", max_kl_share=1e-9, **given)
    with pytest.warns(UserWarning, match="Fixed gates cannot follow it; use the mixture itself"):
        export_lora(strong(), tmp_path / "of-type", max_kl_share=1e-9, task_type=1, **given)


def test_a_good_approximation_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(unmeasured|poor approximation)")
        report = export_lora(constant_gates(strong()), tmp_path / "lora", calibration=[token_batch()], show=False)
    assert not report.poor and report.relative_error < 1e-5


def test_divergences_of_the_size_of_rounding_are_not_poor(tmp_path):
    model = strong()
    for layer in adapted(model):
        layer.scale_layer(1e-3)
    report = quiet_export(model, tmp_path / "lora", gates="experts", weights=[1, 0, 0, 0], calibration=[token_batch()])
    assert report.kl_divergence > 0.1 * report.kl_without and not report.poor


def test_a_rank_beyond_what_vllm_takes_is_reported(tmp_path):
    report = quiet_export(strong(r=160), tmp_path / "lora")
    assert (report.rank, report.vllm_max_lora_rank) == (640, None)


CALIBRATION = [token_batch()]


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(gates="median"), "gates='median' is not one of"),
        (dict(gates="groups"), "gates='groups' with weights=None"),
        (dict(gates="uniform", weights=[1, 1]), r"gates='uniform' with weights=\[1, 1\]"),
        (
            dict(gates="groups", weights=[1, 2, 3]),
            r"weights=\[1, 2, 3\] has 3 entries, but layer '.*gate_proj' has 2 groups",
        ),
        (dict(gates="experts", weights=[1, 2]), "has 2 entries, but layer .* has 4 experts"),
        (dict(gates="groups", weights=[-1, 2]), "must be finite, not negative"),
        (dict(gates="groups", weights=[0, 0]), "not all zero"),
        (dict(gates="groups", weights=[float("nan"), 1]), "must be finite"),
        (dict(gates="mean"), "gates='mean' needs calibration data"),
        (dict(gates="mean", calibration=[]), "calibration contains no batch"),
        (dict(task_type=1), "task_type=1 has no effect with gates='uniform'"),
        (dict(gates="mean", task_type=4, calibration=CALIBRATION), "contains 4, but the adapter has 2 expert groups"),
        (dict(gates="mean", task_type=1, calibration=CALIBRATION), "no real token of task type 1"),
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(rank=8), "less than the exact rank, 8"),
        (dict(rank=1.5), "rank=1.5: a float is the share"),
        (dict(adapter_name="absent"), "adapter_name='absent' is not a LoRAMoE adapter of this model; it has default"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        export_lora(strong(), tmp_path / "lora", show=False, **options)
    assert not list(tmp_path.iterdir())


def test_rank_of_another_type(tmp_path):
    with pytest.raises(TypeError, match="rank='3' must be an integer"):
        export_lora(strong(), tmp_path / "lora", rank="3", show=False)


def test_rank_beyond_a_layers_own(tmp_path):
    with pytest.raises(ValueError, match=r"rank=33 exceeds the full rank of layer '.*gate_proj' \(32\)"):
        export_lora(strong(r=20), tmp_path / "lora", rank=33, show=False)


def test_gates_on_null_experts_only(tmp_path):
    model = strong(null_groups=[0])
    with pytest.raises(ValueError, match=r"weights=\[1, 0\] leave no weight"):
        export_lora(model, tmp_path / "lora", gates="groups", weights=[1, 0], show=False)


def test_existing_output_is_refused_and_left_alone(tmp_path):
    (tmp_path / "lora").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        export_lora(strong(), tmp_path / "lora", show=False)
    assert not list((tmp_path / "lora").iterdir())


def test_trained_biases_are_refused(tmp_path):
    model = strong()
    model.peft_config["default"].bias = "all"
    with pytest.raises(ValueError, match="bias='all'.*lose the biases"):
        export_lora(model, tmp_path / "lora", show=False)


def test_model_without_a_head_cannot_be_measured(tmp_path):
    model = loramoe(LlamaModel(tiny_llama().config), task_type=None)
    with pytest.raises(ValueError, match="has no logits to compare"):
        export_lora(model, tmp_path / "lora", calibration=[token_batch()], show=False)
    assert not list(tmp_path.iterdir())


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        export_lora(tiny_llama(), tmp_path / "lora", show=False)


def test_measuring_needs_the_adapter_to_be_active(tmp_path):
    model = strong()
    model.add_adapter("other", LoRAMoEConfig(r=2, init_weights=False))
    with pytest.raises(
        ValueError,
        match=r"'other' must be the only active one to be measured; active: default.*set_adapter\('other'\)",
    ):
        export_lora(model, tmp_path / "lora", adapter_name="other", calibration=[token_batch()], show=False)


def test_the_adapter_must_be_named_where_several_are_active(tmp_path):
    model = strong()
    model.add_adapter("other", LoRAMoEConfig(r=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="has the LoRAMoE adapters default, other; choose one"):
        export_lora(model, tmp_path / "lora", show=False)


@pytest.mark.parametrize("factor, poor", [(0.99, True), (1.01, False)])
def test_the_threshold_is_a_share_of_the_adapters_effect(tmp_path, factor, poor):
    model, options = strong(), dict(gates="mean", calibration=[token_batch()])
    report = quiet_export(model, tmp_path / "lora", **options)
    share = factor * report.kl_divergence / report.kl_without
    assert quiet_export(model, tmp_path / "again", max_kl_share=share, **options).poor == poor
