"""Collective operations between the processes of a training run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes run, connected by `torch.distributed`."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def concatenate_over_processes(tables: list[Tensor]) -> list[Tensor]:
    """Append the rows of the other processes' tables to one's own, in the order of the ranks.

    Differentiable: what a row's owner gets is the sum of the gradients that all processes have for it. With gradients
    that are averaged over the processes afterwards, as DDP does, a function of the result that every process computes
    is so differentiated once.

    Args:
        tables: floating point, shape (rows, columns); the rows may differ between processes, the number of tables and
            their columns not.

    Returns:
        As many tables, with the rows of all processes, on the device of the first.
    """
    device = tables[0].device
    own_rows = torch.tensor([len(table) for table in tables], device=device)
    rows = [torch.empty_like(own_rows) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own_rows)
    columns = [table.shape[1] for table in tables]
    sizes = [[r * c for r, c in zip(of_rank.tolist(), columns)] for of_rank in rows]
    flat = torch.cat([table.to(device).flatten() for table in tables])
    padding = max(map(sum, sizes)) - len(flat)
    gathered = _AllGather.apply(torch.nn.functional.pad(flat, (0, padding)))
    parts = [of_rank[: sum(size)].split(size) for of_rank, size in zip(gathered, sizes)]
    return [torch.cat([part.view(-1, c) for part in column]) for column, c in zip(zip(*parts), columns)]


class _AllGather(torch.autograd.Function):
    """Vectors of all processes, shape (processes, length); torch's own differentiable `all_gather` is deprecated."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, flat)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
