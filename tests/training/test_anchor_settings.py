"""Anchors in every setting of docs/training.md: other batches, trainers, precisions and models.

For each setting the update of a trainer is compared with the tasks' gradient, which plain training gives, and with
the gradient of term and anchors, which a loop written by hand gives. Both are in float64 where the setting allows it.
"""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_loramoe import balance_loss, collect_balance, layer_routing
from peft_loramoe.training import LoRAMoETrainerMixin
from tiny import loramoe, tiny_llama, tiny_tokenizer


trl = pytest.importorskip("trl", reason="the extra trl is not installed")

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]
COLUMNS = {"input_ids": ROWS, "labels": [[-100, *row[1:]] for row in ROWS]}
PREFERENCES = {
    "prompt": ["w5 w6", "w7"],
    "chosen": ["w8 w9 w10", "w11 w12"],
    "rejected": ["w13 w14", "w15 w16"],
}
ANCHORS = ["w20 w21 w22 w23", "w24 w25 w26"]  # the tasks have no token above 18
WEIGHT, ANCHOR_WEIGHT = 0.5, 0.4
BY_LENGTH = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(TrainingArguments, "train_sampling_strategy")
    else {"group_by_length": True}
)
OPTIONS = dict(
    per_device_train_batch_size=4,
    max_steps=1,
    learning_rate=1.0,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_llama().save_pretrained(folder)
    return folder


def in_float64(backbone, **options):
    return loramoe(router_lr_multiplier=1.0, **options).double()


def in_float32(backbone, **options):
    return loramoe(router_lr_multiplier=1.0, **options)


def in_4_bit(backbone, **options):
    """As QLoRA's tutorials make it; gradient checkpointing included."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, quantization_config=quantization)
    return loramoe(prepare_model_for_kbit_training(model), router_lr_multiplier=1.0, **options)


def without_routers(backbone, lora_dropout=0.0, **options):
    torch.manual_seed(1)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["down_proj"], lora_dropout=lora_dropout)
    return get_peft_model(tiny_llama(), lora).double()


@dataclass
class Setting:
    """A way to train.

    Args:
        arguments: of the trainer's configuration.
        trainer: its class.
        columns: of the data set.
        streamed: the data set is an iterable one, whose columns are not known.
        task_types: those of the samples, as the model is given them, where the data set has a column `task_type`.
        model: makes the model.
        dropout: of the adapter, where random numbers matter.
        tolerance: relative to the largest entry of a gradient.
    """

    arguments: dict = field(default_factory=dict)
    trainer: type = Trainer
    columns: dict = field(default_factory=lambda: COLUMNS)
    streamed: bool = False
    task_types: list | None = None
    model: object = in_float64
    dropout: float = 0.3
    tolerance: float = 1e-11


TYPED = {"columns": {**COLUMNS, "task_type": [0, 1, 1, 0]}, "task_types": [[0] * 5 + [1] * 4 + [1] * 3 + [0] * 2]}
NO_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
BY_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
SFT = functools.partial(Setting, trainer=trl.SFTTrainer)
SETTINGS = {
    "padded": Setting(),
    "without dropout": Setting(dropout=0.0),
    "packed": SFT({"packing": True, "max_length": 14}),
    "packed, split": SFT({"packing": True, "packing_strategy": "bfd_split", "max_length": 4}),
    "packed, wrapped": SFT({"packing": True, "packing_strategy": "wrapped", "max_length": 7}),
    "packed, streamed": SFT({"packing": True, "max_length": 14}, streamed=True),
    "packed, typed": SFT({"packing": True, "max_length": 14}, **TYPED),
    "packed, streamed, typed": SFT({"packing": True, "max_length": 14}, streamed=True, **TYPED),
    "padded at the end": SFT({"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}),
    "padding-free": SFT({"padding_free": True, "max_length": None}),
    "streamed": Setting(streamed=True),
    "streamed in SFT": SFT(streamed=True),
    "unequal micro-batches": Setting(BY_ROW),
    "unequal micro-batches in SFT": SFT(BY_ROW),
    "padding-free micro-batches": SFT({"padding_free": True, "max_length": None, **BY_ROW}),
    "incomplete accumulation": Setting({**BY_ROW, "gradient_accumulation_steps": 8}),
    "grouped by length": Setting({**BY_LENGTH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "last batch dropped": Setting({"per_device_train_batch_size": 3, "dataloader_drop_last": True}),
    "DPO": Setting(trainer=trl.DPOTrainer, columns=PREFERENCES),
    "checkpointing": Setting(NO_REENTRANT),
    "4-bit, checkpointing": Setting(model=in_4_bit, tolerance=1e-4),
    "bfloat16": Setting({"bf16": True}, model=in_float32, tolerance=0.05),
    "compiled": Setting({"torch_compile": True, "torch_compile_backend": "eager"}),
    "without routers": Setting(model=without_routers),
}


def build(
    setting, backbone, tmp_path, anchored, anchors=None, weight=ANCHOR_WEIGHT, kl_weight=0.0, model=None, **options
):
    """The setting's trainer, with the mixin if `anchored`."""
    rows = [dict(zip(setting.columns, values)) for values in zip(*setting.columns.values())]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if setting.streamed else Dataset.from_list(rows)
    arguments, given = TrainingArguments, {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer())}
    if setting.trainer is not Trainer:
        arguments, given = trl.SFTConfig if setting.trainer is trl.SFTTrainer else trl.DPOConfig, {}
    kind = type("Anchored", (LoRAMoETrainerMixin, setting.trainer), {}) if anchored else setting.trainer
    if anchored:
        given.update(anchors=anchors, anchor_loss_weight=weight, anchor_kl_weight=kl_weight)
    model = setting.model(backbone, **{"balance_loss_weight": WEIGHT, **(model or {})})
    args = arguments(str(tmp_path), **{**OPTIONS, **setting.arguments, **options})
    return kind(model=model, args=args, train_dataset=dataset, processing_class=tiny_tokenizer(), **given)


