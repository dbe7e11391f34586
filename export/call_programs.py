"""What each of a step's calls does in a whole generation: the step programs of all phases, joined.

Nothing is read across the beginning of a phase, so caches of different phases never live at once,
and the steps of one program may be counted through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.actions import ActionRow
from ditfastattn.passes.plan.guidance import CfgLayout, GuidanceCall, calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import SlotSchedule, join_schedules, without_slots
from ditfastattn.passes.plan.step_program import StepProgram
from ditfastattn.passes.rewrites.pipeline import unroll_available


@dataclass(frozen=True)
class Variant:
    """Say what a graph does: the actions of its sites, and the layout where they depend on it."""

    actions: ActionRow
    layout: CfgLayout


@dataclass(frozen=True)
class CallProgram:
    """Hold the variant that one of a step's calls runs at each step, and its cache slots.

    The variant is None at a step without this call: the second one, where guidance is off.
    """

    schedule: tuple[Variant | None, ...]
    slots: SlotSchedule

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Return the distinct variants, by their first step."""
        return tuple(dict.fromkeys(each for each in self.schedule if each is not None))

    @property
    def shares_guidance(self) -> bool:
        """Return whether some site, at some step, computes the conditional branch alone."""
        rows = (variant.actions for variant in self.variants)
        return any(action.strategy.shares_guidance for row in rows for action in row)


def call_programs(
    plan: Plan | None, captured: CapturedGraph, sites: Sequence[Site]
) -> tuple[CallProgram, ...]:
    """Return the program of each of a step's calls; the dense model is one step without sites."""
    if plan is None:
        dense = unroll_available([[]], captured, sites)
        return (_joined([(CfgLayout.NONE, 1, dense)]),)
    found: list[list[tuple[CfgLayout, int, StepProgram | None]]] = [
        [] for _ in range(plan.sampler.cfg_layout.calls)
    ]
    for steps, layout in plan.sampler.spans:
        here = slice(steps.start, steps.stop)
        at = [replace(site, coefficients=site.coefficients[here]) for site in sites]
        calls: tuple[GuidanceCall | None, ...] = (*calls_of(layout), None)
        for parts, call in zip(found, calls, strict=False):
            rows = plan.strategies[here]
            made = call and unroll_available(rows, captured, at, plan.merge_variants, call)
            parts.append((layout, len(steps), made))
    return tuple(map(_joined, found))


def _joined(parts: Sequence[tuple[CfgLayout, int, StepProgram | None]]) -> CallProgram:
    schedule: list[Variant | None] = []
    slots: list[SlotSchedule] = []
    for layout, steps, program in parts:
        if program is None:
            schedule += [None] * steps
            slots.append(without_slots(steps))
        else:
            schedule += [_variant(program.variants[each], layout) for each in program.schedule]
            slots.append(program.slots)
    return CallProgram(tuple(schedule), join_schedules(slots))


def _variant(actions: ActionRow, layout: CfgLayout) -> Variant:
    """Return the variant of ``actions``; one that treats all rows alike serves every layout."""
    strategies = [action.strategy for action in actions]
    depends = any(each.shares_guidance or each.fitted for each in strategies)
    return Variant(actions, layout if depends else CfgLayout.NONE)
