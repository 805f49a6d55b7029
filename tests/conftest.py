import gc
import os
import sys

import pytest
import torch
from accelerate.state import AcceleratorState


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
torch.set_num_threads(1)  # the models are tiny; the workers share the cores
DEVICE = os.environ.get("PEFT_LORAMOE_TEST_DEVICE", "cuda")  # of test_cuda.py; on cpu it is rehearsed


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") and not (DEVICE == "cpu" and item.path.name == "test_cuda.py"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    # Trainer calls gc.collect() after each training. It need not walk through all imported modules again.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or libraries report at the end that they leak


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="module", params=["small", "large"])
def input_size(request):
    """The inputs of tests are small; this has them computed as small ones are, and as large ones."""
    from tiny import computed_as  # here: only now is the hub out of reach

    with computed_as(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_settings_of_the_test_before():
    """TrainingArguments leaves settings.

    (bf16, torch_compile) in the environment, and accelerate keeps them for the process. So does dynamo keep what it
    compiled: after eight models of a class it leaves the ninth as it is.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
