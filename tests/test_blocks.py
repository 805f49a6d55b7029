"""Mixtures beside whole blocks: `LoRAMoEBlock` in models of transformers, and what is refused."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, balance_loss, layer_routing
from peft_loramoe.analysis import router_statistics
from peft_loramoe.interop import add_experts, export_lora
from peft_loramoe.layer import LoRAMoEBlock
from peft_loramoe.ops import reference
from tiny import VOCAB, labelled, loramoe, tiny_llama, token_batch


MOE = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
           num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, moe_intermediate_size=12, num_experts=4,
           num_local_experts=4, pad_token_id=0)  # fmt: skip


def moe(model_type="qwen3_moe", **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**MOE, **options}))


def blocks(model):
    return [module for module in model.modules() if isinstance(module, LoRAMoEBlock)]


class Doubled(nn.Module):
    """Returns its input twice, side by side."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.linear(x), x], -1)


class Two(nn.Module):
    """Reads two tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(x) + y


# --- options


def test_patterns_and_layers_choose_the_experts_of_a_block():
    patterns = dict(
        rank_pattern={r"layers\.1\.mlp": 6}, alpha_pattern={r"layers\.1\.mlp": 3}, layers_to_transform=[1, 2]
    )
    model = loramoe(moe(num_hidden_layers=3), r=2, lora_alpha=2, **patterns)
    experts = [block.loramoe_experts["default"] for block in blocks(model)]
    assert [found.r for found in experts] == [6, 2] and [found.scaling for found in experts] == [0.5, 1.0]


def test_experts_are_added_beside_a_block_without_a_change():
    model = loramoe(moe()).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    before = model(input_ids=ids).logits
    add_experts(model)
    assert all(block.loramoe_experts["default"].num_experts == 12 for block in blocks(model))
    torch.testing.assert_close(model(input_ids=ids).logits, before)


# --- arithmetic


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_the_mixture_of_what_the_block_reads_is_added_to_what_it_returns(model):
    model = loramoe(model(), target_modules=["mlp"], num_experts=4, null_groups=[0]).eval()
    assert len(blocks(model)) == 2
    seen = []
    for block in blocks(model):
        block.register_forward_hook(lambda block, args, output: seen.append((block, args[0], output)))
    model(**token_batch())
    for block, x, output in seen:
        experts = block.loramoe_experts["default"]
        expected, _ = reference.mixture(
            x, experts.A, experts.B, experts.router, scaling=experts.scaling, experts=experts.options.experts
        )
        base = block.base_layer(x)
        assert type(output) is type(base)  # with the router's logits beside it in transformers 4
        output, base = (output[0], base[0]) if isinstance(base, tuple) else (output, base)
        torch.testing.assert_close(output, base + expected)


def test_the_backbones_own_loss_is_added_once_and_ours_once():
    model = loramoe(moe(output_router_logits=True, router_aux_loss_coef=0.5), num_experts=4).train()
    batch = labelled(token_batch())
    output = model(**batch, task_types=[0, 1, 1])
    with model.disable_adapter():
        assert model(**batch).aux_loss > 0
    model.peft_config["default"].balance_loss_weight = 0.0
    model.get_base_model().router_aux_loss_coef = 0.0
    alone = model(**batch, task_types=[0, 1, 1]).loss
    torch.testing.assert_close(output.loss, alone + 0.5 * output.aux_loss + 0.1 * unweighted(model, batch))


def unweighted(model, batch):
    model.peft_config["default"].balance_loss_weight = 1.0
    model(**batch, task_types=[0, 1, 1])
    return balance_loss(model)


def test_each_sample_may_have_its_own_adapter():
    model, batch = loramoe(moe(), num_experts=4).eval(), token_batch()
    with torch.no_grad():
        default = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        mixed = model(**batch, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([default[0], base[1], default[2]]))
    assert not torch.allclose(default, base)


def test_unload_gives_the_base_model_back():
    base, batch = moe().eval(), token_batch()
    with torch.no_grad():
        expected = base(**batch).logits
        model = loramoe(base, num_experts=4).unload()
        assert torch.equal(model(**batch).logits, expected)
    assert not blocks(model)


def test_a_block_called_by_keyword():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = CONFIG_MAPPING["llama"](hidden_size=4, num_attention_heads=1)
            self.mlp = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.mlp(input=x)

    model = loramoe(Caller(), target_modules=["mlp"], task_type=None)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), model.base_model.model.mlp(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_experts_have_the_dtype_that_peft_gives_adapters(dtype, autocast):
    model = get_peft_model(moe().to(dtype), LoRAMoEConfig(r=2, num_experts=4), autocast_adapter_dtype=autocast)
    assert blocks(model)[0].loramoe_experts["default"].A.dtype == (torch.float32 if autocast else dtype)


def test_null_experts_alone_leave_the_block_as_it_is():
    model = loramoe(moe(), num_experts=4, null_groups=[0], router_init="zeros").eval()
    batch = token_batch()
    for block in blocks(model):
        experts = block.loramoe_experts["default"]
        nn.init.zeros_(experts.B)
    with torch.no_grad():
        logits = model(**batch).logits
        with model.disable_adapter():
            assert torch.equal(logits, model(**batch).logits)


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_each_token_uses_the_top_k_experts_only(model):
    model = loramoe(model(), target_modules=["mlp"], num_experts=4, top_k=2).eval()
    block = blocks(model)[0]
    experts, x = block.loramoe_experts["default"], torch.randn(2, 3, block.in_features)
    expected, _ = reference.mixture(x, experts.A, experts.B, experts.router, scaling=experts.scaling, top_k=2)
    with model.disable_adapter():
        base = first(block(x))
    torch.testing.assert_close(first(block(x)), base + expected.reshape(base.shape))


def first(returned):
    return returned[0] if isinstance(returned, tuple) else returned


# --- what counts


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_padding_does_not_count(model):
    model = loramoe(model(), target_modules=["mlp"], num_experts=4).eval()
    batch, terms = token_batch(), []
    for extra in (0, 3):
        padded = {name: nn.functional.pad(tensor, (0, extra)) for name, tensor in batch.items()}
        model(**padded, task_types=[0, 1, 1])
        assert [record.token_counts.tolist() for record in layer_routing(model)] == [[7, 6, 5]] * 2
        terms.append(balance_loss(model))
    torch.testing.assert_close(*terms)


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_a_packed_row_equals_padded_rows(model):
    model = loramoe(model(), target_modules=["mlp"], num_experts=4).train()
    batch, results = labelled(token_batch()), []
    real = batch["attention_mask"].bool()
    positions = torch.arange(real.shape[1]).expand_as(real)[real][None]
    labels = batch["labels"].masked_fill(torch.arange(real.shape[1]) == 0, -100)  # no sample predicts the next one
    packed = {"input_ids": batch["input_ids"][real][None], "position_ids": positions, "labels": labels[real][None]}
    types = torch.tensor([0, 1, 1])
    for inputs, task_types in (
        ({**batch, "labels": labels}, types),
        (packed, types[:, None].expand_as(real)[real][None]),
    ):
        model.zero_grad()
        loss = model(**inputs, use_cache=False, task_types=task_types).loss
        loss.backward()
        results.append((loss, balance_loss(model), gradients(model)))
    torch.testing.assert_close(*results)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# --- quantised, checkpointed, compiled, offloaded


@pytest.fixture
def quantised(tmp_path):
    """Loads a model in 4 bits; the same one each time."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def load(model):
        folder = tmp_path / "base"
        if not folder.exists():
            model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        for module in loaded.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True  # weights are packed for inference, as on newer CPUs
        return prepare_model_for_kbit_training(loaded, gradient_checkpointing_kwargs={"use_reentrant": False})

    return load


