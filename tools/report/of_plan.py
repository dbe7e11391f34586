"""The reports of a search and of a validation: one plan, examined on its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.opaque import is_opaque
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.search.judge.validate import Validation, planned_call
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.tools.commands.validation_output import verdict
from ditfastattn.tools.examine import examine_plan
from ditfastattn.tools.measure import machine
from ditfastattn.tools.report.content import (
    PlanSection,
    Points,
    Report,
    declined_of,
    pictures,
    plan_facts,
)

_SHOWN = 2  # images of a search's report, each generated twice


def search_report(pipeline: Any, plan: Plan, call: Mapping[str, Any], seed: int) -> Report:
    """Return the report of a search that found ``plan``; it draws two prompts of ``call``."""
    prompts = split_prompts(planned_call(pipeline, plan, call), seed)[:_SHOWN]
    dense = dense_contender(pipeline, prompts, Lowering.EAGER)
    planned = planned_contender(pipeline, plan, prompts, Lowering.EAGER)
    with many_compilations():
        images = dense.by_prompt(), planned.by_prompt()
    points: list[tuple[float, float, str]] = []
    found, quality = plan.calibration, "quality"
    if found.target is not None and found.held_out is not None and found.predicted_speedup:
        quality = f"{found.target.name}, worst held-out image"
        points.append((found.predicted_speedup, found.held_out.worst, "plan (predicted)"))
    section = _section(pipeline, plan, call, plan_facts(plan), *images)
    return _report("ditfastattn: a calibrated plan", section, {"plan": points}, quality)


def validation_report(
    pipeline: Any, plan: Plan, call: Mapping[str, Any], found: Validation
) -> Report:
    """Return the report of a validation of ``plan`` on the prompts of ``call``."""
    facts = [*plan_facts(plan), ("verdict", verdict(found))]
    for each in found.qualities:
        worst = f"mean {each.mean:.4g}{each.unit}, worst {each.worst:.4g}{each.unit}"
        facts.append((f"{each.label}, {len(found.seeds)} prompts", worst))
    facts.append(("drift", found.drift.describe()))
    points: list[tuple[float, float, str]] = []
    if found.timing is not None:
        speedup, candidate = found.timing.speedup, found.timing.candidate
        facts.append(("measured speedup", f"{speedup.median:.2f}x ({len(speedup.samples)} pairs)"))
        facts.append(("seconds per generation", f"{candidate.median:.3g}"))
        points.append((speedup.median, found.qualities[0].mean, "plan"))
    section = _section(pipeline, plan, call, tuple(facts), found.reference, found.planned)
    label = f"mean {found.qualities[0].label}"
    return _report("ditfastattn: a validated plan", section, {"plan": points}, label)


def _report(title: str, section: PlanSection, points: Points, quality: str) -> Report:
    return Report(title, (), (section,), points, quality, machine())


def _section(
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    facts: tuple[tuple[str, str], ...],
    dense: Sequence[Tensor],
    planned: Sequence[Tensor],
) -> PlanSection:
    drawn = pictures(torch.cat(list(dense)), torch.cat(list(planned))) if dense else ()
    if is_opaque(plan):  # its model is not captured: there is nothing to examine
        return PlanSection("the plan", plan, facts, pictures=drawn)
    prompt = split_prompts(planned_call(pipeline, plan, call), 0)[0]
    examined = examine_plan(pipeline, plan, prompt)
    return PlanSection(
        name="the plan",
        plan=plan,
        facts=facts,
        prices=examined.prices,
        errors=examined.errors,
        caches=examined.caches,
        declined=declined_of(examined.sites, plan),
        pictures=drawn,
    )
