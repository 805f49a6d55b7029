"""The mixin on real trainers.

What a trainer adds to the update must be the term's gradient of a loop written by hand.
"""

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from peft_loramoe import LoRAMoEConfig, balance_loss, balance_terms
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback, TaskTypeCollator, optimizer_groups
from tiny import loramoe, tiny_llama, tiny_tokenizer


trl = pytest.importorskip("trl", reason="the extra trl is not installed")
from peft_loramoe.training.sft import LoRAMoESFTTrainer  # noqa: E402


WEIGHT = 0.5
ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]
TYPES = [0, 1, 1, 0]
COLUMNS = {"input_ids": ROWS, "labels": [[-100, *row[1:]] for row in ROWS], "task_type": TYPES}
OPTIONS = dict(
    per_device_train_batch_size=4,
    max_steps=1,
    learning_rate=1.0,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
)


def mixed(trainer_class):
    return type(f"LoRAMoE{trainer_class.__name__}", (LoRAMoETrainerMixin, trainer_class), {})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def build(trainer_class, tmp_path, columns=COLUMNS, model=None, balance_loss_weight=WEIGHT, **options):
    model = loramoe(balance_loss_weight=balance_loss_weight, router_lr_multiplier=1.0) if model is None else model
    given = {key: options.pop(key) for key in ("compute_loss_func", "data_collator") if key in options}
    dataset = columns if isinstance(columns, IterableDataset) else Dataset.from_dict(columns)
    if issubclass(trainer_class, trl.SFTTrainer):
        arguments, given["processing_class"] = trl.SFTConfig, tiny_tokenizer()
    elif issubclass(trainer_class, trl.DPOTrainer):
        arguments, given["processing_class"] = trl.DPOConfig, tiny_tokenizer()
    else:
        arguments, given = TrainingArguments, {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer()), **given}
    args = arguments(output_dir=str(tmp_path), **{**OPTIONS, **options})
    return trainer_class(model=model, args=args, train_dataset=dataset, **given)


def gradients(trainer):
    """What one step of SGD with learning rate 1 subtracts from the parameters."""
    before = parameters(trainer.model)
    trainer.train()
    return {name: before[name] - after for name, after in parameters(trainer.model).items()}


def gradients_of_terms(weighted_calls):
    """Of the sum of weighted terms, each of one call of the model with these arguments."""
    model = loramoe(balance_loss_weight=WEIGHT).train()
    total = 0
    for weight, arguments in weighted_calls:
        model(**arguments)
        total = total + weight * balance_loss(model)
    names, values = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(total, values, allow_unused=True)))


def check(trainer_class, tmp_path, weighted_calls, columns=COLUMNS, **options):
    plain = gradients(build(trainer_class, tmp_path, columns, balance_loss_weight=0.0, **options))
    balanced = gradients(build(mixed(trainer_class), tmp_path, columns, **options))
    expected = gradients_of_terms(weighted_calls)
    assert any(g is not None and g.abs().max() > 1e-3 for g in expected.values())
    for name, plain_gradient in plain.items():
        term = torch.zeros_like(plain_gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(balanced[name], plain_gradient + term, atol=2e-6, rtol=1e-4, msg=name)


def call(rows, types, side="left"):
    """The arguments of the model for padded rows."""
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    ids = [p + row if side == "left" else row + p for p, row in zip(pad, rows)]
    mask = [
        [0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p) for p, row in zip(pad, rows)
    ]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "task_types": torch.tensor(types),
    }


def flat_call(rows, types):
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "use_cache": False,  # transformers keeps packed samples apart only then
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row))]]),
        "task_types": torch.tensor([[t for row, t in zip(rows, types) for _ in row]]),
    }


