"""Anchors in training: what they add to a trainer's update, and that they change nothing else."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, VBLoRAConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_loramoe import LoRAMoEConfig, balance_loss, collect_balance, layer_routing
from peft_loramoe.peft_api import PEFT_AT_LEAST_0_21
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback
from peft_loramoe.training.anchor_pass import AnchorBatches
from tiny import loramoe, tiny_llama, tiny_tokenizer


ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]
LABELS = [[-100, *row[1:]] for row in ROWS]
COLUMNS = {"input_ids": ROWS, "labels": LABELS}
MASKED = {"input_ids": ROWS, "labels": [[-100] * len(row) for row in ROWS]}
ANCHORS = ["w20 w21 w22 w23", "w24 w25 w26 w27", "w28 w29 w30 w31", "w32 w33 w34 w35"]
UNEQUAL = ["w20 w21 w22", "w24 w25 w26 w27 w28", "w29 w30", "w32 w33 w34"]
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
    save_strategy="no",
    disable_tqdm=True,
    logging_steps=1,
)


class BalancedTrainer(LoRAMoETrainerMixin, Trainer):
    pass


class MeanTrainer(BalancedTrainer):
    """Of a model that does not take num_items_in_batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def build(tmp_path, columns=COLUMNS, model=None, kind=BalancedTrainer, balance_loss_weight=0.5, **options):
    names = (
        "anchors",
        "anchor_loss_weight",
        "anchor_kl_weight",
        "anchors_per_batch",
        "anchors_every",
        "callbacks",
        "processing_class",
    )
    given = {"anchor_loss_weight": 0.4, "anchor_kl_weight": 0.0} if options.get("anchors") else {}
    given |= {name: options.pop(name) for name in names if name in options}
    tokenizer = given.pop("processing_class", tiny_tokenizer())
    return kind(
        model=loramoe(balance_loss_weight=balance_loss_weight, router_lr_multiplier=1.0) if model is None else model,
        args=TrainingArguments(output_dir=str(tmp_path), **{**OPTIONS, **options}),
        train_dataset=Dataset.from_dict(columns),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tokenizer,
        **given,
    )


