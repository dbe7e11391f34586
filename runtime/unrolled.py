"""A plan in force: unrolled for one model at one set of shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.guidance import CfgLayout, calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.step_program import StepProgram
from ditfastattn.passes.rewrites.pipeline import unroll_available
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.matching import check_legal, planned_sites


@dataclass(frozen=True)
class UnrolledPhase:
    """The step program of each guidance branch in one phase of a plan."""

    layout: CfgLayout
    programs: tuple[StepProgram, ...]

    @property
    def shares_guidance(self) -> bool:
        """Return whether some site, at some step, computes the conditional half alone."""
        return self.programs[0].shares_guidance


class PlanKey:
    """Stand for a plan of one model, in all graphs of that model."""


@dataclass(eq=False)
class UnrolledPlan:
    """A plan matched with one graph; a context of a generation keeps its state by the ``key``.

    A phase is unrolled when the graph is first called in it, since other phases may call the model
    with other rows: by a graph of their own.
    """

    plan: Plan
    captured: CapturedGraph
    sites: tuple[Site, ...]
    key: PlanKey = field(default_factory=PlanKey)
    _phases: dict[int, UnrolledPhase] = field(default_factory=dict)

    def phase(self, number: int) -> UnrolledPhase:
        """Return a phase, unrolled.

        Raises:
            ConfigError: the graph's sites may not take its strategies.
        """
        if number not in self._phases:
            self._phases[number] = self._unrolled(*self.plan.sampler.spans[number])
        return self._phases[number]

    def _unrolled(self, steps: range, layout: CfgLayout) -> UnrolledPhase:
        here = slice(steps.start, steps.stop)
        rows = self.plan.strategies[here]
        check_legal(rows, self.sites, layout)
        sites = [replace(site, coefficients=site.coefficients[here]) for site in self.sites]
        merge = self.plan.merge_variants
        programs = tuple(
            unroll_available(rows, self.captured, sites, merge, call) for call in calls_of(layout)
        )
        return UnrolledPhase(layout, programs)

    @property
    def phases(self) -> tuple[UnrolledPhase, ...]:
        """Return the phases that the graph has run so far."""
        return tuple(self._phases[number] for number in sorted(self._phases))

    @property
    def programs(self) -> tuple[StepProgram, ...]:
        """Return the programs of these phases."""
        return tuple(program for phase in self.phases for program in phase.programs)

    @property
    def shares_guidance(self) -> bool:
        """Return whether some site, at some step, computes the conditional half alone."""
        return any(phase.shares_guidance for phase in self.phases)

    @property
    def peak_cache_bytes(self) -> int:
        """Return the most bytes that caches take at any time."""
        peaks = [sum(each.slots.peak_bytes for each in phase.programs) for phase in self.phases]
        return max(peaks, default=0)

    def hoisted_bytes(self, per_branch: int) -> int:
        """Return the bytes of all hoisted values, given those of one guidance branch."""
        return max((len(phase.programs) for phase in self.phases), default=0) * per_branch

    def generation(self, where: str, on_trial: bool = False) -> Generation:
        """Return the state of a generation that has not begun; ``where`` names the timestep.

        It is ``on_trial`` where the plan may be that of an interrupted generation.
        """
        return Generation(self.plan.sampler, where, on_trial)


def unroll_plan(
    plan: Plan, captured: CapturedGraph, sites: tuple[Site, ...], identity: Fingerprint
) -> UnrolledPlan:
    """Return ``plan`` unrolled for the model called ``identity``, whose sites are ``sites``.

    Raises:
        ConfigError: the plan is for another model, or for other shapes.
    """
    unrolled = UnrolledPlan(plan, captured, planned_sites(plan, captured, sites, identity))
    if not plan.sampler.phases:
        unrolled.phase(0)
    return unrolled
