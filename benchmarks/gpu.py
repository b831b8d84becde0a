"""What is measured on a GPU alone: time on the device, host time of queueing, kernels of a call, peak memory."""

from __future__ import annotations

import functools
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from harness import Call, Sampler, call_statement
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Calls whose device time is taken together: their middle is finer than the clock of the events.
CALLS = 12
# Kernels queued at most while host time is taken: CUDA makes the host wait at about a thousand.
QUEUED = 400


@functools.cache
def _flush_memory(device: int) -> torch.Tensor:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(4 * cache, 256 * 2**20), dtype=torch.uint8, device=f"cuda:{device}")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _device_seconds(work: Callable[[], Any]) -> float:
    start, end = _event(), _event()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def _host_seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def middle_mean(samples: list[float]) -> float:
    """The mean without the lowest and the highest quarter."""
    quarter = len(samples) // 4
    return statistics.fmean(sorted(samples)[quarter : len(samples) - quarter])


def cold_l2(call: Call) -> Sampler:
    """Time on the device, from CUDA's events around a call. Before it the L2 cache is overwritten, as
    triton.testing.do_bench does it, often enough for the host to queue the call meanwhile: host time does not count."""
    memory = _flush_memory(torch.cuda.current_device())

    def run() -> None:
        call.function(*call.args)

    for _ in range(3):  # compiles, loads kernels, fills the allocator's cache
        run()
    memory.zero_()
    flush = _device_seconds(memory.zero_)
    flushes = 1 + int(2 * statistics.median(_host_seconds(run) for _ in range(5)) / flush)

    def sample() -> float:
        events = [(_event(), _event()) for _ in range(CALLS)]
        for start, end in events:
            for _ in range(flushes):
                memory.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return middle_mean([start.elapsed_time(end) for start, end in events]) * 1e-3 / call.layers

    return sample


def queueing(call: Call) -> Sampler:
    """Host time: what it takes to queue the call's work, which nothing waits for and which never fills the queue."""
    timer = timeit.Timer(**call_statement(call))
    number = max(1, QUEUED // (2 * call.layers))
    timer.timeit(3)

    def sample() -> float:
        torch.cuda.synchronize()
        return timer.timeit(number) / number / call.layers

    return sample


def kernels(call: Call) -> list[str]:
    """The names of the kernels that a call runs, in order; none where the profiler cannot see any (CUPTI)."""
    call.function(*call.args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call.function(*call.args)
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


def peak_bytes(work: Callable[[], Any]) -> int:
    """Memory that the work has at its peak, over what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