def wide_llama():
    return tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=2)


def partly_sparse():
    """The first layer's feed-forward part is dense, the second one's sparse."""
    return moe(hidden_size=64, head_dim=32, intermediate_size=128, moe_intermediate_size=64, mlp_only_layers=[0])


@pytest.mark.parametrize(
    ("model", "targets", "counts"),
    [(wide_llama, ["mlp"], (2, 0)), (partly_sparse, None, (1, 3)), (partly_sparse, ["mlp"], (2, 0))],
    ids=["dense", "sparse, defaults", "sparse and dense"],
)
def test_a_4_bit_base_model(model, targets, counts, quantised, tmp_path):
    adapted = loramoe(quantised(model()), target_modules=targets, num_experts=4)
    linears = [module for module in adapted.modules() if isinstance(module, LoRAMoELinear)]
    assert (len(blocks(adapted)), len(linears)) == counts
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * sum(counts) and {p.dtype for p in trained.values()} == {torch.float32}
    batch, types = labelled(token_batch()), [0, 1, 1]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted.train()(**batch, task_types=types).loss
        loss.backward()
        assert all(p.grad.any() for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        logits = adapted.eval()(**batch).logits
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(quantised(model()), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, logits)


def test_gradients_below_a_4_bit_block_are_the_same_after_an_evaluation(quantised):
    model = loramoe(quantised(wide_llama()), target_modules=["mlp"], num_experts=4)
    found = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
        found.append(gradients(model))
        with torch.no_grad():
            model.eval()(**token_batch())
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_gradient_checkpointing(model):
    found = []
    for reentrant in (None, False, True):  # a reentrant one is made non-reentrant
        adapted = loramoe(model(), target_modules=["mlp"], num_experts=4).train()
        if reentrant is not None:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted(**labelled(token_batch()), task_types=[0, 1, 1]).loss.backward()
        found.append(gradients(adapted))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "one_graph"), [(tiny_llama, True), (moe, False)], ids=["dense", "sparse"])
