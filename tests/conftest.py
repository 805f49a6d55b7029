import os

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
torch.set_num_threads(1)  # the models are tiny; the workers share the cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
