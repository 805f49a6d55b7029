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


# A process ends, or stops for ever, between the steps of the others.
LOST = """
import os, signal, sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tiny import labelled, loramoe, token_batch

dist.init_process_group("gloo", timeout=timedelta(seconds=5))
model = DistributedDataParallel(loramoe(balance_loss_weight=0.1, balance_across_processes=True))
for step in range(3):
    if step == 1 and dist.get_rank() == 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    try:
        model(**labelled(token_batch()), task_types=[0, 1, 0]).loss.backward()
    except RuntimeError:  # of the lost connection, or of the time limit
        os._exit(7)
"""


def start(script, *arguments):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env={**common, "RANK": rank}, **pipes) for rank in "01"]


@pytest.mark.distributed
def test_rows_and_gradients_of_several_processes_are_those_of_one():
    for process in start(SCRIPT):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_ends_the_others_within_the_time_limit(kind):
    survivor, lost = start(LOST, kind)
    try:
        _, errors = survivor.communicate(timeout=120)  # gloo's own limit is half an hour
    finally:
        survivor.kill()
        lost.kill()
        lost.communicate()
    assert survivor.returncode == 7, errors


def test_one_process_is_not_distributed():
    assert not is_distributed()
