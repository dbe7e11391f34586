"""What a dense generation has shown from outside: the calls of its model, the sampler's steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Phase, Span, spans_of
from ditfastattn.runtime.search.whole_steps.guided import Guidance

WHERE = "calibrate(method='whole-steps')"


class UnobservableError(ConfigError):
    """Refuse a generation that cannot be continued from outside."""

    def __init__(self, expected: str, got: str) -> None:
        """Take what was expected of the generation, and what was seen."""
        self.reason = f"{expected}; seen: {got}"
        super().__init__(
            "whole steps cannot be searched in this pipeline",
            where=WHERE,
            got=got,
            expected=expected,
            remedy="search sites instead: method='global'",
        )


@dataclass(frozen=True)
class ModelCall:
    """Hold one call of the model by argument name, and what it returned, and in which ``form``."""

    arguments: Mapping[str, Any]
    output: Tensor
    form: Any


@dataclass(frozen=True)
class SamplerStep:
    """Hold one call of the scheduler: what it was given and returned."""

    output: Tensor
    timestep: Any
    latent: Tensor
    keywords: Mapping[str, Any]
    noise_state: Tensor | None  # of the generator in ``keywords``, before the step
    returned: Tensor


@dataclass(frozen=True)
class Step:
    """Describe one step of the sampler, and its one or two calls of the model.

    Attributes:
        calls: in order.
        sampler: what the scheduler did.
        scale: from the sampler's latent to the model's.
        guidance: from the model's outputs to what the scheduler is given.
    """

    calls: tuple[ModelCall, ...]
    sampler: SamplerStep
    scale: float
    guidance: Guidance


@dataclass(frozen=True)
class Observed:
    """Hold one dense generation.

    Attributes:
        images: that the pipeline returned, ``[B, C, H, W]``.
        scheduler: a copy, as it was before the first step.
        latent: the name of the model's argument that holds the latent.
        layout: how guidance reaches the model where it is on.
        steps: in order.
        doubled: the sampler steps both halves of the batch, as one latent twice (DiT's pipeline).
        phases: of the steps; none where all call the model alike.
    """

    images: Tensor
    scheduler: Any
    latent: str
    layout: CfgLayout
    steps: tuple[Step, ...]
    doubled: bool = False
    phases: tuple[Phase, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return the steps of each phase, and how guidance reaches the model there."""
        return spans_of(len(self.steps), self.layout, self.phases)

    @cached_property
    def layouts(self) -> tuple[CfgLayout, ...]:
        """Return how guidance reaches the model at each step."""
        return tuple(layout for steps, layout in self.spans for _ in steps)

    @cached_property
    def begins(self) -> frozenset[int]:
        """Return the first step of each phase: it runs, as nothing before it may be read."""
        return frozenset(steps.start for steps, _ in self.spans)

    def speedup(self, runs: Collection[int]) -> float:
        """Return how much less the model computes, by guidance branches, at the steps ``runs``."""
        branches = [layout.branches for layout in self.layouts]
        return sum(branches) / sum(branches[step] for step in runs)

    @cached_property
    def latents(self) -> list[Tensor]:
        """Return the sampler's latents before each step, and after the last."""
        return [*(s.sampler.latent for s in self.steps), self.steps[-1].sampler.returned]
