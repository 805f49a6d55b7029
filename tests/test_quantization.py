"""LoRAMoE on quantised base models, with every quantisation library that is installed. Results.

Docs/quantization.md.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    QuantoConfig,
    TorchAoConfig,
)

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from tiny import VOCAB, labelled, loramoe, tiny_llama, token_batch


def with_config(config: Callable) -> Callable:
    """Quantised by transformers while it loads."""

    def load(base: Path, device: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config(), dtype=torch.bfloat16, device_map=device
        )

    return load


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def with_hqq(base: Path, device: str) -> nn.Module:
    """Quantised by HQQ itself: transformers 5 does not support its HqqConfig."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device=device)
    return model


def with_gptqmodel(method: str, **options: str) -> Callable:
    """Quantised by GPT-QModel, which needs a tokenizer and samples for it, saved, and loaded by transformers."""

    def load(base: Path, device: str) -> nn.Module:
        quantised = base / method
        if not quantised.exists():
            from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
            from tokenizers import Tokenizer, models

            words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
            PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(base)
            config = QuantizeConfig(bits=4, group_size=32, quant_method=method, **options)
            model = GPTQModel.load(str(base), config, device=device)
            ids = torch.randint(1, VOCAB, (16, 32), generator=torch.Generator().manual_seed(0))
            samples = [{"input_ids": row, "attention_mask": [1] * 32} for row in ids.tolist()]
            # GPT-QModel's own choice for AWQ needs CUDA.
            model.quantize(samples, batch_size=4, **({"backend": BACKEND.AWQ_TORCH} if method == "awq" else {}))
            model.save(str(quantised))
        return AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.bfloat16, device_map=device)

    return load


def for_kbit_training(model: nn.Module) -> nn.Module:
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def frozen(model: nn.Module) -> nn.Module:
    """What is left of `prepare_model_for_kbit_training` where it fails: it casts quanto's weights."""
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Backend:
    library: str
    quantise: Callable
    prepare: Callable = for_kbit_training

    def load(self, base: Path, device: str) -> nn.Module:
        return self.prepare(self.quantise(base, device))


