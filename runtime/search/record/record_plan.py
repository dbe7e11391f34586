"""Write down, as a plan, what a search found for the model and sampler of a session."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ditfastattn.passes.graph.ir import outputs, value
from ditfastattn.passes.plan.calibration import Calibration, Tried
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.rewrites.pipeline import unroll_available
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.pipeline.text_padding import padded_text
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.timing import device_name
from ditfastattn.runtime.search.solve.rows import Row


def with_tried(plan: Plan, *tried: Tried) -> Plan:
    """Return ``plan``, whose record also says what else was ``tried``, and not how it was found."""
    found = plan.calibration
    record = found.model_copy(update={"tried": (*found.tried, *tried)})
    return plan.model_copy(update={"calibration": record})


def record_plan(
    session: Session,
    rows: Sequence[Row],
    timesteps: Sequence[float],
    calibration: Calibration,
    merge_variants: bool = False,
) -> Plan:
    """Return the plan of ``rows``.

    ``calibration`` says how they were found; device, versions, batch and bytes are added to it.
    """
    captured, sites = session.captured, session.sites
    peaks = [
        unroll_available(rows, captured, sites, merge_variants, call).slots.peak_bytes
        for call in calls_of(session.layout)
    ]
    added = {
        "cache_bytes": sum(peaks),
        "batch": value(outputs(captured.module.graph)[0]).shape[0],
        "device": device_name(),
        "versions": {"torch": torch.__version__},
    }
    return Plan(
        model=session.identity,
        inputs=input_shapes(captured),
        text=padded_text(session.pipeline.transformer),
        sampler=session.sampler(timesteps),
        sites=tuple(planned_site(site) for site in sites),
        strategies=tuple(map(tuple, rows)),
        merge_variants=merge_variants,
        calibration=calibration.model_copy(update=added),
    )
