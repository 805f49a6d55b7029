"""The null group's weight in the log, and the warning where the types are not told apart."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peft_loramoe import layer_routing
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback
from tiny import loramoe, tiny_tokenizer, token_batch


TYPES = torch.tensor([0, 1, 1])


def retaining(**options):
    return loramoe(num_experts=4, **{"null_groups": [0], "balance_delta": 0.8, "router_init": "zeros", **options})


def run(model, task_types=TYPES, callback=None, steps=10, warmup=0, first=True):
    """The metrics logged at every step."""
    callback = callback or RouterCallback(layer_groups=0)
    args = SimpleNamespace(device=torch.device("cpu"), get_warmup_steps=lambda steps: warmup)
    control = SimpleNamespace(should_log=True)
    logged = []
    for step in range(1, steps + 1):
        model(**token_batch(), task_types=task_types)
        state = SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=first)
        callback.on_step_end(args, state, control, model=model)
        logged.append(callback.take())
    return logged


def test_the_null_weight_is_that_of_the_routing():
    model = retaining(router_init="kaiming_uniform", task_type_names=["known", "new"])
    (logged,) = run(model, steps=1)
    expected = {}
    for name, task_type in (("known", 0), ("new", 1)):
        weights = []
        for layer in layer_routing(model):
            rows = layer.task_types == task_type
            weights.append((layer.importance[rows, :2].sum() / layer.token_counts[rows].sum()).item())
        expected[f"router/null/{name}"] = pytest.approx(sum(weights) / len(weights))
    assert {name: value for name, value in logged.items() if name != "router/balance_loss"} == expected


def test_without_null_groups_there_is_no_null_weight():
    assert list(run(loramoe(), steps=1)[0]) == ["router/balance_loss"]


def test_types_that_are_not_told_apart_are_warned_about_once():
    with pytest.warns(
        UserWarning, match="hardly tell the task types apart: the null group's weight is 0.50 on"
    ) as caught:
        run(retaining())
    (warning,) = (warning for warning in caught if issubclass(warning.category, UserWarning))
    assert "After 5 of 10 steps" in str(warning.message)  # a quarter of the steps, then three measurements
    assert "Raise router_lr_multiplier (now 10)" in str(warning.message)


def test_the_warm_up_is_waited_for():
    with pytest.warns(UserWarning, match="After 9 of 10 steps"):
        run(retaining(), warmup=6)


def test_types_that_are_missing_are_warned_about():
    with pytest.warns(UserWarning, match="no sample of type 0 was seen: .* Give the trainer anchors"):
        run(retaining(), task_types=torch.tensor([1, 1, 1]))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"null_groups": None}, True),
        ({"balance_loss_weight": 0.0}, True),
        ({"balance_delta": 0.0}, True),
        ({"balance_target": "paper"}, True),
        ({}, False),
    ],
)
def test_no_warning_where_nothing_is_to_be_told_apart_or_another_process_warns(options, first):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(retaining(**options), first=first)


def test_no_warning_where_types_are_told_apart():
    """Embeddings with one constant entry, whose sign tells the types apart; the routers read nothing else."""
    model = retaining(target_modules=["gate_proj"], layers_to_transform=[0])
    (router,) = (parameter for name, parameter in model.named_parameters() if "router" in name)
    layer = model.base_model.model.model.layers[0].post_attention_layernorm
    sign = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    layer.register_forward_hook(lambda module, args, output: torch.ones_like(output) * sign)
    with torch.no_grad():
        router[:2] = 0.1  # null experts
        router[2:] = -0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logged = run(model)
    assert logged[-1]["router/null/type_0"] > 0.9 > 0.1 > logged[-1]["router/null/type_1"]


def test_types_that_are_all_known_are_warned_about():
    with pytest.warns(UserWarning, match="no sample of another type than 0 was seen: .* Give the samples"):
        run(retaining(), task_types=torch.tensor([0, 0, -1]))


# in a trainer


class RouterTrainer(LoRAMoETrainerMixin, Trainer):
    pass


SAMPLES = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 5]]
ANCHORS = ["w20 w21 w22 w23", "w24 w25 w26 w27", "w28 w29 w30 w31"]
LEARNING = {"learning_rate": 0.002, "lr_scheduler_type": "constant"}
NEVER_LEARNING = {"learning_rate": 0.0}


def separation_warnings(tmp_path, types=None, anchors=ANCHORS, anchors_every=1, kind=RouterTrainer, **options):
    """What training says about the types, and the null weights that it logged last."""
    rows = [{"input_ids": row, "labels": row} for row in SAMPLES]
    rows = rows if types is None else [{**row, "task_type": t} for row, t in zip(rows, types)]
    model = loramoe(num_experts=4, null_groups=[0], balance_delta=0.8, balance_loss_weight=1.0)
    arguments = dict(
        max_steps=40,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = kind(
        model,
        TrainingArguments(tmp_path, **{**arguments, **options}),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[RouterCallback(layer_groups=0)],
        **({} if anchors is None else {"anchors": anchors, "anchors_every": anchors_every}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    logged = [log for log in trainer.state.log_history if "router/null/type_1" in log]
    said = [str(w.message) for w in caught if "types apart" in str(w.message) or "was seen" in str(w.message)]
    return said, {name: value for name, value in logged[-1].items() if name.startswith("router/null")}


def test_training_that_tells_the_types_apart_says_nothing(tmp_path):
    said, weights = separation_warnings(tmp_path, **LEARNING)
    assert said == []
    assert weights["router/null/type_0"] > weights["router/null/type_1"] + 0.4


def test_training_that_does_not_says_so_once(tmp_path):
    (said,), _ = separation_warnings(tmp_path, **NEVER_LEARNING)
    assert said.startswith("After 16 of 40 steps the routers hardly tell the task types apart")


@pytest.mark.parametrize("options", [{"anchors_every": 7}, {"anchors_every": 2, "gradient_accumulation_steps": 2}])
def test_anchors_that_the_logged_passes_miss_were_seen(options, tmp_path):
    assert separation_warnings(tmp_path, **LEARNING, **options)[0] == []


class InOrder(RouterTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_samples_of_type_0_that_the_logged_passes_miss_were_seen(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    said, weights = separation_warnings(tmp_path, [0, 1, 1, 1], None, kind=InOrder, **LEARNING, **options)
    assert said == [] and list(weights) == ["router/null/type_1"]


def test_training_without_anchors_and_samples_of_type_0_says_so_once(tmp_path):
    (said,), _ = separation_warnings(tmp_path, [1, 1, 1, 1], None, **LEARNING)
    assert "no sample of type 0 was seen" in said
