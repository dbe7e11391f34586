"""Ranges of blocks in plans: graphs and bundles compute what the plan interpreter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.whole_steps import WholeSteps
from torch import Tensor

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.output_site import output_site
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.reference import PlanInterpreter
from tests.export.helpers import export_once
from tests.helpers import (
    STEPS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    capture_sites,
    largest_difference,
    make_plan,
    run_plan,
    uniform_strategies,
)
from tests.ranges import Rows, block_range, interpreting, with_ranges
from tests.tiers import slow_but

FULL, SHARE = Strategy.FULL, Strategy.SHARE_STEP
LINE, PARABOLA = Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC
COLUMN = (FULL, SHARE, FULL, LINE, FULL, PARABOLA)


def plan_of(tiny: TinyModel, sites: tuple[Site, ...], rows: Rows) -> Plan:
    plan = make_plan(tiny, uniform_strategies(capture_sites(tiny)[1], FULL))
    data = json.loads(plan.model_dump_json())
    data["sites"] = [json.loads(planned_site(site).model_dump_json()) for site in sites]
    data["strategies"] = [[str(entry) for entry in row] for row in rows]
    return Plan.parse(json.dumps(data))


def interpreted(tiny: TinyModel, sites: tuple[Site, ...], rows: Rows) -> list[Tensor]:
    interpreter = PlanInterpreter(tiny.model, rows, sites, CfgLayout.COND_FIRST)
    found: list[Tensor] = []
    with torch.no_grad(), interpreting(interpreter, tiny.model, sites):
        for step in range(STEPS):
            with interpreter.step(step):
                found.append(tiny.model(**tiny.call(step, 4))[0])
    return found


# The first block of SD3 begins where text has not met the image; its last one ends without text.
RANGES = [("dit", 0, 0), ("dit", 1, 2), ("pixart", 0, 1), ("sd3", 0, 1), ("sd3", 1, 2)]
BY_DEFAULT = (("dit", 1, 2), ("sd3", 0, 1))


@pytest.mark.parametrize(("name", "first", "last"), slow_but(BY_DEFAULT, RANGES))
def test_graphs_are_the_interpreters(name: str, first: int, last: int) -> None:
    tiny = TINY_MODELS[name]()
    captured, inner = capture_every_site(tiny)
    blocks = block_range(captured, inner, first, last)
    sites, rows = with_ranges(inner, [(blocks, COLUMN)])
    expected = interpreted(tiny, sites, rows)
    assert largest_difference(expected, tiny.run(tiny.model)) > 1e-3
    assert largest_difference(run_plan(tiny, plan_of(tiny, sites, rows)), expected) < 1e-5


def with_output(tiny: TinyModel, sites: tuple[Site, ...], rows: Rows) -> tuple[Any, Rows]:
    """Return ``sites`` and the whole output, with one step between ``rows`` that is skipped."""
    whole = output_site(capture_every_site(tiny)[0])
    idle = (SHARE,) * len(sites)
    skipped = 2
    columns = [(*row, FULL) for row in rows[:-1]]
    columns.insert(skipped, (*idle, SHARE))
    return (*sites, whole), columns


@pytest.mark.parametrize("name", slow_but(["pixart"], ["pixart", "sd3"]))
def test_they_compose_with_sites_other_ranges_and_the_output(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name](layers=3)
    captured, inner = capture_every_site(tiny)
    ranges = [
        (block_range(captured, inner, 0, 0), (FULL, FULL, SHARE, SHARE, FULL, LINE)),
        (block_range(captured, inner, 1, 1), (FULL, SHARE, SHARE, FULL, LINE, FULL)),  # within
        (block_range(captured, inner, 1, 2), (FULL, FULL, SHARE, FULL, FULL, PARABOLA)),
    ]
    sites, rows = with_output(tiny, *with_ranges(inner, ranges, seed=5))
    plan = plan_of(tiny, sites, rows)
    assert Plan.parse(plan.model_dump_json()) == plan
    interpreter = PlanInterpreter(tiny.model, rows, sites, CfgLayout.COND_FIRST)
    whole, expected = WholeSteps(json.loads(plan.model_dump_json())), []
    with torch.no_grad(), interpreting(interpreter, tiny.model, sites):
        for step in range(STEPS):
            call = tiny.call(step, 4)

            def run(call: dict[str, Any] = call) -> Tensor:
                result: Tensor = tiny.model(**call)[0]
                return result

            with interpreter.step(step):
                expected.append(whole(step, call["hidden_states"], run))
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5
    export_once(tiny, plan, tmp_path / "bundle")
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4