def mean_log_probability(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, computed outside the model."""
    losses = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


TRANSFORMERS_CASES = {
    "the model's loss": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": mean_log_probability},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "columns kept": {"remove_unused_columns": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("options", TRANSFORMERS_CASES.values(), ids=TRANSFORMERS_CASES)
def test_the_term_reaches_the_gradient_once_in_trainer(options, tmp_path):
    check(Trainer, tmp_path, [(1.0, call(ROWS, TYPES))], **options)


SFT_CASES = {
    "nll": (call(ROWS, TYPES, "right"), {}),
    "dft": (call(ROWS, TYPES, "right"), {"loss_type": "dft"}),
    "label smoothing": (call(ROWS, TYPES, "right"), {"label_smoothing_factor": 0.1}),
    "padding-free": (flat_call(ROWS, TYPES), {"padding_free": True, "max_length": None}),
    "packed": (
        flat_call([ROWS[0], ROWS[2], ROWS[1], ROWS[3]], [TYPES[0], TYPES[2], TYPES[1], TYPES[3]]),
        {"packing": True, "max_length": 14},
    ),
    "packed, split": (
        flat_call([ROWS[0][:4], ROWS[0][4:], *ROWS[1:]], [TYPES[0], *TYPES]),
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 4},
    ),
}


@pytest.mark.parametrize(("arguments", "options"), SFT_CASES.values(), ids=SFT_CASES)
def test_the_term_reaches_the_gradient_once_in_sft(arguments, options, tmp_path):
    check(trl.SFTTrainer, tmp_path, [(1.0, arguments)], **options)


PREFERENCES = {
    "prompt": ["w5 w6", "w7"],
    "chosen": ["w8 w9 w10", "w11 w12"],
    "rejected": ["w13 w14", "w15 w16"],
    "task_type": [0, 1],
}


def test_the_term_reaches_the_gradient_once_in_dpo(tmp_path):
    trainer = build(mixed(trl.DPOTrainer), tmp_path, PREFERENCES)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["task_types"].tolist() == [0, 1] and len(batch["input_ids"]) == 4
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    check(trl.DPOTrainer, tmp_path, [(1.0, {**arguments, "task_types": torch.tensor([0, 1, 0, 1])})], PREFERENCES)


def test_dpo_ignores_the_reference_model(tmp_path):
    # a trained adapter: DPO compares with a frozen copy of it, called in the same step
    trainer = build(mixed(trl.DPOTrainer), tmp_path, PREFERENCES)
    assert "ref" in trainer.model.peft_config
    trainer.train()
    assert list(balance_terms(trainer.model)) == ["default"]


def test_forgotten_types_give_one_warning(tmp_path, recwarn):
    columns = {name: COLUMNS[name] for name in ("input_ids", "labels")}
    build(mixed(Trainer), tmp_path, columns, max_steps=3).train()
    messages = [str(w.message) for w in recwarn if "task_types" in str(w.message)]
    assert len(messages) == 1 and "without task_types" in messages[0] and "LoRAMoETrainerMixin" in messages[0]


def test_a_trainer_without_the_mixin_warns_that_types_and_term_are_lost(tmp_path):
    with pytest.warns(UserWarning, match="without task_types"):
        build(Trainer, tmp_path).train()
    with pytest.warns(UserWarning, match="reached no loss"):
        build(Trainer, tmp_path, max_steps=2, label_smoothing_factor=0.1).train()


def test_names_reach_the_model(tmp_path):
    model = loramoe(task_type_names=["facts", "tasks"])
    trainer = build(mixed(Trainer), tmp_path, {**COLUMNS, "task_type": ["facts", "tasks", "tasks", "facts"]}, model)
    assert sorted(next(iter(trainer.get_train_dataloader()))["task_types"].tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_data_sets_keep_the_column_in_sft(packing, tmp_path):
    stream = IterableDataset.from_generator(lambda: ({k: v[i] for k, v in COLUMNS.items()} for i in range(4)))
    trainer = build(mixed(trl.SFTTrainer), tmp_path, stream, packing=packing, max_length=14)
    expected = [[0] * 5 + [1] * 4 + [1] * 3 + [0] * 2] if packing else TYPES
    assert next(iter(trainer.get_train_dataloader()))["task_types"].tolist() == expected


def test_sft_casts_the_adapters_of_a_4_bit_model_and_the_trainer_of_this_package_does_not(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    for kind, dtype in ((mixed(trl.SFTTrainer), torch.bfloat16), (LoRAMoESFTTrainer, torch.float32)):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
        trainer = build(kind, tmp_path, model=loramoe(base))
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {dtype}


def test_streamed_data_sets_keep_the_column(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({k: v[i] for k, v in COLUMNS.items()} for i in range(4)))
    trainer = build(mixed(Trainer), tmp_path, stream)
    assert next(iter(trainer.get_train_dataloader()))["task_types"].tolist() == TYPES


def test_a_collator_of_types_is_not_wrapped_twice(tmp_path):
    model = loramoe()
    collator = TaskTypeCollator(DataCollatorForSeq2Seq(tiny_tokenizer()), model.peft_config["default"])
    trainer = build(mixed(Trainer), tmp_path, model=model, data_collator=collator)
    assert sorted(next(iter(trainer.get_train_dataloader()))["task_types"].tolist()) == [0, 0, 1, 1]
    assert trainer.data_collator is collator


def test_the_evaluation_loss_is_the_models(tmp_path):
    trainer = build(mixed(Trainer), tmp_path, per_device_eval_batch_size=4)
    loss = trainer.evaluate(Dataset.from_dict(COLUMNS))["eval_loss"]
    batch = next(iter(trainer.get_eval_dataloader(Dataset.from_dict(COLUMNS))))
    assert sorted(batch["task_types"].tolist()) == [0, 0, 1, 1]
    batch.pop("task_types")
    assert loss == pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-5)
    assert trainer.predict(Dataset.from_dict(COLUMNS)).metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_evaluation_loss_of_sft_is_the_models(tmp_path):
    losses = [
        build(c, tmp_path, per_device_eval_batch_size=4).evaluate(Dataset.from_dict(COLUMNS))["eval_loss"]
        for c in (trl.SFTTrainer, mixed(trl.SFTTrainer))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_model_without_loramoe_trains_as_without_the_mixin(tmp_path):
    updates = []
    for trainer_class in (Trainer, mixed(Trainer)):
        updates.append(gradients(build(trainer_class, tmp_path, model=tiny_llama())))
    torch.testing.assert_close(*updates, atol=0, rtol=0)


@pytest.mark.parametrize("active", ["lora", "moe", ["lora", "moe"], ["moe", "lora"]], ids=str)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("lora", marks=pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="refused with PEFT before 0.21")),
        "moe",
    ],
)
def test_adapters_of_another_method_beside_it_do_not_matter(first, active, tmp_path):
    configs = {
        "lora": LoraConfig(target_modules=["up_proj"], init_lora_weights=False),
        "moe": LoRAMoEConfig(target_modules=["down_proj"], init_weights=False),
    }
    model = tiny_llama()
    for name in (first, "moe" if first == "lora" else "lora"):
        model.add_adapter(configs[name], name)
    model.set_adapter(active)
    trainer = build(mixed(Trainer), tmp_path, model=model, logging_steps=1)
    trainer.add_callback(RouterCallback())
    trainer.train()
    logged = trainer.state.log_history[0]
    assert (logged["balance_loss"] > 0) == ("router/balance_loss" in logged) == ("moe" in active)


# gradient accumulation


@pytest.mark.parametrize("trainer_class", [Trainer, trl.SFTTrainer, trl.DPOTrainer], ids=lambda c: c.__name__)
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_equal_micro_batches_give_the_gradient_of_one(trainer_class, micro_batches, tmp_path):
    columns = PREFERENCES if trainer_class is trl.DPOTrainer else COLUMNS
    one = {name: values[:1] for name, values in columns.items()}
    many = {name: values * micro_batches for name, values in one.items()}
    options = {"per_device_train_batch_size": 1}
    whole = gradients(build(mixed(trainer_class), tmp_path, one, **options))
    accumulated = gradients(
        build(mixed(trainer_class), tmp_path, many, gradient_accumulation_steps=micro_batches, **options)
    )
    torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=1e-4)


def test_equal_micro_batches_give_the_gradient_of_one_without_the_mixin(tmp_path):
    collator = TaskTypeCollator(DataCollatorForSeq2Seq(tiny_tokenizer()), loramoe().peft_config["default"])
    options = {"per_device_train_batch_size": 1, "data_collator": collator, "remove_unused_columns": False}
    one = {name: values[:1] for name, values in COLUMNS.items()}
    many = {name: values * 2 for name, values in one.items()}
    whole = gradients(build(Trainer, tmp_path, one, **options))
    accumulated = gradients(build(Trainer, tmp_path, many, gradient_accumulation_steps=2, **options))
    torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=1e-4)


class Mean(Trainer):
    """Of a model that does not take num_items_in_batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


TOKEN_MEANS = {
    "the model's loss": (Trainer, {}),
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}),
    "compute_loss_func": (Trainer, {"compute_loss_func": mean_log_probability}),
    "compute_loss_func alone": (Mean, {"compute_loss_func": mean_log_probability}),
    "checkpointing": (Trainer, TRANSFORMERS_CASES["checkpointing"]),
    "SFT": (trl.SFTTrainer, {}),
    "SFT, dft": (trl.SFTTrainer, {"loss_type": "dft"}),
}


