"""Time two ways of doing the same thing, paired, so that drift hits both alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


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

    Both must be warm. GPU work is waited for.
    """
    first: list[float] = []
    second: list[float] = []
    for repetition in range(repetitions):
        if repetition % 2:
            second.append(_seconds(candidate, repetition))
            first.append(_seconds(baseline, repetition))
        else:
            first.append(_seconds(baseline, repetition))
            second.append(_seconds(candidate, repetition))
    ratios = [slow / fast for slow, fast in zip(first, second, strict=True)]
    return PairedTiming(summarize(first), summarize(second), summarize(ratios))


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
    """Name the device that times are taken on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
