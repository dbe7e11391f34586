"""Whole steps and sites, found in one search, where guidance is on for some steps only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ditfastattn
from ditfastattn import CfgLayout, Plan, Strategy, Target
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.joint import parts
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


def search(pipeline: Any, steps: int, target: Target) -> Plan:
    """Search by counted operations, so that two searches find the same plan."""
    torch._dynamo.reset()
    return ditfastattn.calibrate(pipeline, call(steps), target=target, objective="flops")


@works_with(
    "Guidance",
    "the default search (whole steps and sites) with guidance for an interval only",
    "works",
    "sites of each phase are chosen at the same strength",
)
@pytest.mark.parametrize(
    ("order", "guided", "steps", "target"),
    [
        ("cond-first", range(2), 4, Target.min_psnr(30.0)),
        slow(("separate", range(2, 5), 6, Target.min_psnr(27.0))),  # then a single step
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
    check_interpreted(pipeline, plan, steps, found.held_out.worst)


@pytest.mark.parametrize(
    ("guided", "price"), [("separate", 1.0), ("cond-first", 2.0)], ids=["two-calls", "batched"]
)
def test_a_guided_step_costs_both_branches(
    guided: str, price: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(steps: range, layout: CfgLayout, call: float) -> Any:
        chooser = SimpleNamespace(costs=SimpleNamespace(step=call), first=1.0, tries=1)
        session = SimpleNamespace(layout=layout)
        single = len(steps) == 1
        return SimpleNamespace(steps=steps, session=session, chooser=None if single else chooser)

    monkeypatch.setattr(parts, "_candidates", lambda _part, _runs: None)
    phases = [
        part(range(2), CfgLayout.NONE, 1.0),
        part(range(2, 5), CfgLayout(guided), price),
        part(range(5, 6), CfgLayout.NONE, 0.0),
    ]
    found = parts.PartedCandidates(phases, (0, 2, 5))
    assert found.whole_steps == (2 + 3 * 2 + 1) / (1 + 2 + 1)


@pytest.mark.slow  # the quicker twins: whole steps in phases, and both without phases
def test_other_steps_keep_whole_steps_and_sites() -> None:
    pipeline: Any = Pictures("cond-first", range(2))
    plan = search(pipeline, 4, Target.min_psnr(30.0))
    adapted = ditfastattn.retarget(pipeline, plan, call(7), target=Target.min_psnr(14.0))
    assert adapted.sampler.phases == phases_of(CfgLayout.COND_FIRST, range(2), 7)
    assert sum(not row[-1].computes for row in adapted.strategies) > 0
    assert len({entry for row in adapted.strategies for entry in row[:-1]}) > 1
    assert adapted.calibration.held_out is not None
    check_interpreted(pipeline, adapted, 7, adapted.calibration.held_out.worst)


def check_interpreted(pipeline: Any, plan: Plan, steps: int, worst: float) -> None:
    """Check that ``plan`` runs as the interpreter runs it, at the quality of its record."""
    order = pipeline.order
    prompt, whole = Prompt(call(steps), 500), Interval(order, range(steps))
    with open_session(whole, prompt, CfgLayout(order)) as session:
        mixed = MixedPlan(plan, session.sites)
    dense, expected = generate(pipeline, prompt), mixed.interpret(pipeline, prompt)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    got = generate(pipeline, prompt)
    ditfastattn.restore(pipeline)
    assert float((got - expected).abs().max()) < 1e-5
    error = (got - dense).square().mean()
    assert float(-10 * error.log10()) == pytest.approx(worst, abs=0.01)
