"""What a sampler does between calls of the model, as numbers: sums that any program can compute.

Latents, outputs and clipped estimates are numbered by step. A term ``(ago, factor)`` stands for
``factor`` times the one of ``ago`` steps before, 0 for this step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import FiniteFloat

from ditfastattn.core.records import Record
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.specs import Natural

Terms = tuple[tuple[Natural, FiniteFloat], ...]


class Clip(Record, frozen=True):
    """Describe what a step clips, as a sum of latents and outputs, and between which bounds."""

    latents: Terms
    outputs: Terms
    low: FiniteFloat
    high: FiniteFloat


class LinearStep(Record, frozen=True):
    """Describe how one step computes the next latents: as a sum of terms.

    Attributes:
        timestep: of the scheduler, or, in a manifest, what the model is called with.
        input_scale: what the latents are multiplied by for the model.
        latents: terms of the latents; 0 steps ago are the current ones.
        outputs: terms of the guided outputs of the model.
        clipped: terms of the clipped estimates.
        clip: what is clipped in this step, if anything.
    """

    timestep: FiniteFloat
    input_scale: FiniteFloat
    latents: Terms
    outputs: Terms
    clipped: Terms = ()
    clip: Clip | None = None


class LinearSchedule(Record, frozen=True):
    """Hold the steps, and the factor from standard normal noise to the first latents."""

    noise_scale: FiniteFloat
    steps: tuple[LinearStep, ...]


class Stepping(LinearSchedule, frozen=True):
    """Hold the steps, and how the outputs of a call become the guided output.

    Attributes:
        guidance_scale: ``unconditional + guidance_scale * (conditional - unconditional)``.
        channels: how many of an output's channels, its dimension 1, predict; the others, a learned
            variance, are not used. 0 where all do.
    """

    guidance_scale: FiniteFloat
    channels: Natural = 0


class Stepper:
    """Follow the latents of a generation, given the guided output of each step."""

    def __init__(self, schedule: LinearSchedule, noise: Any) -> None:
        """Begin from standard normal ``noise``, a tensor or an array."""
        self._steps = schedule.steps
        self.latents = [noise * schedule.noise_scale]
        self._outputs: list[Any] = []
        self._clipped: list[Any] = []

    @property
    def model_input(self) -> Any:
        """Return the latents as the next step's model takes them, one row per image."""
        return self.latents[-1] * self._steps[len(self._outputs)].input_scale

    def step(self, output: Any) -> Any:
        """Return the next latents."""
        how = self._steps[len(self._outputs)]
        self._outputs.append(output)
        estimate = 0 * output
        if how.clip is not None:
            pairs = (self.latents, how.clip.latents), (self._outputs, how.clip.outputs)
            estimate = weighted_sum(*pairs).clip(how.clip.low, how.clip.high)
        self._clipped.append(estimate)
        pairs = (self.latents, how.latents), (self._outputs, how.outputs)
        self.latents.append(weighted_sum(*pairs, (self._clipped, how.clipped)))
        return self.latents[-1]


def weighted_sum(*parts: tuple[Sequence[Any], Terms]) -> Any:
    """Return the sum of terms, each of its own sequence."""
    return sum(held[-1 - ago] * factor for held, terms in parts for ago, factor in terms)


def guided(output: Any, stepping: Stepping, layout: CfgLayout) -> Any:
    """Return the guided output of a call's ``output``, without a learned variance.

    Those of two calls are one after the other, as halves of a batch are.
    """
    if stepping.channels:
        output = output[:, : stepping.channels]
    if layout is CfgLayout.NONE:
        return output
    first, second = output[: len(output) // 2], output[len(output) // 2 :]
    conditional_first = layout in (CfgLayout.COND_FIRST, CfgLayout.SEPARATE)
    conditional, other = (first, second) if conditional_first else (second, first)
    return other + stepping.guidance_scale * (conditional - other)


def first_noise(latents: Any, stepping: LinearSchedule, layout: CfgLayout) -> Any:
    """Return the noise of a generation whose first call has ``latents``, in fp32 or more."""
    rows = len(latents) // (2 if layout.batched else 1)
    wide = latents if latents.dtype.itemsize > 4 else latents.float()
    return wide[:rows] / (stepping.noise_scale * stepping.steps[0].input_scale)
