"""Time two ways of doing the same thing, paired, so that drift affects both alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TRIES = 3  # of a repetition that something disturbs


@dataclass(frozen=True)
class Timing:
    """Summarize wall times in seconds: the median, and the quartiles as the spread."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class PairedTiming:
    """Hold both timings and the speedup, the median of the ratios of each pair."""

    baseline: Timing
    candidate: Timing
    speedup: Timing


def measure_pairs(
    baseline: Callable[[int], None], candidate: Callable[[int], None], repetitions: int
) -> PairedTiming:
    """Call both ``repetitions`` times with the repetition's number, taking turns at going first.

    Both must be warm. Pending GPU work is included.
    """
    return measure_turns(baseline, [candidate], repetitions)[0]


def measure_turns(
    baseline: Callable[[int], None],
    candidates: Sequence[Callable[[int], None]],
    repetitions: int,
    disturbances: Callable[[], int] = lambda: 0,
) -> list[PairedTiming]:
    """Call all in turns, ``repetitions`` times; return how each candidate compares in its pairs.

    Each repetition begins with the next one. Where ``disturbances`` has counted something during a
    repetition (a compilation, say), it is timed again, up to ``TRIES`` times.
    """
    calls = [baseline, *candidates]
    samples: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions):
        for index, seconds in _turn(calls, repetition, disturbances).items():
            samples[index].append(seconds)
    slow, *others = samples
    return [
        PairedTiming(summarize(slow), summarize(fast), summarize(_ratios(slow, fast)))
        for fast in others
    ]


def _turn(
    calls: Sequence[Callable[[int], None]], repetition: int, disturbances: Callable[[], int]
) -> dict[int, float]:
    """Return the seconds of each call, begun with another one in each repetition."""
    order = [(repetition + place) % len(calls) for place in range(len(calls))]
    found: dict[int, float] = {}
    for _ in range(TRIES):
        before = disturbances()
        found = {index: _seconds(calls[index], repetition) for index in order}
        if disturbances() == before:
            break
    return found


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(slow, fast, strict=True)]


def summarize(samples: Sequence[float]) -> Timing:
    """Return median and quartiles of ``samples``."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], tuple(samples))
    lower, middle, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, lower, upper, tuple(samples))


def _seconds(work: Callable[[int], None], repetition: int) -> float:
    began = time.perf_counter()
    work(repetition)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def device_name() -> str:
    """Return the name of the device that is timed."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
