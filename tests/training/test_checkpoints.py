import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft_loramoe.training import last_complete_checkpoint
from tiny import labelled, loramoe, tiny_llama, token_batch


STEPS = 40  # of the run that is killed; ten epochs

# accelerate 1.10 forgets the epoch when it skips batches, so the rest of it is shuffled as the first one was.
resumes_in_later_epochs = pytest.mark.skipif(
    "iteration" not in inspect.getsource(skip_first_batches),
    reason="this accelerate resumes a later epoch with other samples",
)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def train(output_dir, steps, stop_at=None, resume=None, **options):
    """Train on 16 samples in steps of two micro-batches of two: four steps are an epoch."""
    batch = labelled(token_batch(rows=16, width=18))
    rows = [{name: value[i] for name, value in batch.items()} | {"task_types": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        output_dir, **{
            "max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "remove_unused_columns": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
            "disable_tqdm": True, **options,
        },
    )  # fmt: skip
    model = loramoe(tiny_llama(attention_dropout=0.1), lora_dropout=0.2)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[StopAt(stop_at)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer):
    """Losses of all steps, and the adapter's tensors."""
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(run, reference):
    (losses, tensors), (expected_losses, expected_tensors) = outcome(run), outcome(reference)
    assert losses == expected_losses
    assert [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])] == []


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Output folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, steps=2, save_strategy="steps", save_steps=1)
    return folder


@pytest.fixture
def run(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def in_order_of_writing(checkpoint):
    return sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)


def assert_torn(run, fault):
    with pytest.warns(UserWarning, match=rf"Skipped checkpoint {run}/checkpoint-2: {fault}"):
        assert last_complete_checkpoint(run) == str(run / "checkpoint-1")
    assert get_last_checkpoint(run) == str(run / "checkpoint-2")


def assert_complete(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_the_newest_of_complete_checkpoints(run):
    assert_complete(run)


def test_steps_are_compared_as_numbers(run):
    for name in ("checkpoint-1", "checkpoint-2"):
        (run / name).rename(run / name.replace("-", "-1"))
        state = run / name.replace("-", "-1") / "trainer_state.json"
        state.write_text(json.dumps({"global_step": int(name.replace("checkpoint-", "1"))}))
    shutil.copytree(run / "checkpoint-11", run / "checkpoint-9")
    (run / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}')
    assert last_complete_checkpoint(run) == str(run / "checkpoint-12")


def test_the_trainer_writes_its_state_last(written):
    names = [path.name for path in in_order_of_writing(written / "checkpoint-2")]
    assert names[-1] == "trainer_state.json"
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(names)


def test_a_checkpoint_that_was_cut_off_anywhere_is_torn(written, tmp_path):
    """All states that a kill can leave: the first files whole, the next one not begun, empty, begun or nearly done."""
    files = in_order_of_writing(written / "checkpoint-2")
    shutil.copytree(written / "checkpoint-1", tmp_path / "checkpoint-1")
    torn = tmp_path / "checkpoint-2"
    for done in range(len(files)):
        content = files[done].read_bytes()
        for size in (None, 0, 1, 10, len(content) // 2, len(content) - 2):
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir()
            for path in files[:done]:
                shutil.copy(path, torn)
            if size is not None:
                (torn / files[done].name).write_bytes(content[:size])
            with pytest.warns(UserWarning, match="Skipped checkpoint"):
                assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1"), (files[done].name, size)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_damaged_file_beside_a_whole_state(name, run):
    path = run / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:-50])
    assert_torn(run, f"{name} is cut off")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("adapter_model.safetensors", "checkpoint-2 has an adapter_config.json but no weights"),
        ("optimizer.pt", "it has no optimizer state"),
        ("scheduler.pt", "scheduler.pt is not there"),
        ("rng_state.pth", "rng_state.pth is not there"),
        ("trainer_state.json", "trainer_state.json, which is written last, is not there"),
    ],
)
def test_a_missing_file(name, fault, run):
    (run / "checkpoint-2" / name).unlink()
    assert_torn(run, fault)


def test_a_checkpoint_without_weights(run):
    (run / "checkpoint-2" / "adapter_model.safetensors").unlink()
    (run / "checkpoint-2" / "adapter_config.json").unlink()
    assert_torn(run, "it has no weights")


