"""Gradients are right whatever the base model did before, and however it checkpoints its activations."""

import functools
import logging
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.gradients import passes_gradient
from peft_loramoe.training import LoRAMoETrainerMixin
from tiny import labelled, loramoe, tiny_llama, token_batch


pytestmark = pytest.mark.usefixtures("input_size")

TYPES = [0, 1, 1]
CONFIG = {"r": 2, "init_weights": False, "task_type": "CAUSAL_LM"}
REENTRANT = {"use_reentrant": True}
LOGGER = "peft_loramoe.gradients"


def gradients(model, **options):
    model.zero_grad()
    model.train()(**labelled(token_batch()), task_types=TYPES, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def attach(model):
    torch.manual_seed(1)  # as in `loramoe`
    return get_peft_model(model, LoRAMoEConfig(**CONFIG))


@pytest.fixture(scope="module")
def expected(input_size):
    return gradients(loramoe())


def assert_same(found, expected):
    assert found.keys() == expected.keys() and any(name.endswith("router") for name in found)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# checkpointing


def prepared(model, **options):
    model.is_loaded_in_4bit = True  # else nothing is checkpointed
    return prepare_model_for_kbit_training(model, **options)


def prepared_before(model):
    return attach(prepared(model))


def prepared_before_with_reentrant(model):
    return attach(prepared(model, gradient_checkpointing_kwargs=REENTRANT))


def enabled_after(model):
    model = attach(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    model.enable_input_require_grads()
    return model


def enabled_between_steps(model):
    model = attach(model)
    gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    model.enable_input_require_grads()
    return model


def injected(model):
    model = prepared(model)
    torch.manual_seed(1)
    return inject_adapter_in_model(LoRAMoEConfig(**CONFIG), model)


def checkpoint_itself(model):
    model = attach(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    model.enable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint  # its default is reentrant
    return model


PREPARATIONS = [
    prepared_before,
    prepared_before_with_reentrant,
    enabled_after,
    enabled_between_steps,
    injected,
    checkpoint_itself,
]


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_reentrant_checkpointing_becomes_non_reentrant_with_one_line_in_the_log(prepare, expected, caplog):
    model = prepare(tiny_llama())
    with caplog.at_level(logging.WARNING, LOGGER):
        found = gradients(model)
        gradients(model)
    assert_same({name.removeprefix("base_model.model."): g for name, g in found.items()},
                {name.removeprefix("base_model.model."): g for name, g in expected.items()})  # fmt: skip
    assert [record.message for record in caplog.records if "reentrant" in record.message] == [
        "Gradient checkpointing was reentrant, which leaves the balance term without a gradient; it is non-reentrant "
        "now, with "
        'the same gradients. Pass gradient_checkpointing_kwargs={"use_reentrant": False} to ask for that yourself.'
    ]


def test_layers_are_still_checkpointed():
    model = prepared_before(tiny_llama())
    gradients(model)
    layer = model.get_base_model().model.layers[0].mlp
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients(model)
    assert len(calls) == 2  # once more in the backward pass


@pytest.mark.parametrize("without", ["balance", "training", "gradient"])
def test_checkpointing_stays_as_it_is_where_no_term_needs_it(without):
    model = loramoe(balance_loss_weight=0 if without == "balance" else 0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    model.enable_input_require_grads()
    with torch.set_grad_enabled(without != "gradient"):
        model.train(without != "training")(**labelled(token_batch()))
    kept = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert kept and all(function.keywords == REENTRANT for function in kept)


def test_other_options_of_checkpointing_are_kept(expected):
    model = loramoe()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={**REENTRANT, "preserve_rng_state": False})
    model.enable_input_require_grads()
    assert_same(gradients(model), expected)
    kept = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert all(f.keywords == {"use_reentrant": False, "preserve_rng_state": False} for f in kept)


def test_offloaded_activations(expected, monkeypatch):
    model = loramoe()
    monkeypatch.setattr(
        "transformers.modeling_utils.save_on_cpu", lambda **_: nullcontext(), raising=False
    )  # it needs a GPU
    if not hasattr(model.get_base_model(), "activation_checkpointing_enable"):
        pytest.skip("transformers before 5.23 does not offload them")
    model.get_base_model().activation_checkpointing_enable(REENTRANT, offload=True)
    assert_same(gradients(model), expected)


def test_checkpointing_of_the_models_own_making_is_refused():
    """A model whose code asks for reentrant checkpoints itself cannot be told otherwise."""
    model = loramoe()
    for layer in model.get_base_model().model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **kwargs: checkpoint(
            functools.partial(forward, **kwargs), x, use_reentrant=True
        )
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing.*use_reentrant\": False"):
        gradients(model)


class BalancedTrainer(LoRAMoETrainerMixin, Trainer):
    pass


@pytest.mark.parametrize("options", [REENTRANT, None])
def test_trainers_that_ask_for_it(options, tmp_path):
    losses = []
    for checkpointing in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=3,
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=options if checkpointing else None,
        )
        batch = labelled(token_batch())
        rows = [{"task_type": t, **{k: v[i] for k, v in batch.items()}} for i, t in enumerate(TYPES)]
        model = loramoe()
        BalancedTrainer(model=model, args=arguments, train_dataset=rows).train()
        losses.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_same(losses[1], losses[0])


def test_trl_checkpoints_by_default():
    assert SFTConfig(report_to=[], use_cpu=True, bf16=False).gradient_checkpointing  # as training/test_trainer.py does


# operators without a gradient

LIBRARY = torch.library.Library("peft_loramoe_tests", "FRAGMENT")
LIBRARY.define("inference_only(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("inference_only", lambda x, w: torch.from_numpy(x.detach().numpy() @ w.detach().numpy().T), "CPU")


class InferenceLinear(nn.Linear):
    """Computed by an operator for which torch knows no gradient: its output says that it requires one."""

    def forward(self, x):
        return torch.ops.peft_loramoe_tests.inference_only(x, self.weight) + self.bias


class DetachedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class TrainedBiasLinear(nn.Linear):
    """Its output requires a gradient, because of the bias only."""

    def forward(self, x):
        return nn.functional.linear(x.detach(), self.weight) + self.bias.requires_grad_()


@pytest.mark.parametrize("layer_class", [InferenceLinear, DetachedLinear, TrainedBiasLinear])
def test_a_base_layer_that_cuts_the_gradient_is_refused_in_training(layer_class):
    model = loramoe(nn.Sequential(nn.Linear(4, 4), layer_class(4, 4)), target_modules=["0", "1"], task_type=None)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=f"base layer of '1', {layer_class.__name__}, passes no gradient on"):
        model.train()(x)
    model.eval()(x)


def test_a_layer_passes_its_gradient_on():
    x = torch.randn(2, 4, requires_grad=True)
    linear = nn.Linear(4, 4)
    assert passes_gradient(x, linear(x)) and passes_gradient(x * 2, linear(x)) is False
    hidden = x * 2
    for output in (linear(hidden), linear(hidden).to(torch.bfloat16), linear(hidden.reshape(2, 2, 2).flatten(1))):
        assert passes_gradient(hidden, output)
    assert not passes_gradient(hidden, linear(hidden.detach()))
