"""Record how a plan came to be: what it was searched for, and what was measured of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ditfastattn.core.records import Record


class PlannedTarget(Record, frozen=True):
    """Record what a plan was searched for; ``model`` names the one that measures a CLIP score."""

    name: str
    bound: float
    at_least: bool
    model: str = ""


class Measured(Record, frozen=True):
    """Record what prompts measured: one value per image, ``worst`` in the target's sense."""

    prompts: int
    mean: float
    worst: float


SearchMethod = Literal["global", "per-step", "greedy", "retarget", "manual", "whole-steps", "joint"]


class Tried(Record, frozen=True):
    """Record a kind of plan that a search tried, and why it was kept or passed over."""

    what: str
    outcome: str
    predicted_speedup: float | None = None


class Calibration(Record, frozen=True):
    """Record how a plan came to be.

    ``strength`` is what the method's search varied: the threshold of ``greedy`` (the paper's
    delta), the budget of relative squared error per step of ``per-step``, the budget of drift of
    the final image of ``global``. ``batch`` is the batch size of a call; ``forwards`` counts whole
    evaluations of the model. ``predicted_speedup`` comes from the measured latency of each strategy
    alone, on ``device``; ``measured_speedup`` and ``measured_seconds`` (per generation) from the
    compiled plan, paired with the compiled dense model, where a speed was the target.
    ``cache_bytes`` is the most that caches take at any time, at a batch of ``batch``. ``tried``
    says what a search of several kinds of plans chose from.
    """

    method: SearchMethod
    target: PlannedTarget | None = None
    strength: float = 0.0
    seed: int | None = None
    batch: int = 0
    cache_bytes: int = 0
    calibrated: Measured | None = None
    held_out: Measured | None = None
    predicted_speedup: float | None = None
    measured_speedup: float | None = None
    measured_seconds: float | None = None
    device: str = ""
    rounds: int = 0
    forwards: float = 0.0
    seconds: float = 0.0
    tried: tuple[Tried, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
