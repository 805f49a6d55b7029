"""Several processes on gloo under the engines that Trainer knows, with the settings in examples/accelerate.

Each engine is launched once, for all cases of `distributed_run.py`; the same training in this process is the
reference.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_loramoe
from distributed_run import CASES, RESUMED, STEPS, train
from tiny import labelled, tiny_llama, token_batch


TESTS = Path(__file__).parent
SETTINGS = TESTS.parent / "examples" / "accelerate"
PROCESSES = 2
# settings -> class of the wrapped model, without which accelerate has fallen back to something else
ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp2_qlora": "FSDPPeftModelForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
# transformers 4 cannot resume on the CPU, bitsandbytes 0.49 cannot save what FSDP2 divided.
RECENT = int(transformers.__version__.split(".")[0]) >= 5
FLOAT32 = [
    case for case in CASES if case != "bfloat16" and (RECENT or case not in (*RESUMED, "mixin, anchors, quantised"))
]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def launch(settings: str, folder: Path, cases: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SETTINGS / f"{settings}.yaml"]
    command += ["--num_processes", PROCESSES, "--main_process_port", port]
    command += [TESTS / "distributed_run.py", folder, *cases]
    paths = [str(TESTS), str(Path(peft_loramoe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"


@pytest.fixture(scope="module", params=ENGINES)
def run(request, tmp_path_factory) -> tuple[str, Path]:
    """Name of an engine, and the folder with what it left for each case."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's: pip install -e '.[deepspeed]'")
        if not RECENT:
            pytest.skip("DeepSpeed with the learning-rate schedules of torch 2.13 needs transformers 5")
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # pytest's workers share one launch
    folder = root / f"distributed-{request.param}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            tiny_llama().save_pretrained(folder / "backbone")
            launch(request.param, folder, [*FLOAT32, "bfloat16"])
            (folder / "done").touch()
    return request.param, folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Adapter file and results of a case, trained in this process."""
    folder, done = tmp_path_factory.mktemp("reference"), {}
    tiny_llama().save_pretrained(folder / "backbone")

    def trained(case: str) -> tuple[Path, dict]:
        if case not in done:
            # Terms of single processes are what accumulation over as many batches adds up; "resumed" goes on with the
            # same.
            common = CASES[case][0].get("balance_across_processes", False)
            name = {"resumed": "own term", "wrapped layers": "common term"}.get(case, case)
            done[case] = (folder / case, train(name, folder, folder / case, batches=1 if common else PROCESSES))
        return done[case]

    return trained


def processes(run, case: str) -> list[dict]:
    return [json.loads((run[1] / case / f"process-{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", FLOAT32)
def test_trains_as_one_process(run, reference, case):
    folder, alone = reference(case)
    expected, actual = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(run[1] / case / "adapter_model.safetensors"),
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023
    for seen in processes(run, case):
        assert seen["losses"][-STEPS:] == pytest.approx(alone["losses"], rel=1e-4)


def test_engine_is_the_one_asked_for(run):
    assert [seen["engine"] for seen in processes(run, "own term")] == [ENGINES[run[0]]] * PROCESSES


def test_routers_learn_at_the_rate_of_the_configuration(run):
    for seen in processes(run, "mixin"):
        assert seen["rates"]["router"] == pytest.approx(10 * seen["rates"]["experts"])


def test_rates_of_lora_plus(run):
    for seen in processes(run, "mixin, LoRA+"):
        assert seen["rates"] == pytest.approx({"A": 1e-2, "B": 2e-2, "router": 3e-2})


def test_anchors_leave_the_gradient_of_the_tasks_bit_equal(run):
    plain, anchored = (
        load_file(run[1] / case / "adapter_model.safetensors") for case in ("no term", "mixin, light anchors")
    )
    torch.testing.assert_close(anchored, plain, atol=0, rtol=0)
    losses = [[seen["losses"] for seen in processes(run, case)] for case in ("no term", "mixin, light anchors")]
    assert losses[0] == losses[1]


def test_each_process_sees_its_own_samples(run, reference):
    _, alone = reference("common term")  # the whole step
    seen = processes(run, "common term")
    for what in ("token_counts", "task_types"):
        assert [value for one in seen for value in one[what]] == alone[what]


def test_own_terms_differ_and_the_common_term_does_not(run, reference):
    own, common = ([one["balance"] for one in processes(run, case)] for case in ("own term", "common term"))
    assert abs(own[0] - own[1]) > 1e-3
    assert common == pytest.approx([reference("common term")[1]["balance"]] * PROCESSES, rel=1e-5)


def test_saved_adapter_loads(run, reference):
    batch, logits = labelled(token_batch()), []
    for adapter in (run[1] / "own term", reference("own term")[0]):
        model = AutoModelForCausalLM.from_pretrained(run[1] / "backbone", dtype=torch.float32)
        logits.append(PeftModel.from_pretrained(model, adapter).eval()(**batch).logits.detach())
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_trains_in_the_precision_of_the_settings(run, reference):
    _, alone = reference("own term")
    for seen in processes(run, "bfloat16"):
        assert seen["losses"] == pytest.approx(alone["losses"], rel=0.01)
        assert seen["losses"] != pytest.approx(alone["losses"], rel=1e-6)
    adapter = load_file(run[1] / "bfloat16" / "adapter_model.safetensors")
    assert adapter.keys() == load_file(run[1] / "own term" / "adapter_model.safetensors").keys()
    assert all(tensor.isfinite().all() for tensor in adapter.values())