def test_a_state_of_another_step(run):
    shutil.copy(run / "checkpoint-1" / "trainer_state.json", run / "checkpoint-2")
    assert_torn(run, "trainer_state.json is not of step 2")


def test_checkpoints_of_the_model_only(run):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-2" / name).unlink()
    assert_complete(run)


def with_processes(run, ranks):
    for rank in ranks:
        shutil.copy(run / "checkpoint-2" / "rng_state.pth", run / "checkpoint-2" / f"rng_state_{rank}.pth")
    (run / "checkpoint-2" / "rng_state.pth").unlink()


def test_random_states_of_several_processes(run):
    with_processes(run, [0, 1, 2])
    assert_complete(run)


@pytest.mark.parametrize(("ranks", "missing"), [([0], 1), ([0, 2], 1), ([1], 0)])
def test_a_process_that_has_not_written_yet(ranks, missing, run):
    with_processes(run, ranks)
    assert_torn(run, f"rng_state_{missing}.pth is not there")


def test_the_number_of_processes_can_be_told(run):
    with_processes(run, [0, 1])
    shutil.rmtree(run / "checkpoint-1")
    with pytest.warns(UserWarning, match="rng_state_2.pth is not there"):
        assert last_complete_checkpoint(run, num_processes=3) is None
    assert last_complete_checkpoint(run, num_processes=2) == str(run / "checkpoint-2")


@pytest.mark.parametrize("num_processes", [0, -1, 2.0])
def test_a_bad_number_of_processes_is_refused(num_processes, tmp_path):
    with pytest.raises(ValueError, match=f"num_processes={num_processes} must be a positive integer, or None"):
        last_complete_checkpoint(tmp_path, num_processes)


def as_fsdp(run):
    checkpoint = run / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (checkpoint / name).mkdir()
        (checkpoint / name / "__0_0.distcp").write_bytes(b"shard")
        (checkpoint / name / ".metadata").write_bytes(b"metadata")


def test_sharded_checkpoints_of_fsdp(run):
    as_fsdp(run)
    assert_complete(run)


def test_shards_without_their_metadata(run):
    as_fsdp(run)
    (run / "checkpoint-2" / "optimizer_0" / ".metadata").unlink()
    assert_torn(run, "optimizer_0 has shards but no .metadata")


def as_deepspeed(run, legacy=True):
    """DeepSpeed writes torch's older format unless told otherwise, and keeps the scheduler in its own files."""
    checkpoint = run / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "scheduler.pt").unlink()
    (checkpoint / "global_step2").mkdir()
    shard = checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"state": torch.ones(4)}, shard, _use_new_zipfile_serialization=not legacy)
    (checkpoint / "latest").write_text("global_step2")
    return shard


@pytest.mark.parametrize("legacy", [True, False])
def test_checkpoints_of_deepspeed(legacy, run):
    as_deepspeed(run, legacy)
    assert_complete(run)


def test_a_shard_of_deepspeed_that_is_cut_off(run):
    shard = as_deepspeed(run, legacy=False)
    shard.write_bytes(shard.read_bytes()[:100])
    assert_torn(run, f"global_step2/{shard.name} is cut off")


def test_a_folder_of_deepspeed_that_is_not_there(run):
    shutil.rmtree(as_deepspeed(run).parent)
    assert_torn(run, "'latest' names the folder 'global_step2', which is not there")


def test_an_adapter_in_a_folder_of_its_own(run):
    model = loramoe()
    model.add_adapter("other", model.peft_config["default"])
    model.save_pretrained(run / "checkpoint-2")
    assert_complete(run)
    (run / "checkpoint-2" / "other" / "adapter_model.safetensors").unlink()
    assert_torn(run, "checkpoint-2/other has an adapter_config.json but no weights")


def test_no_checkpoints(tmp_path):
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("stop_at", [3, 4, pytest.param(6, marks=resumes_in_later_epochs)])  # epochs have four steps
def test_a_resumed_run_ends_as_the_uninterrupted_one(stop_at, tmp_path):
    reference = train(tmp_path / "reference", steps=10)
    train(tmp_path / "run", steps=10, stop_at=stop_at, save_strategy="steps", save_steps=stop_at)
    checkpoint = last_complete_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / f"checkpoint-{stop_at}")
    assert_same(train(tmp_path / "run", steps=10, resume=checkpoint), reference)


