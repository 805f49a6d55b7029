import pytest
import torch
from peft import PeftModel
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training.optimizer import optimizer_groups
from tiny import labelled, loramoe, tiny_llama, token_batch


RATES = dict(lr=1e-2, router_lr=3e-2, loraplus_lr_ratio=16.0)


def rows(count=8):
    batch = labelled(token_batch(rows=count, width=9))
    return [{name: value[i] for name, value in batch.items()} | {"task_types": i % 2} for i in range(count)]


def train(model, tmp_path, callbacks=(), steps=1, **options):
    arguments = TrainingArguments(
        tmp_path, max_steps=steps, per_device_train_batch_size=4, remove_unused_columns=False, report_to="none",
        max_grad_norm=0.0, save_strategy="no", logging_steps=1, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    for name in ("lr_scheduler_type", "warmup_steps"):
        if name in options:
            setattr(arguments, name, options.pop(name))
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks), **options)
    trainer.train()
    return trainer


def everything():
    """A model that trains tensors of every kind: experts, biases, a norm and a matrix."""
    model = loramoe(tiny_llama(mlp_bias=True), modules_to_save=["lm_head", "norm"])
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad = True
    return model


def by_group(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def test_every_trainable_parameter_is_in_the_group_of_its_kind():
    model = everything()
    groups = by_group(model, optimizer_groups(model, 1e-4))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(groups) == ["A", "B", "router", "other", "no_decay"]
    assert sorted(name for names in groups.values() for name in names) == sorted(trainable)
    for kind in ("A", "B", "router"):
        assert groups[kind] == [name for name in trainable if name.endswith(f"loramoe_experts.default.{kind}")]
    assert [name.split(".")[-4:] for name in groups["other"]] == [["lm_head", "modules_to_save", "default", "weight"]]
    assert len(groups["no_decay"]) == 2 * 3 + 5  # the biases of the feed-forward linears, the norms


def test_learning_rates():
    groups = optimizer_groups(everything(), **RATES)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"A": 1e-2, "B": 16e-2, "router": 3e-2, "other": 1e-2, "no_decay": 1e-2}


def test_the_routers_rate_is_that_of_the_configuration_by_default():
    groups = optimizer_groups(loramoe(router_lr_multiplier=3.0), 1e-2)
    assert {group["name"]: group["lr"] for group in groups} == {"A": 1e-2, "B": 1e-2, "router": 3e-2}


