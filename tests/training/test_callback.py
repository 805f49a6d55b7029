import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import inject_adapter_in_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from peft_loramoe import LoRAMoEConfig, balance_loss, balance_terms
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback
from peft_loramoe.training.callback import layer_blocks
from tiny import capture, labelled, loramoe, tiny_llama, tiny_tokenizer, token_batch


NAMES = ["facts", "tasks"]
TYPES = torch.tensor([0, 1, -1])
SAMPLE_TYPES = [0, -1, 0, 1, 1]


class RouterTrainer(LoRAMoETrainerMixin, Trainer):
    pass


def step_end(model, step=1, should_log=True, callback=None, **options):
    callback = callback or RouterCallback(**options)
    state, control = SimpleNamespace(global_step=step), SimpleNamespace(should_log=should_log)
    callback.on_step_end(SimpleNamespace(device=torch.device("cpu")), state, control, model=model)
    return callback


def metrics(model, **options):
    return step_end(model, **options).take()


def rows(count=8):
    batch = labelled(token_batch(rows=count, width=9))
    return [{name: value[i] for name, value in batch.items()} | {"task_types": i % 2} for i in range(count)]


def trainer(tmp_path, trainer_class=RouterTrainer, callbacks=None, model=None, **options):
    arguments = TrainingArguments(
        tmp_path, **{
            "max_steps": 4, "per_device_train_batch_size": 4, "remove_unused_columns": False, "report_to": "none",
            "save_strategy": "no", "logging_steps": 2, "use_cpu": True, "disable_tqdm": True, **options,
        },
    )  # fmt: skip
    model = loramoe(task_type_names=NAMES) if model is None else model
    callbacks = [RouterCallback()] if callbacks is None else callbacks
    return trainer_class(model, arguments, train_dataset=rows(), eval_dataset=rows(2), callbacks=callbacks)


def router_logs(trained):
    """The logged router metrics by step, and the other logs that contain any."""
    of_training = {
        log["step"]: {k for k in log if "router" in k} for log in trained.state.log_history if "loss" in log
    }
    return of_training, [
        log for log in trained.state.log_history if "loss" not in log and any("router" in k for k in log)
    ]


def test_metrics_against_a_captured_forward_pass():
    model, batch = loramoe(task_type_names=NAMES, expert_groups=[2, 4]), token_batch()
    seen = capture(model)
    model(**batch, task_types=TYPES)
    result, expected = metrics(model, layer_groups=2), {}
    for depth in (0, 1):
        of_block = [p for name, p in seen.items() if f"layers.{depth}." in name]
        for row, name in enumerate([*NAMES, "unknown"]):
            real = [p[row, : 7 - row].detach() for p in of_block]  # row i has i padding tokens
            prefix = f"router/layers_{depth}/{name}"
            entropies = torch.stack([-(p * p.log()).sum(-1).mean() for p in real])
            load = torch.stack([p.mean(0) for p in real])
            expected[f"{prefix}/entropy"] = entropies.mean()
            expected[f"{prefix}/weight_facts"] = load[:, :2].sum(1).mean()
            expected[f"{prefix}/weight_tasks"] = load[:, 2:].sum(1).mean()
            expected[f"{prefix}/load_min"] = load.min(1).values.mean()
            expected[f"{prefix}/load_max"] = load.max(1).values.mean()
        terms = [term for name, term in balance_terms(model)["default"].items() if f"layers.{depth}." in name]
        expected[f"router/layers_{depth}/balance_term"] = torch.stack(terms).mean()
    expected["router/balance_loss"] = balance_loss(model)
    assert result == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


def test_uniform_routing():
    model = loramoe(router_init="zeros")
    model(**token_batch(), task_types=[0, 0, 0])
    result = metrics(model)
    assert result["router/layers_0/type_0/entropy"] == pytest.approx(math.log(6))
    assert result["router/layers_0/type_0/weight_group_1"] == pytest.approx(0.5)
    assert result["router/layers_0/type_0/load_min"] == pytest.approx(1 / 6)
    assert not any("type_1" in name or "unknown" in name for name in result)


def test_a_type_called_unknown_is_not_mixed_up_with_samples_without_a_type():
    model = loramoe(task_type_names=["unknown", "tasks"])
    model(**token_batch(), task_types=TYPES)
    result = metrics(model)
    assert {name.split("/")[2] for name in result if name.endswith("entropy")} == {"unknown", "tasks", "type_-1"}