@pytest.mark.parametrize(("trainer_class", "options"), TOKEN_MEANS.values(), ids=TOKEN_MEANS)
def test_terms_of_micro_batches_count_equally(trainer_class, options, tmp_path):
    # every row is a micro-batch, however many labels it has
    calls = [(1 / 4, call([row], [t])) for row, t in zip(ROWS, TYPES)]
    check(trainer_class, tmp_path, calls, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)


def test_micro_batches_count_equally_where_the_trainer_takes_their_mean(tmp_path):
    # without num_items_in_batch, Trainer divides by the number of micro-batches
    calls = [(1 / 4, call([row], [t])) for row, t in zip(ROWS, TYPES)]
    check(Mean, tmp_path, calls, per_device_train_batch_size=1, gradient_accumulation_steps=4)


# the routers' learning rate

# Optimizers of other devices or that need training that is not Trainer's.
ELSEWHERE = ("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision")
ONE_RATE = [name.value for name in OptimizerNames if "lomo" in name.value or name.value.endswith("layerwise")]
OPTIMIZERS = [name.value for name in OptimizerNames if name.value not in (*ELSEWHERE, *ONE_RATE)]


def with_rate(trainer_class, tmp_path, multiplier=10.0, given=None, **options):
    bias = "loramoe_only" if PEFT_AT_LEAST_0_21 else "none"
    model = loramoe(tiny_llama(mlp_bias=True), modules_to_save=["norm"], router_lr_multiplier=multiplier, bias=bias)
    trainer = build(mixed(trainer_class), tmp_path, model=model, **{"learning_rate": 1e-3, **options})
    for name, value in (given or {}).items():
        setattr(trainer, name, value(model))
    return trainer