def test_a_compiled_model(model, one_graph):
    found = []
    for compiled in (False, True):
        adapted = loramoe(model(), target_modules=["mlp"], num_experts=4).train()
        call = torch.compile(adapted, backend="aot_eager", fullgraph=one_graph) if compiled else adapted
        loss = call(**labelled(token_batch()), task_types=torch.tensor([0, 1, 1])).loss
        loss.backward()
        found.append((loss, gradients(adapted)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("targets", [["mlp"], ["up_proj"]], ids=["block", "linear"])
def test_an_adapter_on_a_base_model_that_accelerate_offloads(targets):
    options, batch = dict(target_modules=targets, num_experts=4), labelled(token_batch())
    model = loramoe(cpu_offload(tiny_llama(), execution_device="cpu"), **options).train()
    expected = loramoe(tiny_llama(), **options).train()
    devices = {p.device.type: p.requires_grad for p in model.parameters()}
    assert devices == {"cpu": True, "meta": False}
    losses = [adapted(**batch, task_types=[0, 1, 1]).loss for adapted in (expected, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients(model), gradients(expected))


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_an_adapted_model_that_accelerate_offloads(model):
    adapted = loramoe(model(), target_modules=["mlp"], num_experts=4).eval()
    with torch.no_grad():
        expected = adapted(**token_batch()).logits
        cpu_offload(adapted, execution_device="cpu")
        assert {p.device.type for p in adapted.parameters()} == {"meta"}
        assert torch.equal(adapted(**token_batch()).logits, expected)


def test_experts_are_on_the_device_of_the_blocks_buffers():
    class Packed(nn.Linear):
        """A quantised linear layer whose weight is a buffer."""

        def __init__(self):
            super().__init__(4, 4, bias=False)
            del self.weight
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8, device="meta"))

    model = nn.ModuleDict({"mlp": nn.Sequential(Packed())})
    model.config = CONFIG_MAPPING["llama"](hidden_size=4, num_attention_heads=1)
    experts = blocks(loramoe(model, target_modules=["mlp"], task_type=None))[0].loramoe_experts["default"]
    assert (experts.A.device.type, experts.A.dtype) == ("meta", torch.float32)


# --- around the model


@pytest.mark.parametrize("model", [tiny_llama, moe], ids=["dense", "sparse"])
def test_an_adapter_of_transformers_own_methods(model, tmp_path):
    base, batch = model().eval(), token_batch()
    torch.manual_seed(1)
    base.add_adapter(LoRAMoEConfig(r=2, num_experts=4, target_modules=["mlp"], init_weights=False))
    assert len(blocks(base)) == 2
    with torch.no_grad():
        logits = base(**batch).logits
        base.save_pretrained(tmp_path / "adapter")
        loaded = model().eval()
        loaded.load_adapter(tmp_path / "adapter")
        assert torch.equal(loaded(**batch).logits, logits)
        loaded.disable_adapters()
        assert torch.equal(loaded(**batch).logits, model().eval()(**batch).logits)


def test_a_second_adapter_with_the_defaults(tmp_path):
    model, batch = loramoe(moe(mlp_only_layers=[0]), num_experts=4).eval(), token_batch()
    model.add_adapter("second", LoRAMoEConfig(r=2, num_experts=4, init_weights=False, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    with torch.no_grad():
        logits = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(moe(mlp_only_layers=[0]), tmp_path / "second").eval()
        assert torch.equal(loaded(**batch).logits, logits)


def test_statistics_have_one_record_for_a_block():
    model = loramoe(moe(), num_experts=4)
    statistics = router_statistics(model, [{**token_batch(), "task_types": torch.tensor([0, 1, 1])}])
    assert {record["layer"] for record in statistics.layers} == {"model.layers.0.mlp", "model.layers.1.mlp"}


# --- refused


@pytest.mark.parametrize(
    "target",
    [["mlp", "up_proj"], r".*mlp(\.up_proj)?", ["mlp", "mlp.experts"]],
    ids=["names", "expression", "experts"],
)
def test_a_block_and_what_is_inside_it(target):
    model = moe() if "mlp.experts" in target else tiny_llama()
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp' is a block, and '.*' inside it is targeted too"):
        get_peft_model(model, LoRAMoEConfig(target_modules=target))


@pytest.mark.parametrize("first, second", [("mlp", "up_proj"), ("up_proj", "mlp")])
def test_a_second_adapter_inside_or_around(first, second):
    model = loramoe(target_modules=[first])
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="inside (it|of the block).*adapted already"):
        model.add_adapter("second", LoRAMoEConfig(target_modules=[second]))
    assert list(model.state_dict()) == before


def test_a_block_of_unknown_size():
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
    with pytest.raises(ValueError, match="'mlp' is a block, and no configuration says how large its input is"):
        get_peft_model(model, LoRAMoEConfig(target_modules=["mlp"]))


def test_a_block_that_changes_the_shape():
    model = nn.Sequential(Doubled())
    model.config = CONFIG_MAPPING["llama"](hidden_size=4, num_attention_heads=1)
    model = get_peft_model(model, LoRAMoEConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"Block '0' returned shape \(3, 8\) for an input of shape \(3, 4\)"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize(
    "module", [Two(), nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4)], ids=lambda m: type(m).__name__
)
def test_what_is_no_block(module):
    model = nn.Module()
    model.part = module
    with pytest.raises(ValueError, match="'part' is no linear layer that the model calls, nor a block"):
        get_peft_model(model, LoRAMoEConfig(target_modules=["part"]))


def test_a_plain_lora_of_a_block(tmp_path):
    with pytest.raises(ValueError, match=r"mixtures beside whole blocks \(model\.layers\.0\.mlp"):
        export_lora(loramoe(moe(), num_experts=4), tmp_path / "lora", show=False)