def update(trainer):
    """What training subtracts from the parameters: with one step of SGD at learning rate 1, their gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def anchor_arguments(numbers):
    ids = torch.tensor([[20 + 4 * number + i for i in range(4)] for number in numbers])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def masked_labels(anchors):
    return anchors["input_ids"].masked_fill(anchors["attention_mask"] == 0, -100)


def labels_of(ids):
    labels = ids.masked_fill(ids == 0, -100)
    first = (ids != 0).int().argmax(-1)
    return labels.scatter(1, first[:, None], -100)


def expected_gradient(model, calls, anchors, anchor_loss_weight, anchor_kl_weight=0.0):
    """Of weighted sums over micro-batches of task loss, term, anchor loss and KL, in a loop written by hand."""
    model.train()
    total = 0
    with torch.no_grad(), model.disable_adapter():
        base = torch.distributions.Categorical(logits=model(**anchors).logits)
    for weight, task_weight, rows, types in calls:
        arguments = padded(rows)
        with collect_balance(model):
            output = model(**arguments, labels=labels_of(arguments["input_ids"]), task_types=torch.tensor(types))
            of_anchors = model(**anchors, labels=masked_labels(anchors), task_types=[0] * len(anchors["input_ids"]))
        total = total + task_weight * output.loss
        total = total + weight * (balance_loss(model) + anchor_loss_weight * of_anchors.loss)
        kl = torch.distributions.kl_divergence(base, torch.distributions.Categorical(logits=of_anchors.logits))
        real = anchors["attention_mask"][:, 1:] != 0
        total = total + weight * anchor_kl_weight * kl[:, :-1][real].mean()
    names, values = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(total, values)))


def assert_close(actual, expected):
    assert any(value.abs().max() > 1e-3 for value in expected.values())
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-4)


def test_loss_is_that_of_the_tasks_plus_term_plus_weighted_anchors(tmp_path):
    # all four anchors, so that their order does not matter
    actual = update(build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0.4, anchors_per_batch=4))
    model = loramoe(balance_loss_weight=0.5)
    assert_close(actual, expected_gradient(model, [(1, 1, ROWS, [1] * 4)], anchor_arguments(range(4)), 0.4))


def test_types_of_the_data_set_are_kept(tmp_path):
    columns = {**COLUMNS, "task_type": [0, 1, -1, 1]}
    actual = update(build(tmp_path, columns, anchors=ANCHORS, anchors_per_batch=4))
    model = loramoe(balance_loss_weight=0.5)
    assert_close(actual, expected_gradient(model, [(1, 1, ROWS, [0, 1, -1, 1])], anchor_arguments(range(4)), 0.4))


@pytest.mark.parametrize("loss_weight", [0.0, 0.4])
def test_divergence_from_the_base_model(tmp_path, loss_weight):
    # B must not be zero, or the divergence would be at its minimum
    model = loramoe(balance_loss_weight=0.5, router_lr_multiplier=1.0, init_weights=False)
    expected = copy.deepcopy(model)
    weights = {"anchor_loss_weight": loss_weight, "anchor_kl_weight": 3.0}
    trainer = build(tmp_path, anchors=UNEQUAL, anchors_per_batch=4, model=model, **weights)
    actual = update(trainer)
    ids = torch.tensor([[20, 21, 22, 0, 0], [24, 25, 26, 27, 28], [29, 30, 0, 0, 0], [32, 33, 34, 0, 0]])
    anchors = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert_close(actual, expected_gradient(expected, [(1, 1, ROWS, [1] * 4)], anchors, loss_weight, 3.0))


def test_the_divergence_is_the_default(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), **OPTIONS)
    rows, tokenizer = Dataset.from_dict(COLUMNS), tiny_tokenizer()
    model, collator = loramoe(router_lr_multiplier=1.0), DataCollatorForSeq2Seq(tiny_tokenizer())
    options = {"train_dataset": rows, "data_collator": collator, "processing_class": tokenizer, "anchors": ANCHORS}
    trainer = BalancedTrainer(model, args, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    added = log["loss"] - log["model_loss"] - log["balance_loss"]
    assert "anchor_loss" not in log and added == pytest.approx(0.3 * log["anchor_kl"], abs=1e-3)


def test_divergence_is_logged_and_no_part_of_the_models_loss(tmp_path):
    model = loramoe(balance_loss_weight=0.5, init_weights=False)
    plain = build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0, model=copy.deepcopy(model))
    trainer = build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0, anchor_kl_weight=3.0, model=model)
    plain.train()
    trainer.train()
    before, after = (run.state.log_history[0] for run in (plain, trainer))
    assert "anchor_kl" not in before and after["anchor_kl"] > 0
    assert after["model_loss"] == pytest.approx(before["model_loss"], abs=1e-4)
    assert after["loss"] == pytest.approx(before["loss"] + 3 * after["anchor_kl"], rel=1e-4)


def test_nothing_changes_while_the_model_is_its_base_model(tmp_path):
    options = {"anchors": ANCHORS, "anchor_loss_weight": 0.0}
    with_kl = update(build(tmp_path, model=loramoe(init_weights=True), anchor_kl_weight=1.0, **options))
    without = update(build(tmp_path, model=loramoe(init_weights=True), **options))
    torch.testing.assert_close(with_kl, without)


def test_divergence_of_a_lora(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trainer = build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=model)
    trainer.train()
    assert trainer.state.log_history[0]["anchor_kl"] > 0


HAS_MICA = pytest.mark.skipif(not hasattr(LoraLayer, "mica_init"), reason="this PEFT has no MiCA")


@pytest.mark.parametrize("kind", [True, "gaussian", "orthogonal", pytest.param("mica", marks=HAS_MICA)])
def test_divergence_is_taken_where_the_base_weights_are_kept(tmp_path, kind):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], init_lora_weights=kind)
    model = get_peft_model(tiny_llama(), config)
    of_base = {name.replace("base_layer.", ""): p for name, p in model.get_base_model().named_parameters()}
    for name, parameter in tiny_llama().named_parameters():
        assert torch.equal(of_base[name], parameter)
    assert build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=model) is not None


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_divergence_is_refused_where_the_base_weights_were_changed(tmp_path, kind):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=kind))
    with pytest.raises(ValueError, match=f"anchor_kl_weight=1.0.*init_lora_weights='{kind}' of the adapter 'default'"):
        build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=model)


BIAS_IS_REFUSED = pytest.mark.skipif(not PEFT_AT_LEAST_0_21, reason="bias is refused with PEFT before 0.21")


@pytest.mark.parametrize(
    ("config_class", "bias"),
    [
        (LoraConfig, "all"),
        (LoraConfig, "lora_only"),
        pytest.param(LoRAMoEConfig, "all", marks=BIAS_IS_REFUSED),
        pytest.param(LoRAMoEConfig, "loramoe_only", marks=BIAS_IS_REFUSED),
    ],
)
def test_divergence_is_refused_where_biases_of_the_base_model_are_trained(tmp_path, config_class, bias):
    model = get_peft_model(
        tiny_llama(mlp_bias=True, attention_bias=True), config_class(task_type="CAUSAL_LM", bias=bias)
    )
    with pytest.raises(
        ValueError, match=r"anchor_kl_weight=1.0 .*_proj\.(base_layer\.)?bias' is trained.*bias='none'"
    ):
        build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=model)


def test_divergence_is_refused_where_a_module_of_the_base_model_is_trained(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    model.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"anchor_kl_weight=1.0 .*model\.norm\.weight' is trained.*modules_to_save"):
        build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["down_proj"], modules_to_save=["norm"]),
        LoraConfig(trainable_token_indices=[1, 2]),
        LoRAMoEConfig(modules_to_save=["lm_head"]),
        VBLoRAConfig(num_vectors=4, vector_length=2, topk=2),  # its vectors belong to no layer
    ],
    ids=["dora", "tokens", "loramoe", "vblora"],
)
def test_trained_copies_are_no_base_model(tmp_path, config):
    build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=get_peft_model(tiny_llama(), config))


def test_divergence_is_refused_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="anchor_kl_weight=1.0.*no adapter that can be disabled"):
        build(tmp_path, anchors=ANCHORS, anchor_kl_weight=1.0, model=tiny_llama())


@pytest.mark.filterwarnings("ignore:The anchors have no effect")
def test_anchors_without_effect_are_left_out(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0, balance_loss_weight=0.0)
    calls = []
    trainer.model.base_model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    trainer.train()
    assert len(calls) == 1


def test_without_loss_weight_anchors_have_no_labels(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0, anchors_per_batch=2)
    calls = []
    trainer.model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    trainer.train()
    assert [call.get("labels") is None for call in calls] == [False, True]
    assert "anchor_loss" not in trainer.state.log_history[0]


def test_only_the_term_sees_anchors_of_weight_zero(tmp_path):
    actual = update(build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0.0, anchors_per_batch=4))
    model = loramoe(balance_loss_weight=0.5)
    assert_close(actual, expected_gradient(model, [(1, 1, ROWS, [1] * 4)], anchor_arguments(range(4)), 0.0))


def test_routing_shows_samples_and_anchors(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, anchors_per_batch=2, callbacks=[RouterCallback()])
    trainer.train()
    of_first = [
        layer for layer in layer_routing(trainer.model) if layer.layer == layer_routing(trainer.model)[0].layer
    ]
    assert [layer.task_types.tolist() for layer in of_first] == [[1] * 4, [0] * 2]
    logged = trainer.state.log_history[0]
    assert {"router/layers_0/type_0/entropy", "router/layers_0/type_1/entropy", "anchor_loss"} <= set(logged)
    assert logged["anchor_loss"] == pytest.approx(4.2, abs=1)  # about ln 64


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (4, 1), (20, 2)])
def test_a_tenth_of_the_samples_and_at_least_one_anchor(rows, expected, tmp_path):
    columns = {"input_ids": [[5, 6, 7]] * rows, "labels": [[5, 6, 7]] * rows}
    trainer = build(tmp_path, columns, anchors=ANCHORS, per_device_train_batch_size=rows)
    trainer.train()
    assert layer_routing(trainer.model)[-1].task_types.tolist() == [0] * expected


def test_anchors_of_every_second_micro_batch(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, anchors_every=2, max_steps=3, gradient_accumulation_steps=1)
    seen = []
    trainer.model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert seen == [4, 4, 1, 4]


def test_a_plain_lora_learns_anchors_as_language(tmp_path):
    def lora():
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False, target_modules=["down_proj"]))

    actual = update(build(tmp_path, model=lora(), anchors=ANCHORS, anchors_per_batch=4))
    model, arguments, anchors = lora().train(), padded(ROWS), anchor_arguments(range(4))
    loss = (
        model(**arguments, labels=labels_of(arguments["input_ids"])).loss
        + 0.4 * model(**anchors, labels=anchors["input_ids"]).loss
    )
    names, values = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    assert_close(actual, dict(zip(names, torch.autograd.grad(loss, values))))


def test_evaluation_has_no_anchors(tmp_path):
    trainers = [build(tmp_path, anchors=anchors) for anchors in (None, ANCHORS)]
    first, second = (trainer.evaluate(Dataset.from_dict(COLUMNS))["eval_loss"] for trainer in trainers)
    assert first == second


# accumulation


@pytest.mark.parametrize("kind", [BalancedTrainer, MeanTrainer])
def test_micro_batches_count_equally(kind, tmp_path):
    actual = update(build(tmp_path, kind=kind, anchors=ANCHORS, anchors_per_batch=4, per_device_train_batch_size=1,
                          gradient_accumulation_steps=4))  # fmt: skip
    tokens = [len(row) - 1 for row in ROWS]
    share = [1 / 4] * 4 if kind is MeanTrainer else [n / sum(tokens) for n in tokens]
    calls = [(1 / 4, task_share, [row], [1]) for task_share, row in zip(share, ROWS)]
    assert_close(actual, expected_gradient(loramoe(balance_loss_weight=0.5), calls, anchor_arguments(range(4)), 0.4))


def test_anchors_of_accumulated_batches_are_those_of_the_whole(tmp_path):
    options = {"anchors": ANCHORS, "balance_loss_weight": 0.0}
    whole = update(build(tmp_path, anchors_per_batch=2, **options))
    parts = update(build(tmp_path, anchors_per_batch=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                         **options))  # fmt: skip
    assert_close(parts, whole)


# samples without labels


@pytest.mark.parametrize("kind", [BalancedTrainer, MeanTrainer])
@pytest.mark.parametrize("anchors", [{}, {"anchors": ANCHORS, "anchor_loss_weight": 0}], ids=["no anchors", "anchors"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["cross-entropy", "smoothed"])
def test_batches_without_labels_train_the_routers(kind, anchors, options, tmp_path):
    columns = {**MASKED, "task_type": [0, 1, 1, 0]}
    accumulation = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = build(tmp_path, columns, kind=kind, **anchors, **accumulation, **options)
    gradient = update(trainer)
    assert all(value.isfinite().all() for value in gradient.values())
    assert all(value.abs().max() > 1e-6 for name, value in gradient.items() if "router" in name)
    assert 0 < trainer.state.log_history[0]["loss"] < 10


def test_one_batch_without_labels_among_others(tmp_path):
    # the only sample with a label is of type 0: routers learn from the others too
    columns = {"input_ids": ROWS, "labels": [LABELS[0], *MASKED["labels"][1:]], "task_type": [0, 1, 1, 1]}
    accumulation = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    actual = update(build(tmp_path, columns, **accumulation))
    plain = update(build(tmp_path, columns, balance_loss_weight=0.0, **accumulation))
    model = loramoe(balance_loss_weight=0.5).train()
    total = 0
    for row, kind in zip(ROWS, [0, 1, 1, 1]):
        model(**padded([row]), task_types=[kind])
        total = total + balance_loss(model) / 4
    names, values = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    of_term = dict(zip(names, torch.autograd.grad(total, values, allow_unused=True)))
    expected = {n: g if of_term[n] is None else g + of_term[n] for n, g in plain.items()}
    assert_close(actual, expected)


# forms of anchors


def test_forms_of_anchors(tmp_path):
    (tmp_path / "anchors.jsonl").write_text("".join(f'{{"text": "{text}", "kind": "prose"}}\n' for text in ANCHORS))
    forms = [
        ANCHORS,
        [{"text": text} for text in ANCHORS],
        Dataset.from_dict({"text": ANCHORS, "other": [1, 2, 3, 4]}),
        str(tmp_path / "anchors.jsonl"),
        tmp_path / "anchors.jsonl",
    ]
    drawn = [numbers(AnchorBatches(anchors, tiny_tokenizer()).draw(4, step=0)) for anchors in forms]
    assert all(batch == drawn[0] for batch in drawn)


# order


def numbers(batch):
    return [(row[0].item() - 20) // 4 for row in batch["input_ids"]]


def test_a_step_goes_round_all_anchors():
    batches = AnchorBatches(ANCHORS, tiny_tokenizer())
    drawn = [numbers(batches.draw(2, step=0, slot=slot)) for slot in range(2)]
    assert sorted(drawn[0] + drawn[1]) == [0, 1, 2, 3]
    assert len({tuple(numbers(batches.draw(4, step))) for step in range(20)}) > 5


def test_more_anchors_than_there_are_repeat():
    assert sorted(numbers(AnchorBatches(ANCHORS, tiny_tokenizer()).draw(8, step=3))) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_order_depends_on_the_seed_alone():
    drawn = [
        [numbers(AnchorBatches(ANCHORS, tiny_tokenizer(), seed=seed).draw(4, step)) for step in range(8)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def anchors_of(trainer, **options):
    """The pairs of anchors of each micro-batch of a training."""
    seen = []
    trainer.model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][:, -4:].tolist()), with_kwargs=True
    )
    trainer.train(**options)
    return [rows for rows in seen if len(rows) == 2]


def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(tmp_path):
    options = dict(
        anchors=ANCHORS,
        anchors_per_batch=2,
        per_device_train_batch_size=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
        optim="adamw_torch",
    )
    whole, resumed = (
        build(tmp_path, model=loramoe(balance_loss_weight=0.5, lora_dropout=0.3), **options) for _ in range(2)
    )
    drawn = anchors_of(whole)
    assert anchors_of(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == drawn[2:]
    first, second = (dict(trainer.model.named_parameters()) for trainer in (whole, resumed))
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    first, second = ([log for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed))
    assert second == first


def test_a_second_training_draws_what_the_first_one_drew(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, anchors_per_batch=2)
    first = anchors_of(trainer)
    assert len(first) == 1 and anchors_of(trainer) == first


def test_rows_are_padded_on_the_right():
    batch = AnchorBatches(["w20 w21", "w22 w23 w24"], tiny_tokenizer()).draw(2, 0)
    widths = batch["attention_mask"].sum(-1).tolist()
    assert sorted(widths) == [2, 3]
    assert (batch["input_ids"][widths.index(2)] == torch.tensor([20, 21, 0])).all()


# bad input


BAD = {
    "empty": ([], "anchors is empty"),
    "identical": (["w1 w2", "w1  W2", "w1 w2 "], "All 3 anchors are the same text"),
    "foreign tokens": (["w1 w2", "<|im_start|>user w3"], "contains <|im_start|>, which the tokenizer does not know"),
    "too long": (["w1 w2 w3 w4 w5 w6 w7 w8 w9"], "has 9 tokens, more than max_length=8"),
    "too short": (["w1"], "has 1 token; an anchor needs two or more"),
    "no text": ([{"words": "w1"}], "anchors[0]: must be a record like"),
    "blank": (["w1 w2", "  "], "anchors[1]: must be a record like"),
}


@pytest.mark.parametrize(("anchors", "message"), BAD.values(), ids=BAD)
def test_bad_anchors_are_refused(anchors, message):
    with pytest.raises(ValueError) as error:
        AnchorBatches(anchors, tiny_tokenizer(), max_length=8)
    assert message in str(error.value)


def test_anchors_of_unknown_tokens_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "w0"
    assert len(AnchorBatches(["w2 zz w3"], tokenizer)) == 1
    with pytest.raises(ValueError, match="More than half of the tokens of the anchor 'zz yy w2' are unknown"):
        AnchorBatches(["zz yy w2"], tokenizer)


def test_a_dictionary_of_splits_is_refused():
    with pytest.raises(TypeError, match="anchors is a DatasetDict; give one list or split"):
        AnchorBatches(DatasetDict({"train": Dataset.from_dict({"text": ["w1 w2"]})}), tiny_tokenizer())


def test_untyped_samples_of_a_null_group_are_refused(tmp_path):
    trainer = build(tmp_path, anchors=ANCHORS, model=loramoe(null_groups=[1]))
    with pytest.raises(ValueError, match="Samples without task_type are of type 1, which null_groups=.1. leaves"):
        trainer.train()


def test_repeated_anchors_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="1 of 3 anchors repeat"):
        assert len(AnchorBatches(["w1 w2", "w3 w4", "w1 w2"], tiny_tokenizer())) == 2


WRONG_OPTIONS = {
    "weight": ({"anchor_loss_weight": -1.0}, ValueError, r"anchor_loss_weight=-1.0 must be in \[0, "),
    "kl weight": ({"anchor_kl_weight": float("nan")}, ValueError, r"anchor_kl_weight=nan must be in \[0, "),
    "kind of kl weight": ({"anchor_kl_weight": True}, TypeError, "anchor_kl_weight=True must be a number"),
    "kind of weight": ({"anchor_loss_weight": "0.4"}, TypeError, "anchor_loss_weight='0.4' must be a number"),
    "number": ({"anchors_per_batch": 0}, ValueError, "anchors_per_batch=0 must be at least 1"),
    "kind of number": ({"anchors_every": 1.5}, TypeError, "anchors_every=1.5 must be an integer"),
    "no tokenizer": ({"processing_class": None}, ValueError, "pass the model's tokenizer"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options_are_refused(options, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        build(tmp_path, **{"anchors": ANCHORS, **options})


@pytest.mark.parametrize(
    ("option", "value"),
    [("anchor_loss_weight", 5.0), ("anchor_kl_weight", 0.0), ("anchors_per_batch", 2), ("anchors_every", 1)],
)
def test_options_without_anchors_are_refused(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"{option}={value} has no effect without anchors; give some, or leave it"):
        build(tmp_path, **{option: value})


def test_what_options_are_by_default(tmp_path):
    given = build(tmp_path, anchors=ANCHORS, anchor_loss_weight=None, anchor_kl_weight=None)._anchors
    assert (given._loss_weight, given._kl_weight, given._per_batch, given._every) == (0.0, 0.3, None, 1)


def test_anchors_without_effect_give_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="The anchors have no effect"):
        build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0, balance_loss_weight=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(tmp_path, anchors=ANCHORS, anchor_loss_weight=0)


def test_other_kinds_of_models_are_refused(tmp_path):
    model = loramoe(balance_loss_weight=0.5)
    model.peft_config["default"].task_type = "SEQ_CLS"
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'.*set anchor_loss_weight=0"):
        build(tmp_path, model=model, anchors=ANCHORS)


def test_a_loss_that_passes_the_layers_by_is_refused_with_anchors_too(tmp_path):
    class PassesBy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return next(p for p in model.parameters() if p.requires_grad).sum()

    kind = type("Balanced", (LoRAMoETrainerMixin, PassesBy), {})
    with pytest.raises(ValueError, match="called no LoRAMoE layer"):
        build(tmp_path, kind=kind, anchors=ANCHORS).train()
