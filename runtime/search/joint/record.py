"""Write down what a joint search found, as one plan of all phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import Coefficients
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.phases import guided_layout, phases_of
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.search.joint.parts import Part
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.runtime.search.solve.rows import Row


def check_same_sites(parts: Sequence[Part]) -> None:
    """Raise ``ConfigError`` where the model has other sites in one phase than in another."""
    first, *others = ([planned_site(site) for site in part.session.sites] for part in parts)
    for found in others:
        if found != first:
            raise ConfigError(
                "the model has other sites where guidance is on than where it is off",
                where="calibrate(method='joint')",
                got=", ".join(site.name for site in found),
                expected=", ".join(site.name for site in first),
                remedy="search whole steps alone: method='whole-steps'",
            )


def record_parts(
    parts: Sequence[Part],
    rows: Sequence[Row],
    coefficients: Coefficients,
    calibration: Calibration,
) -> Plan:
    """Return the plan of ``rows``, with the ``coefficients`` of the whole output at each step."""
    plans: list[Plan] = []
    for part in parts:
        *sites, output = part.session.sites
        own = coefficients[part.steps.start : part.steps.stop]
        part.session.take_sites((*sites, replace(output, coefficients=own)))
        plans.append(record_plan(part.session, part.own(rows), part.work.timesteps, calibration))
    first = plans[0]
    if len(plans) == 1:
        return first
    layouts = [part.session.layout for part in parts for _ in part.steps]
    changes = {
        "steps": len(rows),
        "timesteps": tuple(each for plan in plans for each in plan.sampler.timesteps),
        "cfg_layout": guided_layout(layouts),
        "phases": phases_of(layouts),
    }
    *inner, last = first.sites
    whole = last.model_copy(update={"coefficients": coefficients})
    most = max(plan.calibration.cache_bytes for plan in plans)
    data = {
        **first.model_dump(),
        "sampler": {**first.sampler.model_dump(), **changes},
        "sites": [site.model_dump() for site in (*inner, whole)],
        "strategies": rows,
        "calibration": {**first.calibration.model_dump(), "cache_bytes": most},
    }
    return Plan.model_validate(data)
