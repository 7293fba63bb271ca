"""Time, memory, and what repeated measurements amount to."""

import gc
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.profiler import profile


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of repeated measurements."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of values[i] / base[i]: measured in one round, both have met the same disturbances."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def turn(count: int, number: int) -> list[int]:
    """The order of ``count`` entries in round ``number``.

    It rotates: in ``count`` rounds each entry has each place once. What precedes an entry changes too, so that what one
    leaves behind (caches, clocks, the allocator) does not always meet the same other. It is a Williams design (1949):
    in ``count`` rounds if that is even, else in twice as many, every entry follows every other one equally often.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    if number // count % 2:
        zigzag.reverse()
    return [(number + place) % count for place in zigzag]


class Stopwatch:
    """Times what the device does between marks; the host waits for the device only when the laps are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def lead(self, work: Callable[[], object]) -> None:
        """Give a GPU the work that is about to be timed once without timing it; on a CPU do nothing.

        The host is then as far ahead of the GPU as it is in a loop of such work, where an idle GPU would wait for it.
        """
        if self.device.type == "cuda":
            work()

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(perf_counter())

    def laps(self) -> list[float]:
        """Seconds between the marks since the last call."""
        if self.device.type == "cuda":
            self._events[-1].synchronize()
            laps = [a.elapsed_time(b) / 1000 for a, b in pairwise(self._events)]
        else:
            laps = [b - a for a, b in pairwise(self._times)]
        self._events, self._times = [], []
        return laps


def peak_memory(device: torch.device, work: Callable[[], None]) -> int:
    """The most bytes that tensors made by ``work`` occupy at once, as the device's allocator counts them.

    A CPU's allocator keeps no such count, so its allocations and releases are added up from torch's profiler. What
    libraries allocate by themselves (scratch space of oneDNN) is not in it, nor are Python and torch.
    """
    gc.collect()
    if device.type == "cuda":
        work()  # what cuBLAS and others allocate once and keep is no part of this work
        gc.collect()  # what the first run has left in reference cycles
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes a line as it starts and as it stops
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))
