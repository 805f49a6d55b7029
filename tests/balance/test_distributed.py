import os
import socket
import subprocess
import sys

import pytest

from peft_loramoe.balance.distributed import is_distributed


pytestmark = pytest.mark.version_independent

# The processes have different numbers of rows, one of them none of the second table.
SCRIPT = """
import torch
import torch.distributed as dist
from peft_loramoe.balance.distributed import concatenate_over_processes, is_distributed

dist.init_process_group("gloo")
assert is_distributed()
rank = dist.get_rank()
generator = torch.Generator().manual_seed(0)
data, weight = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for rows in (5, 3))
first, second = [(data[:2], data), (data[2:], data[:0])][rank]


def score(tables):
    return (tables[0].var() / tables[0].mean() ** 2) * tables[1].sin().sum()


own = weight.clone().requires_grad_()
tables = concatenate_over_processes([first @ own, second**2])
assert [tuple(table.shape) for table in tables] == [(5, 3), (5, 3)]
score(tables).backward()
dist.all_reduce(own.grad)  # what DDP does
own.grad /= dist.get_world_size()

whole = weight.clone().requires_grad_()
score([data @ whole, data**2]).backward()
torch.testing.assert_close(tables[1], data**2)
torch.testing.assert_close(own.grad, whole.grad)
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_rows_and_gradients_of_several_processes_are_those_of_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in "01":
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        processes.append(
            subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_one_process_is_not_distributed():
    assert not is_distributed()
