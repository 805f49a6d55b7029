"""How everything here is measured: interleaved rounds, memory, bytes that autograd keeps for the backward pass."""

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print two lines for every use
QUANTILES = (0.2, 0.5, 0.8)
# A timing shorter than this says more about the clock than about the code; short steps are repeated. On CUDA the first
# step of a timing waits for the host, which is ahead of the device from then on, as in training.
SHORTEST = {"cpu": 5e-3, "cuda": 2e-2}
# More than any L2 cache; on CUDA it is overwritten before each timing, as in triton.testing.do_bench.
FLUSH_BYTES = 256 * 2**20


@dataclass
class Times:
    """Seconds of one call, one entry for each round: by the device's clock and by the process's CPU clock."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Timer:
    """Times calls on one device: CUDA events with the L2 cache flushed before, or the wall clock.

    Args:
        device: where the timed calls compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, step: Callable[[], Any], repeat: int = 1) -> tuple[float, float]:
        """Call `step` `repeat` times; return the seconds and the CPU seconds (of all threads) of one call."""
        if self.flush is None:
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                step()
            return (time.perf_counter() - start) / repeat, (time.process_time() - cpu_start) / repeat
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        cpu_start = time.process_time()
        for _ in range(repeat):
            step()
        cpu = time.process_time() - cpu_start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat, cpu / repeat


def interleave(steps: Mapping[str, Callable[[], Any]], timer: Timer, rounds: int, shortest: float) -> dict[str, Times]:
    """Time every step once in every round, in an order that is drawn anew for each round.

    What disturbs the machine disturbs the steps of a round alike, so the median over the rounds of the ratio of two
    steps is steady where their times are not.

    Args:
        steps: name -> what to time, warmed up.
        timer: times a call.
        rounds: number of rounds.
        shortest: seconds of the shortest step; all steps are repeated alike until it is measurable.

    Returns:
        Name -> times.
    """
    repeat = max(1, min(100, math.ceil(SHORTEST[timer.device.type] / shortest)))
    times = {name: Times() for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                wall, cpu = timer(steps[name], repeat)
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    finally:
        gc.enable()
    return times


def quantiles(values: Iterable[float]) -> list[float]:
    """The 20, 50 and 80 % quantiles."""
    return torch.quantile(torch.tensor(list(values), dtype=torch.float64), torch.tensor(QUANTILES).double()).tolist()


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between `forward` and its backward pass.

    Each storage counts once and in full, however many nodes or views keep it. What custom autograd functions pass to
    `save_for_backward` is seen, what they hide in attributes of `ctx` is not.

    Args:
        forward: runs the forward pass, with gradient enabled.
        parameters: tensors that exist anyway (parameters, buffers) and do not count.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were allocated at one time during `step`, over what was allocated before it.

    On CUDA the caching allocator's own count. On the CPU the sum of what PyTorch's allocator reports to the profiler;
    scratch memory that the matrix libraries allocate themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
