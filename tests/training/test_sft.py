from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tiny import loramoe, tiny_tokenizer


trl = pytest.importorskip("trl", reason="the extra trl is not installed")
from peft_loramoe.training.sft import LoRAMoESFTTrainer  # noqa: E402


def build(tmp_path, model=None, checkpointing=False, optim="adamw_torch", **options):
    args = trl.SFTConfig(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=checkpointing,
        optim=optim,
        optim_target_modules=["down_proj"] if "galore" in optim else None,
    )
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]], "task_type": [1]})
    model = loramoe() if model is None else model
    return LoRAMoESFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer(), **options)


GIVEN = {
    "optimizers": lambda model: (torch.optim.AdamW(model.parameters()), None),
    "optimizer_cls_and_kwargs": lambda model: (torch.optim.SGD, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_ratio_beside_an_optimizer_is_refused(name, tmp_path):
    model = loramoe()
    given = {name: GIVEN[name](model)}
    with pytest.raises(ValueError, match=rf"loraplus_lr_ratio=8 has no effect with {name}: pass optimizer_groups\("):
        build(tmp_path, model, loraplus_lr_ratio=8, **given)


@pytest.mark.parametrize("name", GIVEN)
def test_an_optimizer_without_a_ratio_is_taken(name, tmp_path):
    model = loramoe()
    assert build(tmp_path, model, **{name: GIVEN[name](model)}) is not None


@pytest.mark.parametrize(
    ("ratio", "error"), [("x", TypeError), (True, TypeError), (0, ValueError), (-2.0, ValueError)]
)
def test_a_bad_ratio_is_refused_by_the_constructor(ratio, error, tmp_path):
    with pytest.raises(error, match=f"loraplus_lr_ratio={ratio!r} must be"):
        build(tmp_path, loraplus_lr_ratio=ratio)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_a_ratio_with_an_optimizer_of_one_rate_is_refused(optim, tmp_path):
    model = loramoe(router_lr_multiplier=1.0)
    with pytest.raises(ValueError, match=f"optim='{optim}' updates all parameters.*leave loraplus_lr_ratio out"):
        build(tmp_path, model, loraplus_lr_ratio=8, optim=optim)
    assert build(tmp_path, model, optim=optim) is not None


@pytest.fixture
def zero_3(monkeypatch):
    """SFTTrainer as under DeepSpeed ZeRO-3, which is not started here."""
    initialise = trl.SFTTrainer.__init__

    def initialise_on_zero_3(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.args.deepspeed_plugin = SimpleNamespace(zero_stage=3)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", initialise_on_zero_3)


def test_checkpointing_that_zero_3_would_make_reentrant_is_refused(zero_3, tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing=True: with DeepSpeed ZeRO-3.*use ZeRO-2 or FSDP"):
        build(tmp_path, checkpointing=True)


@pytest.mark.parametrize(("weight", "checkpointing"), [(0.0, True), (0.1, False)])
def test_zero_3_is_taken_without_balance_term_or_without_checkpointing(weight, checkpointing, zero_3, tmp_path):
    assert build(tmp_path, loramoe(balance_loss_weight=weight), checkpointing) is not None
