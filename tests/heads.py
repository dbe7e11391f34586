"""Split the heads of tiny models, and make plans for them."""

from __future__ import annotations

from collections.abc import Sequence

from ditfastattn.passes.analysis.site import attentions
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.split_heads import groups_of, split_heads
from tests.helpers import Capture, TinyModel, captured_once, make_plan


def split(tiny: TinyModel, count: int, batch: int = 4) -> Capture:
    """Return what ``tiny`` captures, each attention's heads in ``count`` groups."""
    found = captured_once(tiny, batch)
    divided = split_heads(found.graph, found.every, groups_of(found.every, count))
    assert not divided.declined
    return Capture(divided.captured, find_sites(divided.captured).sites, found.static, found.traced)


def head_plan(
    tiny: TinyModel,
    count: int,
    rows: Sequence[Sequence[Strategy]],
    layout: CfgLayout = CfgLayout.COND_FIRST,
    feed_forwards: bool = True,
) -> Plan:
    """Return a plan of ``rows`` over the groups of heads of ``tiny``."""
    found = split(tiny, count)
    sites = found.every if feed_forwards else attentions(found.every)
    full = [(Strategy.FULL,) * len(captured_once(tiny).every)] * len(rows)
    whole = make_plan(tiny, full, layout, feed_forwards=True)
    data = whole.model_dump()
    data |= {"sites": [planned_site(site) for site in sites], "strategies": rows}
    return Plan.model_validate(data)