NF4 = Backend(
    "bitsandbytes",
    with_config(
        lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    ),
)
BACKENDS = {
    "bitsandbytes-nf4": NF4,
    "bitsandbytes-fp4": Backend(
        "bitsandbytes", with_config(lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    ),
    "bitsandbytes-int8": Backend("bitsandbytes", with_config(lambda: BitsAndBytesConfig(load_in_8bit=True))),
    "torchao-int8": Backend("torchao", with_config(torchao_int8)),
    "torchao-int4": Backend("torchao", with_config(torchao_int4)),
    "hqq-4bit": Backend("hqq", with_hqq),
    "quanto-int8": Backend("optimum.quanto", with_config(lambda: QuantoConfig(weights="int8")), frozen),
    "quanto-int4": Backend("optimum.quanto", with_config(lambda: QuantoConfig(weights="int4")), frozen),
    "gptq-4bit": Backend("gptqmodel", with_gptqmodel("gptq")),
    "awq-4bit": Backend("gptqmodel", with_gptqmodel("awq", format="gemm")),
}
CASES = [
    pytest.param(backend, device, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for name, backend in BACKENDS.items()
    for device in ("cpu", "cuda")
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Folder of a base model whose sizes all backends can quantise."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # GPT-QModel fails with fewer, its default on two cores
    monkeypatch.chdir(tmp_path)  # it writes logs to the working directory
    tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(**on(next(model.parameters()).device, token_batch())).logits


def is_dense(layer):
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def plain_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Copies of the plain tensors that a tensor consists of.

    Quantised weights may be subclasses with several inside.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor.detach().clone()}
    parts, _ = tensor.__tensor_flatten__()
    return {k: v for part in parts for k, v in plain_tensors(f"{name}.{part}", getattr(tensor, part)).items()}


def snapshot(model):
    tensors = {**model.state_dict(), **dict(model.named_parameters()), **dict(model.named_buffers())}
    return {k: v for name, tensor in tensors.items() for k, v in plain_tensors(name, tensor).items()}


def moved(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(("backend", "device"), CASES)
def test_quantised_base_model(backend, device, base, tmp_path):
    pytest.importorskip(backend.library)
    # Not of the model that is trained: some CPUs round the scales of 4-bit weights when these are first evaluated.
    expected = logits(backend.load(base, device))
    assert torch.equal(logits(backend.load(base, device)), expected)  # else the comparisons below say nothing

    model = loramoe(backend.load(base, device))
    logits(model)  # older versions of bitsandbytes complete their state when they are first called
    adapted = [layer.base_layer for layer in model.modules() if isinstance(layer, LoRAMoELinear)]
    assert len(adapted) == 6 and not any(is_dense(layer) for layer in adapted)
    before = snapshot(model)
    adapter = {name for name in before if "loramoe_experts" in name}
    assert len(adapter) == 18

    batch = on(device, labelled(token_batch()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch, task_types=[0, 1, 1]).loss
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == adapter
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:
            assert moved(model, before) == adapter
    assert moved(model, before) == adapter
    assert losses[-1] < 0.95 * losses[0]

    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 18
    trained = logits(model)
    assert not torch.equal(trained, expected)
    reloaded = PeftModel.from_pretrained(backend.load(base, device), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)

    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="LoRAMoE adapters cannot be merged"):
            merge()
    assert not moved(model, before)
    assert torch.equal(logits(model.unload()), expected)


def allow_packing(model: nn.Module) -> list[nn.Module]:
    """What bitsandbytes does on a CPU with AVX512-BF16."""
    linears = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = True
    return linears


def gradients(model):
    model.zero_grad()
    batch = on(next(model.parameters()).device, labelled(token_batch()))
    model.train()(**batch, task_types=[0, 1, 1]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("backend", "device"), CASES)
def test_gradients_are_the_same_before_and_after_an_evaluation(backend, device, base):
    pytest.importorskip(backend.library)
    quantised = backend.load(base, device)
    allow_packing(quantised)
    model = loramoe(quantised)
    expected, output = gradients(model), logits(model)
    for _ in range(2):
        model.eval()
        with torch.inference_mode():
            model.generate(**on(device, token_batch()), max_new_tokens=3)
        with model.disable_adapter():
            logits(model)
        assert torch.equal(logits(model), output)
        found = gradients(model)
        assert len(found) == 18
        for name, gradient in found.items():  # sums on CUDA have an order of their own each time
            assert (gradient - expected[name]).norm() <= (0.02 if device == "cuda" else 0) * expected[name].norm()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("attach", ["get_peft_model", "add_adapter"])
def test_weights_that_an_earlier_evaluation_packed_are_unpacked(double, storage, quant_type, attach, base):
    bnb = pytest.importorskip("bitsandbytes")
    if not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes does not pack")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )

    def weights(model):
        return [bnb.functional.dequantize_4bit(m.weight, m.weight.quant_state).float() for m in model.modules()
                if isinstance(m, bnb.nn.Linear4bit)]  # fmt: skip

    expected = weights(load())
    packed = load()
    linears = allow_packing(packed)
    logits(packed)
    assert len(linears) == 14 and all(linear.weight.quant_state.packing_format_for_cpu for linear in linears)
    if attach == "get_peft_model":
        model = loramoe(packed)
    else:
        model = packed
        torch.manual_seed(1)
        model.add_adapter(LoRAMoEConfig(r=2, init_weights=False))
    assert not any(linear.weight.quant_state.packing_format_for_cpu for linear in linears)
    for found, weight in zip(weights(packed), expected):
        torch.testing.assert_close(found, weight, rtol=0.01, atol=0)  # packing rounds the scales to bfloat16
    before = gradients(model)
    logits(model)
    after = gradients(model)
    assert before and all(torch.equal(after[name], before[name]) for name in before)
    fresh = gradients(loramoe(load()))
    for name, gradient in before.items():
        other = fresh[name if attach == "get_peft_model" else f"base_model.model.{name}"]
        assert torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.98, name


def test_unloading_lets_4_bit_weights_be_packed_again(base):
    pytest.importorskip("bitsandbytes")
    quantised = NF4.load(base, "cpu")
    linears = allow_packing(quantised)
    linears[0].support_avx512bf16_for_cpu = False  # as someone wants it
    model = loramoe(quantised)
    clone = copy.deepcopy(model)
    assert not any(linear.support_avx512bf16_for_cpu for linear in linears)
    model.unload()
    assert [linear.support_avx512bf16_for_cpu for linear in linears] == [False] + [True] * 13
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in clone.modules())
    clone.unload()


def effect(model):
    with model.disable_adapter():
        base_logits = logits(model)
    return logits(model) - base_logits


def test_an_adapter_moves_from_float32_to_4_bit_and_back(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = loramoe(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "float32")
    on_4_bit = PeftModel.from_pretrained(NF4.load(base, "cpu"), tmp_path / "float32", is_trainable=True)
    # The base model is rounded, the adapter is not: it does nearly the same to both.
    assert torch.cosine_similarity(effect(on_4_bit).flatten(), effect(model).flatten(), dim=0) > 0.95
    on_4_bit.save_pretrained(tmp_path / "4-bit")
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "4-bit")
    assert torch.equal(logits(back), logits(model))


class PackedLinear(nn.Module):
    """As the layers of GPTQ, AWQ and HQQ are: no `nn.Linear`, and without `weight`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight / 8)


def eetq_linear(in_features: int, out_features: int) -> nn.Module:
    """A layer without `in_features` and with a weight of integers, stored (in, out). It runs on CUDA only."""
    eetq = pytest.importorskip("transformers.integrations.eetq")
    if not hasattr(eetq, "EetqLinear"):
        pytest.skip("transformers 4 takes the layer from the package eetq")
    return eetq.EetqLinear(in_features, out_features)


@pytest.mark.parametrize("layer_class", [PackedLinear, eetq_linear])
def test_quantised_layers_that_are_no_nn_linear_are_adapted_and_given_back(layer_class):
    base_layer = layer_class(8, 4)
    model = loramoe(nn.Sequential(base_layer), target_modules=["0"], task_type=None)
    assert (model.base_model.model[0].in_features, model.base_model.model[0].out_features) == (8, 4)
    if layer_class is PackedLinear:
        x = torch.randn(2, 8)
        assert not torch.equal(model.eval()(x), base_layer(x))
    before = set(base_layer.__dict__) | set(base_layer._parameters)
    assert model.unload()[0] is base_layer
    assert set(base_layer.__dict__) | set(base_layer._parameters) == before


def test_a_4_bit_layer_is_dequantised_once_each_way_and_no_copy_of_it_is_kept(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = bnb.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4", compress_statistics=False)
    linear.weight = weight.to("cpu")
    model = loramoe(nn.Sequential(linear), target_modules=["0"], task_type=None).train()
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "bitsandbytes":
                calls.append(function.name().removeprefix("bitsandbytes::"))
            return function(*args, **(kwargs or {}))

    kept = []
    with Counting(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = model(x)
    in_forward = list(calls)
    with Counting():
        output.float().sum().backward()
    assert len(in_forward) == 1  # the product, which dequantises inside
    assert calls[1:] == ["dequantize_4bit"]
    assert max(t.numel() for t in kept if t.is_floating_point()) < 64 * 128


@pytest.mark.parametrize(
    ("name", "status"),
    [("bitsandbytes-nf4", "bnb 4bit"), ("bitsandbytes-int8", "bnb 8bit"), ("torchao-int8", "torchao")],
)
def test_pefts_status_names_the_backend(name, status, base):
    pytest.importorskip(BACKENDS[name].library)
    if name.startswith("torchao") and not PEFT_AT_LEAST_0_21:
        pytest.skip("PEFT 0.20 imports names that newer versions of torchao do not have")
    assert loramoe(BACKENDS[name].load(base, "cpu")).get_model_status().quantization_backend == status
    assert loramoe().get_model_status().quantization_backend is None