def update(trainer):
    """What training subtracts from the parameters: with one step of SGD at learning rate 1, their gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def passes(trainer):
    """Filled with the arguments of the model's passes with gradient; a micro-batch is followed by its anchors."""
    calls = []

    def keep(module, args, kwargs):
        if torch.is_grad_enabled():
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            calls.append({name: kwargs[name] for name in names if kwargs.get(name) is not None})

    trainer.model.base_model.model.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


def loss_of_anchors(model, arguments, kl_weight, **given):
    """Their weighted language-modelling loss and divergence from the base model."""
    if not kl_weight:
        return ANCHOR_WEIGHT * model(**arguments, **given).loss
    real = arguments["attention_mask"][:, 1:] != 0
    with torch.no_grad(), model.disable_adapter():
        base = model(**arguments).logits[:, :-1][real]
    logits = model(**arguments, **given).logits[:, :-1][real]
    loss = torch.nn.functional.cross_entropy(logits, arguments["input_ids"][:, 1:][real])
    base, trained = (torch.distributions.Categorical(logits=values) for values in (base, logits))
    return ANCHOR_WEIGHT * loss + kl_weight * torch.distributions.kl_divergence(base, trained).mean()


def gradient_of_term_and_anchors(model, calls, task_types, kl_weight):
    model.train()
    total = 0
    tasks, anchors = calls[::2], calls[1::2]
    assert all(call["input_ids"].max() <= 18 for call in tasks) and all(a["input_ids"].max() >= 20 for a in anchors)
    for task, of_anchors in zip(tasks, anchors, strict=True):
        task = {name: value for name, value in task.items() if name != "labels"}
        if not hasattr(model.peft_config["default"], "null_groups"):
            total = total + loss_of_anchors(model, of_anchors, kl_weight)
            continue
        types = [1] * len(task["input_ids"]) if task_types is None else task_types
        with collect_balance(model):
            model(**task, task_types=types, use_cache=False)
            loss = loss_of_anchors(model, of_anchors, kl_weight, task_types=[0] * len(of_anchors["input_ids"]))
        total = total + balance_loss(model) + loss
    names, values = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(total / len(tasks), values)))


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in SETTINGS])
def setting(request):
    return SETTINGS[request.param]


@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
def test_anchors_and_term_add_their_gradient_to_that_of_the_tasks(setting, backbone, tmp_path, kl_weight):
    tasks = update(build(setting, backbone, tmp_path, False, model={"balance_loss_weight": 0.0}))
    trainer = build(setting, backbone, tmp_path, True, ANCHORS, kl_weight=kl_weight)
    calls = passes(trainer)
    actual = update(trainer)
    added = gradient_of_term_and_anchors(
        setting.model(backbone, balance_loss_weight=WEIGHT), calls, setting.task_types, kl_weight
    )
    assert actual.keys() == added.keys()
    for name, gradient in added.items():
        expected = tasks[name] + gradient
        assert gradient.abs().max() > 1e-6
        atol = setting.tolerance * max(expected.abs().max().item(), gradient.abs().max().item())
        torch.testing.assert_close(actual[name], expected, atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023
    if setting.model is not without_routers:
        layers = layer_routing(trainer.model)
        assert {t for layer in layers for t in layer.task_types[layer.token_counts > 0].tolist()} == {0, 1}


@pytest.mark.parametrize("weights", [{"weight": 1e-30}, {"weight": 0.0, "kl_weight": 1e-30}], ids=["loss", "kl"])
def test_anchors_leave_the_gradient_of_the_tasks_bit_equal(setting, backbone, tmp_path, weights):
    """Of a weight so small that it is lost when it is added.

    Dropout shows whether they change the random numbers, three steps whether they change the order of samples.
    """
    results = []
    for anchored in (False, True):
        model = {"balance_loss_weight": 0.0, "lora_dropout": setting.dropout}
        options = {"max_steps": 3, "learning_rate": 0.1}
        trainer = build(setting, backbone, tmp_path, anchored, ANCHORS, **weights, model=model, **options)
        moved = update(trainer)
        results.append((moved, [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    assert any(value.abs().max() > 1e-4 for value in moved.values())
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


PACKED = {
    "packed": {"packing": True, "max_length": 16, "per_device_train_batch_size": 4},
    "padding-free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 15},
    "padded at the end": {
        "padding_free": True,
        "max_length": None,
        "pad_to_multiple_of": 64,
        "per_device_train_batch_size": 15,
    },
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_anchors_are_a_tenth_of_the_samples_of_packed_rows(options, backbone, tmp_path):
    columns = {"input_ids": [[5, 6, 7]] * 15, "labels": [[5, 6, 7]] * 15}
    trainer = build(SFT(options, columns=columns), backbone, tmp_path, True, ANCHORS)
    calls = passes(trainer)
    trainer.train()
    assert [len(call["input_ids"]) for call in calls] == [1, 2]