def test_adapters_that_differ_in_the_multiplier_have_groups_of_their_own():
    model = loramoe(router_lr_multiplier=2.0)
    model.add_adapter("other", LoRAMoEConfig(r=2, router_lr_multiplier=4.0))
    model.base_model.set_adapter(["default", "other"])
    groups = optimizer_groups(model, 1e-2)
    assert [(group["name"], group["lr"]) for group in groups[2:]] == [("router", 2e-2), ("router", 4e-2)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, adapter in zip(groups[2:], ("default", "other")):
        assert all(names[id(p)].endswith(f"{adapter}.router") for p in group["params"])


def test_weight_decay_spares_what_trainer_spares(tmp_path):
    model = everything()
    arguments = TrainingArguments(tmp_path, weight_decay=0.1, report_to="none", use_cpu=True)
    reference = Trainer(model, arguments).create_optimizer()
    expected = {id(p): group["weight_decay"] for group in reference.param_groups for p in group["params"]}
    groups = optimizer_groups(model, 1e-4, weight_decay=0.1)
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == expected


def test_empty_groups_are_left_out():
    assert [group["name"] for group in optimizer_groups(loramoe(), 1e-4)] == ["A", "B", "router"]


def test_shared_parameters_are_listed_once():
    model = loramoe()
    first, second = [module for module in model.modules() if hasattr(module, "router")][:2]
    second.router = first.router
    routers = next(group for group in optimizer_groups(model, 1e-4) if group["name"] == "router")["params"]
    assert len(routers) == 5 and sum(parameter is first.router for parameter in routers) == 1


def test_only_the_active_adapter_is_trained():
    model = loramoe()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    names = by_group(model, optimizer_groups(model, 1e-4))
    assert all(".other." in name for group in names.values() for name in group)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_a_step_moves_every_tensor_by_its_rate_times_its_gradient(how, tmp_path):
    model = everything()
    groups = optimizer_groups(model, **RATES)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    if how == "optimizers":
        options = {"optimizers": (SGD(groups), None)}
    else:
        options = {"optimizer_cls_and_kwargs": (SGD, {"params": groups, "lr": RATES["lr"]})}
    train(model, tmp_path, [Keep()], **options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert gradients[name].abs().sum() > 0, name
            expected = torch.add(before[name], gradients[name], alpha=-rate[id(parameter)])
            torch.testing.assert_close(parameter.detach(), expected, atol=0, rtol=0)
        else:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_scheduler_scales_every_group(how, tmp_path):
    model, seen = loramoe(), []
    groups = optimizer_groups(model, **RATES)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    if how == "optimizers":
        options = {"optimizers": (AdamW(groups), None)}
    else:
        options = {"optimizer_cls_and_kwargs": (AdamW, {"params": groups, "lr": RATES["lr"]})}
    trainer = train(model, tmp_path, [Keep()], steps=4, lr_scheduler_type="linear", **options)
    for step, rates in enumerate(seen):
        expected = {"A": 1e-2, "B": 16e-2, "router": 3e-2}
        assert rates == pytest.approx({name: rate * (4 - step) / 4 for name, rate in expected.items()})
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == [rates["A"] for rates in seen]


def test_the_names_survive_a_state_dict():
    optimizer = AdamW(optimizer_groups(loramoe(), 1e-4))
    restored = AdamW(optimizer_groups(loramoe(), 1e-3))
    restored.load_state_dict(optimizer.state_dict())
    assert [(group["name"], group["lr"]) for group in restored.param_groups] == [
        ("A", 1e-4),
        ("B", 1e-4),
        ("router", 1e-3),
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(lr=0.0), ValueError, "lr=0.0 must be positive"),
        (dict(lr="1e-4"), TypeError, "lr='1e-4' must be a number"),
        (dict(lr=None), TypeError, "lr=None must be a number"),
        (dict(lr=float("nan")), ValueError, "lr=nan must be positive"),
        (dict(router_lr=-1.0), ValueError, "router_lr=-1.0 must be positive"),
        (dict(loraplus_lr_ratio=0), ValueError, "loraplus_lr_ratio=0 must be positive"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay=-0.1 must be zero or more"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        optimizer_groups(loramoe(), **{"lr": 1e-4, **options})


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers; attach them with get_peft_model"):
        optimizer_groups(tiny_llama(), 1e-4)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    loramoe().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="None of the model's LoRAMoE parameters is trainable.*is_trainable=True"):
        optimizer_groups(model, 1e-4)


@pytest.mark.parametrize(("option", "kind"), [("router_lr", "router"), ("loraplus_lr_ratio", "B")])
def test_a_rate_of_frozen_tensors_is_refused(option, kind):
    model = loramoe()
    for name, parameter in model.named_parameters():
        if name.endswith(f".{kind}"):
            parameter.requires_grad = False
    with pytest.raises(ValueError, match=f"{option}=0.5 would have no effect: no {kind} is trainable"):
        optimizer_groups(model, 1e-4, **{option: 0.5})


def test_a_matrix_that_zero_3_partitioned_is_still_one():
    model = loramoe(modules_to_save=["lm_head"])
    (head,) = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    head.ds_shape = head.shape  # what DeepSpeed leaves of it: the shape in an attribute, a flat part in the tensor
    head.data = head.data.new_empty(0)
    groups = {group["name"]: group["params"] for group in optimizer_groups(model, 1e-4)}
    assert [p is head for p in groups["other"]] == [True]