def test_linears_with_different_numbers_of_experts_share_a_block():
    model = loramoe(num_experts_pattern={"down_proj": [1, 3]})
    seen = capture(model)
    model(**token_batch(), task_types=[0, 0, 0])
    mask = token_batch()["attention_mask"].bool()
    lowest = [p[mask].mean(0).min().item() for name, p in seen.items() if "layers.1." in name]
    assert metrics(model)["router/layers_1/type_0/load_min"] == pytest.approx(sum(lowest) / 3, rel=1e-5)


def test_adapters_are_named_where_several_are_active():
    model = loramoe()
    model.add_adapter("other", LoRAMoEConfig(r=1, num_experts=3, expert_groups=[3], init_weights=False))
    model(**token_batch(), task_types=[0, 0, 0])
    assert "router/layers_0/type_0/entropy" in metrics(model)
    model.base_model.set_adapter(["default", "other"])
    model(**token_batch(), task_types=[0, 0, 0])
    result = metrics(model)
    assert {name.split("/")[1] for name in result} == {"default", "other", "balance_loss"}
    assert result["router/other/layers_0/type_0/weight_group_0"] == pytest.approx(1)


def test_encoder_and_decoder_are_apart():
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    model = loramoe(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM")
    model(**token_batch(), labels=torch.tensor([[5, 6], [5, 6], [1, 2]]), task_types=[0, 0, 0])
    blocks = {name.split("/")[1] for name in metrics(model, layer_groups=1)}
    assert blocks == {"encoder.block_0-1", "decoder.block_0-1", "balance_loss"}


def test_injected_adapters_are_read_too():
    model = inject_adapter_in_model(LoRAMoEConfig(r=2, task_type_names=NAMES), tiny_llama())
    model(**token_batch(), task_types=TYPES)
    assert "router/layers_1/tasks/entropy" in metrics(model)


def test_a_pass_without_active_adapters_gives_nothing():
    model = loramoe()
    with model.disable_adapter():
        model(**token_batch(), task_types=TYPES)
    assert metrics(model) == {}


@pytest.mark.parametrize(
    ("depths", "layer_groups", "expected"),
    [
        (range(24), 3, ["layers_0-7", "layers_8-15", "layers_16-23"]),
        (range(4), 3, ["layers_0", "layers_1", "layers_2-3"]),
        (range(2), 3, ["layers_0", "layers_1"]),
        ([5], 3, ["layers_5"]),
        ([10, 2, 7], 1, ["layers_2-10"]),
    ],
)
def test_blocks_of_depth(depths, layer_groups, expected):
    layers = [f"model.layers.{depth}.mlp.experts.3.{name}" for depth in depths for name in ("up_proj", "down_proj")]
    blocks = layer_blocks(layers, layer_groups)
    assert list(blocks) == expected
    assert sorted(name for names in blocks.values() for name in names) == sorted(layers)


def test_layers_without_a_number_are_a_block():
    assert layer_blocks(["0", "2", "head"], 1) == {"layers_0-2": ["0", "2"], "other_layers": ["head"]}


@pytest.mark.parametrize("layer_groups", [-1, 1.5, True, None])
def test_bad_layer_groups_are_refused(layer_groups):
    with pytest.raises(ValueError, match=f"layer_groups={layer_groups} must be an integer, at least 0"):
        RouterCallback(layer_groups)


def test_nothing_is_computed_where_nothing_is_logged(monkeypatch):
    monkeypatch.setattr("peft_loramoe.training.callback._metrics", lambda *args: pytest.fail("computed"))
    step_end(loramoe(), should_log=False)


def test_metrics_are_handed_over_once():
    model = loramoe()
    model(**token_batch(), task_types=TYPES)
    callback = step_end(model)
    assert callback.take() and not callback.take()


def test_a_step_is_read_once():
    """At the end of an epoch a logged step is not logged again.

    What would be computed there would end in the next log.
    """
    model = loramoe()
    model(**token_batch(), task_types=TYPES)
    callback = step_end(model)
    callback.take()
    callback.on_epoch_end(
        SimpleNamespace(device=torch.device("cpu")),
        SimpleNamespace(global_step=1),
        SimpleNamespace(should_log=True),
        model=model,
    )
    assert not callback.take()


def test_reading_leaves_the_training_as_it_is(tmp_path):
    plain, logged = trainer(tmp_path, callbacks=[]), trainer(tmp_path)
    for one in (plain, logged):
        one.train()
    for a, b in zip(plain.model.parameters(), logged.model.parameters()):
        assert torch.equal(a, b)


def test_trainer_logs_the_metrics_with_its_own(tmp_path):
    trained = trainer(tmp_path, gradient_accumulation_steps=2)
    trained.train()
    of_training, elsewhere = router_logs(trained)
    assert list(of_training) == [2, 4] and not elsewhere
    blocks, kinds = ("layers_0", "layers_1"), ("entropy", "weight_facts", "weight_tasks", "load_min", "load_max")
    expected = {f"router/{block}/{name}/{kind}" for block in blocks for name in NAMES for kind in kinds}
    expected |= {f"router/{block}/balance_term" for block in blocks} | {"router/balance_loss"}
    assert of_training[2] == of_training[4] == expected


def test_the_metrics_are_of_the_last_micro_batch(tmp_path):
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen[state.global_step] = balance_loss(model).item()

    trained = trainer(tmp_path, callbacks=[Keep(), RouterCallback()], gradient_accumulation_steps=2, logging_steps=1)
    trained.train()
    logged = {log["step"]: log["router/balance_loss"] for log in trained.state.log_history if "loss" in log}
    assert logged == seen and len(set(seen.values())) == 4


def test_tensorboard_gets_tags_and_values(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained = trainer(tmp_path, report_to="tensorboard")
    trained.train()
    (file,) = Path(tmp_path).rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/router/")]
    history = {log["step"]: log for log in trained.state.log_history if "loss" in log}
    assert len(tags) == 23
    for tag in tags:
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx({step: log[tag.removeprefix("train/")] for step, log in history.items()})


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_logs_carry_no_metrics(strategy, tmp_path):
    trained = trainer(tmp_path, eval_strategy=strategy, logging_strategy=strategy, eval_steps=2, logging_steps=2)
    trained.train()
    trained.evaluate()
    of_training, elsewhere = router_logs(trained)
    assert list(of_training) == [2, 4] and all(of_training.values()) and not elsewhere


def test_the_last_training_pass_is_gone_after_an_evaluation(tmp_path):
    trained = trainer(tmp_path, eval_strategy="steps", eval_steps=2, logging_strategy="epoch")
    trained.train()
    of_training, elsewhere = router_logs(trained)
    assert of_training == {2: set(), 4: set()} and not elsewhere


def test_an_evaluation_between_step_and_log_takes_nothing(tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.evaluate()

    callback = Evaluate()
    callback.trainer = trainer(tmp_path, callbacks=[RouterCallback(), callback])
    callback.trainer.train()
    assert not router_logs(callback.trainer)[1]


def test_a_trainer_without_the_mixin_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"class MyTrainer\(LoRAMoETrainerMixin, SFTTrainer\)"):
        trainer(tmp_path, trainer_class=Trainer).train()


def test_a_model_without_routers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        trainer(tmp_path, model=tiny_llama()).train()


def test_trl_logs_the_metrics_too(tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

    class RouterSFTTrainer(LoRAMoETrainerMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_list([{"text": f"w{i + 2} w{i + 3} w{i + 4}", "task_type": i % 2} for i in range(8)])
    arguments = trl.SFTConfig(
        tmp_path, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True, bf16=False,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trained = RouterSFTTrainer(
        loramoe(task_type_names=NAMES), arguments, train_dataset=data, eval_dataset=data, callbacks=[RouterCallback()],
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trained.train()
    of_training, elsewhere = router_logs(trained)
    assert list(of_training) == [1, 2] and not elsewhere
    assert "router/layers_1/tasks/load_max" in of_training[1]


def part_of(rank):
    """Process 0 has no sample of type 1, process 1 none of unknown type and more rows."""
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    return {name: value[part] for name, value in token_batch(rows=5).items()}, SAMPLE_TYPES[part]


def run_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = loramoe()
    batch, types = part_of(rank)
    model(**batch, task_types=types)
    torch.save((metrics(model), balance_loss(model).item()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_metrics_describe_the_samples_of_all_processes(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    calls = [f"import test_callback as t; t.run_process({rank}, {str(tmp_path)!r})" for rank in (0, 1)]
    started = [
        subprocess.Popen([sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": paths}) for call in calls
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    (first, loss_0), (second, loss_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    model = loramoe()
    model(**token_batch(rows=5), task_types=SAMPLE_TYPES)
    expected = metrics(model)
    of_samples = [name for name in expected if name.count("/") == 3]
    assert len(of_samples) == 2 * 3 * 5
    assert {name: first[name] for name in of_samples} == pytest.approx(
        {name: expected[name] for name in of_samples}, rel=1e-5
    )
    assert first["router/balance_loss"] == pytest.approx((loss_0 + loss_1) / 2)