def options_by_name(trainer):
    """The options of each parameter's group."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    listed = [
        (names[id(p)], {key: value for key, value in group.items() if key not in ("params", "name")})
        for group in groups
        for p in group["params"]
    ]
    assert len(listed) == len(dict(listed))
    return dict(listed)


def made(trainer):
    try:
        return options_by_name(trainer)
    except (ImportError, ValueError) as error:
        if "install" not in str(error):
            raise
        pytest.skip(f"{error}".split(".")[0])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_routers_rate_reaches_every_optimizer(optim, tmp_path):
    extra = {"optim_target_modules": "all-linear"} if optim.startswith(("galore", "apollo")) else {}
    options = dict(optim=optim, weight_decay=0.1, **extra)
    plain, fast = (made(with_rate(Trainer, tmp_path, multiplier, **options)) for multiplier in (1.0, 10.0))
    assert fast.keys() == plain.keys()
    for name, group in fast.items():
        rate = 1e-2 if name.endswith(".router") else 1e-3
        assert float(group.pop("lr")) == pytest.approx(rate)
        assert group == {key: value for key, value in plain[name].items() if key != "lr"}


def of_bitsandbytes(*names):
    """Optimizers that bitsandbytes has for the CPU since 0.50."""
    old = Version(importlib.metadata.version("bitsandbytes")) < Version("0.50")
    return [pytest.param(name, marks=pytest.mark.skipif(old, reason="bitsandbytes < 0.50")) for name in names]


@pytest.mark.parametrize(
    "optim",
    [
        *("sgd", "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "adamw_torch_8bit"),
        *of_bitsandbytes("adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit", "ademamix"),
    ],
)
def test_a_step_moves_the_routers_by_as_much_more(optim, tmp_path):
    plain, fast = (gradients(with_rate(Trainer, tmp_path, multiplier, optim=optim)) for multiplier in (1.0, 10.0))
    for name, moved in plain.items():
        expected = moved * 10 if name.endswith(".router") else moved
        torch.testing.assert_close(fast[name], expected, atol=1e-6, rtol=1e-3 if name.endswith(".router") else 0)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor", "rmsprop", *of_bitsandbytes("paged_adamw_8bit")])
def test_lora_plus_and_weight_decay_reach_every_optimizer(optim, tmp_path):
    model = loramoe(tiny_llama(mlp_bias=True), modules_to_save=["lm_head", "norm"], router_lr_multiplier=3.0)
    args = trl.SFTConfig(str(tmp_path), **{**OPTIONS, "optim": optim, "learning_rate": 1e-3, "weight_decay": 0.1})
    trainer = LoRAMoESFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict(COLUMNS),
        processing_class=tiny_tokenizer(),
        loraplus_lr_ratio=8.0,
    )
    trainer.train()
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    expected = {
        "A": (1e-3, 0.1),
        "B": (8e-3, 0.1),
        "router": (3e-3, 0.1),
        "other": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
    }
    assert groups == {name: pytest.approx(values) for name, values in expected.items()}


def test_multiplier_1_leaves_the_optimizer_as_it_is(tmp_path):
    trainer = with_rate(Trainer, tmp_path, 1.0)
    reference = Trainer(trainer.model, trainer.args)
    kept, expected = trainer.create_optimizer().state_dict(), reference.create_optimizer().state_dict()
    assert kept == expected


def test_the_groups_have_names(tmp_path):
    groups = with_rate(Trainer, tmp_path).create_optimizer().param_groups
    assert [group["name"] for group in groups] == ["experts", "other", "router"]


def test_the_logged_rate_is_that_of_the_experts_and_schedules_scale_both(tmp_path):
    trainer = with_rate(Trainer, tmp_path, max_steps=2, lr_scheduler_type="linear", logging_steps=1)
    trainer.train()
    assert [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log] == [1e-3, 5e-4]
    assert {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups} == {
        "experts": 1e-3,
        "other": 1e-3,
        "router": 1e-2,
    }


def test_training_twice_multiplies_once(tmp_path):
    trainer = with_rate(Trainer, tmp_path, optim="sgd")
    trainer.train()
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-3, pytest.approx(1e-2)]


def test_frozen_experts_train_routers_at_their_rate(tmp_path):
    model = loramoe(freeze_experts=True)
    trainer = build(mixed(Trainer), tmp_path, model=model, learning_rate=1e-3)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]] == [
        pytest.approx(1e-2)
    ]


def test_sft_resumes_with_the_routers_rate(tmp_path):
    options = dict(learning_rate=1e-3, optim="adamw_torch", save_strategy="steps", save_steps=1, max_steps=2)
    whole = build(mixed(trl.SFTTrainer), tmp_path / "run", model=loramoe(), **options)
    whole.train()
    resumed = build(mixed(trl.SFTTrainer), tmp_path / "run", model=loramoe(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [1e-3, 1e-3, pytest.approx(1e-2)]
    torch.testing.assert_close(parameters(resumed.model), parameters(whole.model), atol=0, rtol=0)


def all_in_one(model):
    return [p for p in model.parameters() if p.requires_grad]


IGNORING = {
    "optimizers": {"optimizer": lambda model: torch.optim.SGD(all_in_one(model), lr=1e-3)},
    "optimizer_cls_and_kwargs": {
        "optimizer_cls_and_kwargs": lambda model: (torch.optim.SGD, {"params": all_in_one(model), "lr": 1e-3})
    },
}
RESPECTED = {
    "optimizers": {"optimizer": lambda model: torch.optim.SGD(optimizer_groups(model, 1e-3, router_lr=2e-3))},
    "optimizer_cls_and_kwargs": {
        "optimizer_cls_and_kwargs": lambda model: (
            torch.optim.SGD,
            {"params": optimizer_groups(model, 1e-3, router_lr=2e-3), "lr": 1e-3},
        )
    },
}


@pytest.mark.parametrize("given", IGNORING.values(), ids=IGNORING)
def test_an_optimizer_that_ignores_the_multiplier_gives_one_warning(given, tmp_path):
    trainer = with_rate(Trainer, tmp_path, given=given)
    with pytest.warns(UserWarning, match="router_lr_multiplier has no effect.*optimizer_groups") as caught:
        trainer.train()
        trainer.train()
    assert len([w for w in caught if "router_lr_multiplier" in str(w.message)]) == 1
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("given", RESPECTED.values(), ids=RESPECTED)
def test_groups_of_ones_own_are_respected(given, tmp_path, recwarn):
    trainer = with_rate(Trainer, tmp_path, given=given)
    trainer.train()
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"A": 1e-3, "B": 1e-3, "router": 2e-3, "no_decay": 1e-3}
    assert not [w for w in recwarn if "router_lr_multiplier" in str(w.message)]


def test_a_class_of_ones_own_gets_the_groups(tmp_path):
    given = {"optimizer_cls_and_kwargs": lambda model: (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.5})}
    trainer = with_rate(Trainer, tmp_path, given=given)
    groups = {group["name"]: (group["lr"], group["momentum"]) for group in trainer.create_optimizer().param_groups}
    assert groups == {"experts": (1e-3, 0.5), "other": (1e-3, 0.5), "router": (pytest.approx(1e-2), 0.5)}


@pytest.mark.parametrize("optim", ONE_RATE)
def test_optimizers_with_one_rate_are_refused(optim, tmp_path):
    with pytest.raises(
        ValueError, match=f"optim='{optim}' updates all parameters with one learning rate.*multiplier=1"
    ):
        with_rate(Trainer, tmp_path, optim=optim)
    assert with_rate(Trainer, tmp_path, 1.0, optim=optim) is not None


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_an_optimizer_or_schedule_of_deepspeeds_own_is_refused(section, tmp_path):
    class OnDeepSpeed(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            settings = SimpleNamespace(hf_ds_config=SimpleNamespace(config={section: {"type": "AdamW"}}))
            state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=settings)
            self.is_deepspeed_enabled = True
            self.accelerator = SimpleNamespace(state=state, parallelism_config=None)

    with pytest.raises(ValueError, match=f"DeepSpeed configuration has a section '{section}'.*router_lr_multiplier=1"):
        with_rate(OnDeepSpeed, tmp_path)
    assert with_rate(OnDeepSpeed, tmp_path, 1.0) is not None


def test_an_optimizer_that_sets_its_rate_itself_is_refused(tmp_path):
    given = {"optimizer_cls_and_kwargs": lambda model: (Adafactor, {"lr": None})}
    trainer = with_rate(Trainer, tmp_path, given=given)
    with pytest.raises(ValueError, match="Adafactor was made with lr=None.*router_lr_multiplier=1"):
        trainer.create_optimizer()


# bad input


def test_a_loss_that_passes_the_layers_by_is_refused(tmp_path):
    class PassesBy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return next(p for p in model.parameters() if p.requires_grad).sum()

    with pytest.raises(ValueError, match="LoRAMoEPassesBy.compute_loss called no LoRAMoE layer"):
        build(mixed(PassesBy), tmp_path).train()


def test_wrapped_packing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packing_strategy='wrapped' keeps no boundaries"):
        build(mixed(trl.SFTTrainer), tmp_path, packing=True, packing_strategy="wrapped", max_length=8)


def test_examples_without_a_type_beside_ones_with_it_are_refused(tmp_path):
    rows = [{k: v[i] for k, v in COLUMNS.items()} for i in range(3)] + [{"input_ids": [1], "labels": [1]}]
    trainer = build(mixed(Trainer), tmp_path, IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(ValueError, match="1 of the 4 examples of a batch have no task_type"):
        trainer.train()


@pytest.mark.parametrize(
    ("plugin", "parallelism", "message"),
    [
        (
            {"fsdp_version": 1, "use_orig_params": False},
            None,
            "FSDP 1 with use_orig_params=False .* set fsdp_version: 2",
        ),
        (None, {"cp_enabled": True, "cp_size": 2, "sp_backend": None}, "cp_size=2 splits samples between processes"),
        (None, {"sp_enabled": True, "sp_size": 2, "sp_backend": None}, "sp_size=2 splits samples between processes"),
    ],
)
def test_engines_that_cannot_be_right_are_refused(plugin, parallelism, message, tmp_path):
    class OnThatEngine(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            state = SimpleNamespace(fsdp_plugin=plugin and SimpleNamespace(**plugin))
            config = parallelism and SimpleNamespace(**parallelism)
            self.accelerator = Overlay(self.accelerator, state=state, parallelism_config=config)

    class Overlay:
        def __init__(self, accelerator, **values):
            self.__dict__.update(values)
            self.accelerator = accelerator

        def __getattr__(self, name):
            return getattr(self.accelerator, name)

    with pytest.raises(ValueError, match=message):
        build(mixed(OnThatEngine), tmp_path)


@pytest.mark.parametrize("read", [balance_loss, torch.no_grad()(balance_loss)], ids=["added", "looked at"])
def test_a_compute_loss_that_adds_the_term_too_is_refused(read, tmp_path):
    class Adding(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss + read(model)

    class LoRAMoEAdding(LoRAMoETrainerMixin, Adding):
        pass

    trainer = build(LoRAMoEAdding, tmp_path)
    if read is not balance_loss:
        assert trainer.train().global_step == 1
        return
    with pytest.raises(RuntimeError, match="balance_loss was read in a compute_loss .* it would count twice"):
        trainer.train()
