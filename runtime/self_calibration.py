"""Calibrate a plan while the first generation runs, where no plan was given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs, value
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.runtime.matching import input_shapes, rows_of
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator

log = logging.getLogger(__name__)

_MOST_ALIKE = 4  # calls with the first timestep: neighbouring timesteps may be rounded to one


class SelfCalibration:
    """Follow one generation, and choose the strategies of each step by the greedy search."""

    def __init__(
        self, captured: CapturedGraph, sites: Sequence[Site], options: BackendOptions
    ) -> None:
        """Begin with the first step of a generation; ``sites`` are the attentions."""
        self._captured, self._sites, self._options = captured, sites, options
        self._timesteps: list[float] = []
        self.rows = 0  # of each call
        self._latents: list[Tensor] = []  # of the last call, while timesteps are all alike
        self._calibrator = GreedyCalibrator(
            captured,
            sites,
            options.cfg_layout,
            options.threshold,
            options.steps,
            options.on_progress,
        )
        if options.on_progress is None:
            self._announce()

    def is_complete(
        self, timestep: float, latents: Sequence[Tensor], anew: bool = False, named: bool = False
    ) -> bool:
        """Return whether a call begins the next generation; ``anew`` where that is known.

        Timesteps fall or rise, as the first ones do; one against that direction is of the next
        generation. Those that rounding has made equal belong to steps of their own: to any number
        of them where the sampler has ``named`` the generation.

        Raises:
            ConfigError: the generation has one step, or calls the model twice a step.
        """
        if anew or not self._timesteps:
            return bool(self._timesteps)
        first, last = self._timesteps[0], self._timesteps[-1]
        direction = next((known - first for known in self._timesteps if known != first), 0.0)
        if direction == 0.0 and timestep == first:
            self._check_progress(timestep, latents, named)
        return (timestep - last) * direction < 0.0

    @property
    def steps(self) -> int:
        """Return how many steps there have been."""
        return len(self._timesteps)

    def goes_on(self, timestep: float) -> bool:
        """Return whether a call with ``timestep`` is of this generation, as far as that shows."""
        first, last = self._timesteps[0], self._timesteps[-1]
        return (timestep - last) * (last - first) >= 0.0 and last != first

    def _check_progress(self, timestep: float, latents: Sequence[Tensor], named: bool) -> None:
        """Raise ``ConfigError`` if another call with the first timestep cannot be a step."""
        calls = len(self._timesteps) + 1
        moved = not all(map(torch.equal, self._latents, latents))
        if moved and (named or calls <= _MOST_ALIKE):
            return
        raise ConfigError(
            f"{calls} calls in a row came with the first timestep",
            where=f"argument {self._options.timestep!r}",
            got=timestep,
            expected="one call per step, and more than one step",
            remedy="batch the guidance in one call; options={'dense': True} where there is "
            "one step only",
        )

    def step(
        self, timestep: float, latents: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """Run the next step on the flat ``tensors``, and choose its strategies."""
        self._timesteps.append(timestep)
        self.rows = rows_of(self._captured, tensors)
        first = timestep == self._timesteps[0]
        self._latents = [latent.clone() for latent in latents if first]
        return self._calibrator.step(tensors)

    def plan(self, identity: Fingerprint) -> Plan:
        """Return the plan for the steps so far, of the model called ``identity``."""
        calibrator = self._calibrator
        return Plan(
            model=identity,
            inputs=input_shapes(self._captured),
            sampler=Sampler(
                steps=len(self._timesteps),
                timesteps=tuple(self._timesteps),
                cfg_layout=self._options.cfg_layout,
            ),
            sites=tuple(planned_site(site) for site in self._sites),
            strategies=tuple(calibrator.strategies),
            calibration=Calibration(
                method="greedy",
                strength=self._options.threshold,
                batch=value(outputs(self._captured.module.graph)[0]).shape[0],
                forwards=round(calibrator.forwards, 1),
                seconds=round(calibrator.seconds, 1),
                versions={"torch": torch.__version__},
            ),
        )

    def _announce(self) -> None:
        guidance = (
            "guidance is not shared, since options={'cfg_layout': ...} does not say its order"
            if self._options.cfg_layout is CfgLayout.NONE
            else f"guidance is batched, {self._options.cfg_layout}"
        )
        log.warning(
            "ditfastattn: no plan was given: this first generation calibrates one at threshold %g "
            "and is slower; %s",
            self._options.threshold,
            guidance,
        )
