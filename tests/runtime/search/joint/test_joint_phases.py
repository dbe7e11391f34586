"""Whole steps and sites, found in one search, where guidance is on for some steps only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditfastattn
from ditfastattn import CfgLayout, Plan, Strategy, Target
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.joint import search as joint
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.whole_steps import calibrate as whole_steps
from tests.plans import MixedPlan
from tests.runtime.test_phases import Interval, Pictures, phases_of
from tests.tiers import slow
from tests.works_with import works_with


def call(steps: int) -> dict[str, Any]:
    return {"labels": [1], "num_inference_steps": steps}


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on two images, and try little: what is found differs, how it is found does not."""
    monkeypatch.setattr(whole_steps, "FITTED_ON", 2)
    monkeypatch.setattr(joint, "MORE_RUNS", (0, 1))
    monkeypatch.setattr(joint, "ROUNDS", 2)


def search(pipeline: Any, steps: int, target: Target, **options: Any) -> Plan:
    """Search by counted operations, so that two searches find the same plan."""
    torch._dynamo.reset()
    given = {"target": target, "objective": "flops", **options}
    return ditfastattn.calibrate(pipeline, call(steps), **given)


@works_with(
    "Guidance",
    "the default search (whole steps and sites) with guidance for an interval only",
    "works",
    "sites of each phase are chosen at the same strength",
)
@pytest.mark.parametrize(
    ("order", "guided", "steps", "target"),
    [
        ("cond-first", range(2), 5, Target.min_psnr(24.0)),
        slow(("separate", range(2, 5), 6, Target.min_psnr(25.0))),  # then a single step
    ],
    ids=["cutoff", "two-calls"],
)
def test_sites_save_within_the_steps_that_run(
    order: str, guided: range, steps: int, target: Target
) -> None:
    pipeline: Any = Pictures(order, guided)
    plan = search(pipeline, steps, target)
    assert plan.sampler.phases == phases_of(CfgLayout(order), guided, steps)
    assert plan.sampler.timesteps == tuple(pipeline.scheduler.timesteps.tolist())
    assert plan.calibration.method == "joint"
    assert plan.sites[-1].kind is SiteKind.OUTPUT
    runs = [step for step, row in enumerate(plan.strategies) if row[-1].computes]
    assert len(runs) < steps
    assert {each for step in runs for each in plan.strategies[step][:-1]} > {Strategy.FULL}
    found = plan.calibration
    assert found.held_out is not None
    assert found.held_out.worst >= target.bound
    prompt, whole = Prompt(call(steps), 500), Interval(order, range(steps))
    with open_session(whole, prompt, CfgLayout(order)) as session:
        mixed = MixedPlan(plan, session.sites)
    dense, expected = generate(pipeline, prompt), mixed.interpret(pipeline, prompt)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    got = generate(pipeline, prompt)
    ditfastattn.restore(pipeline)
    assert float((got - expected).abs().max()) < 1e-5
    error = (got - dense).square().mean()
    assert float(-10 * error.log10()) == pytest.approx(found.held_out.worst, abs=0.01)
