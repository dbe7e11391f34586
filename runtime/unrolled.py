"""A plan in force: unrolled for one model at one set of shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.step_program import StepProgram
from ditfastattn.passes.rewrites.pipeline import unroll_available
from ditfastattn.runtime.clock import StepClock
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.matching import planned_sites


@dataclass(frozen=True, eq=False)  # a context of a generation keeps its state by this very plan
class UnrolledPlan:
    """A plan, and the step program of each guidance branch."""

    plan: Plan
    programs: tuple[StepProgram, ...]

    @property
    def shares_guidance(self) -> bool:
        """Return whether some site, at some step, computes the conditional half alone."""
        return self.programs[0].shares_guidance

    @property
    def peak_cache_bytes(self) -> int:
        """Return the most bytes that caches take at any time."""
        return sum(program.slots.peak_bytes for program in self.programs)

    def hoisted_bytes(self, per_branch: int) -> int:
        """Return the bytes of all hoisted values, given those of one guidance branch."""
        return len(self.programs) * per_branch

    def generation(self, where: str, on_trial: bool = False) -> Generation:
        """Return the state of a generation that has not begun; ``where`` names the timestep.

        It is ``on_trial`` where the plan may be that of an interrupted generation.
        """
        calls = [timestep for timestep in self.plan.sampler.timesteps for _ in self.programs]
        schedules = [program.slots for program in self.programs]
        halves = 2 if self.plan.sampler.cfg_layout.batched else 1
        return Generation(schedules, StepClock(calls, where), on_trial, halves)


def unroll_plan(
    plan: Plan, captured: CapturedGraph, sites: tuple[Site, ...], identity: Fingerprint
) -> UnrolledPlan:
    """Return ``plan`` unrolled for the model called ``identity``, whose sites are ``sites``.

    Raises:
        ConfigError: the plan is for another model, or for other shapes.
    """
    chosen = planned_sites(plan, captured, sites, identity)
    branches = calls_of(plan.sampler.cfg_layout)
    return UnrolledPlan(
        plan,
        tuple(
            unroll_available(plan.strategies, captured, chosen, plan.merge_variants, branch)
            for branch in branches
        ),
    )
