"""Phases: consecutive steps that call the model alike.

Most generations have one. Guidance that is on for an interval only makes several: where it is off,
a step calls the model with half the rows, or once instead of twice. Strategies begin anew with each
phase, as with a generation: what they read was computed in the same phase, of the same guidance
branches. So a cache of both branches never serves one, nor the other way around.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Annotated

from pydantic import Field

from ditfastattn.core.records import Record
from ditfastattn.passes.plan.guidance import CfgLayout

Span = tuple[range, CfgLayout]  # the steps of a phase, and how guidance reaches the model there


class Phase(Record, frozen=True):
    """Say how many steps a phase lasts, and how guidance reaches the model in them."""

    steps: Annotated[int, Field(gt=0)]
    cfg_layout: CfgLayout


def spans_of(steps: int, layout: CfgLayout, phases: Sequence[Phase]) -> tuple[Span, ...]:
    """Return the phases of ``steps`` steps; without any, all of them are one of ``layout``."""
    spans: list[Span] = []
    for phase in phases or (Phase(steps=steps, cfg_layout=layout),):
        first = spans[-1][0].stop if spans else 0
        spans.append((range(first, first + phase.steps), phase.cfg_layout))
    return tuple(spans)


def phases_of(layouts: Sequence[CfgLayout]) -> tuple[Phase, ...]:
    """Return the phases of steps of these ``layouts``; none where all are alike."""
    runs = [Phase(steps=len(list(run)), cfg_layout=layout) for layout, run in groupby(layouts)]
    return tuple(runs) if len(runs) > 1 else ()


def guided_layout(layouts: Sequence[CfgLayout]) -> CfgLayout:
    """Return how guidance reaches the model where it is on."""
    return next((each for each in layouts if each is not CfgLayout.NONE), CfgLayout.NONE)


def why_not_phases(steps: int, layout: CfgLayout, phases: Sequence[Phase]) -> str:
    """Return why ``phases`` cannot be those of ``steps`` steps, or ""."""
    if not phases:
        return ""
    if (total := sum(phase.steps for phase in phases)) != steps:
        return f"they hold {total} steps, of {steps}"
    layouts = [phase.cfg_layout for phase in phases]
    if any(one is other for one, other in pairwise(layouts)):
        return "two in a row have one cfg_layout, so they are one phase"
    if set(layouts) != {layout, CfgLayout.NONE}:
        return f"cfg_layout must be {layout} or {CfgLayout.NONE}, and each in at least one"
    return ""


def in_runs(steps: Sequence[str]) -> str:
    """Return what each of ``steps`` did, equal ones in a row together."""
    parts, first = [], 0
    for done, run in groupby(steps):
        last = first + len(list(run)) - 1
        where = f"step {first}" if first == last else f"steps {first}-{last}"
        parts.append(f"{done} at {where}")
        first = last + 1
    return ", ".join(parts)