def run_to_the_end(output_dir):
    """What the killed process runs, and what resumes it."""
    torch.set_num_threads(1)
    options = dict(save_strategy="steps", save_steps=1, save_total_limit=3)
    return train(output_dir, STEPS, resume=last_complete_checkpoint(output_dir), **options)


@pytest.mark.slow
@resumes_in_later_epochs
def test_a_killed_run_is_resumed_to_the_same_end(tmp_path):
    reference = train(tmp_path / "reference", STEPS)
    chance, run = random.Random(7), tmp_path / "run"
    call = f"import test_checkpoints as t; t.run_to_the_end({str(run)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for _ in range(2):
        begun = set(run.glob("checkpoint-*"))
        process = subprocess.Popen([sys.executable, "-c", call], env=environment)
        while not set(run.glob("checkpoint-*")) - begun:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()  # SIGKILL
        assert process.wait() == -9
    assert_same(run_to_the_end(run), reference)


def answer(run):
    """The step of the checkpoint that is taken; nothing may raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = last_complete_checkpoint(run)
    return None if found is None else int(found.rpartition("-")[2])


def header_of(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_flipped_bits_of_a_safetensors_header_are_skipped_or_taken(run):
    path = run / "checkpoint-2" / "adapter_model.safetensors"
    whole, answers = path.read_bytes(), []
    for position in [*range(8), *range(8, header_of(path), 17)]:
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            answers.append(answer(run))
    assert set(answers) == {1, 2}  # a bit of a tensor's name is not noticed
    assert answers[: 8 * 8] == [1] * 64  # one of the header's length is


HEADERS = [b"[]", b"null", b'"a"', b"{}", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": [0]}}', b"[" * 100_000,
           b'{"a": {"data_offsets": ["x", "y"], "dtype": "F32", "shape": []}}',
           b'{"a": {"data_offsets": [0, 4], "shape": [1]}}',
           b'{"a": {"data_offsets": [0, 4], "dtype": null, "shape": [1]}}', b"\xff\xfe", b""]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header[:60]))
def test_a_strange_safetensors_header(header, run):
    path = run / "checkpoint-2" / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert answer(run) == 1


STRANGE = {
    "an empty adapter_config.json": ("adapter_config.json", b""),
    "an adapter_config.json that is a list": ("adapter_config.json", b"[]"),
    "a deeply nested adapter_config.json": ("adapter_config.json", b"[" * 200_000),
    "an undecodable adapter_config.json": ("adapter_config.json", b"\xff\xfe\x00"),
    "a deeply nested trainer_state.json": ("trainer_state.json", b'{"a":' * 200_000),
    "an undecodable trainer_state.json": ("trainer_state.json", b"\xff\xfe\x00"),
    "a trainer_state.json that is a number": ("trainer_state.json", b"2"),
    "an undecodable latest": ("latest", b"\xff\xfe\x00"),
    "an empty latest": ("latest", b""),
    "a latest that names a file": ("latest", b"optimizer.pt"),
    "a latest that names the folder above": ("latest", b".."),
    "a latest with a null byte": ("latest", b"a\0b"),
    "an empty optimizer": ("optimizer.pt", b""),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_content(kind, run):
    name, content = STRANGE[kind]
    (run / "checkpoint-2" / name).write_bytes(content)
    assert answer(run) == 1


@pytest.mark.parametrize("name", ["latest", "trainer_state.json", "adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_in_the_place_of_a_file(name, run):
    path = run / "checkpoint-2" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    assert answer(run) == 1


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_config.json", "optimizer.pt"])
def test_links_that_lead_nowhere_or_in_a_circle(name, run):
    path = run / "checkpoint-2" / name
    path.unlink()
    path.symlink_to(path)
    assert answer(run) == 1


def test_what_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").touch()
    assert answer(tmp_path / "file") is None and answer(tmp_path / "nul\0l") is None
    (tmp_path / f"checkpoint-{'9' * 200}").mkdir()
    assert answer(tmp_path) is None


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_damage_never_raises(written, tmp_path_factory, data):
    run = tmp_path_factory.getbasetemp() / "random-damage"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(written, run)
    files = sorted(path for path in (run / "checkpoint-2").iterdir() if path.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, max(len(content) - 1, 0)), label="start")
    content[start : start + data.draw(st.integers(0, 40), label="length")] = data.draw(
        st.binary(max_size=40), label="new"
    )
    path.write_bytes(content)
    assert answer(run) in (1, 2)
