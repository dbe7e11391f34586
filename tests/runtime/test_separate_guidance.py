"""Guidance in two calls a step: each lane has its caches, and the second may take the first's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.reference import PlanInterpreter
from tests.helpers import (
    STEPS,
    TIMESTEPS,
    TINY_MODELS,
    TinyModel,
    captured_once,
    largest_difference,
)
from tests.tiers import slow

Rows = Sequence[Sequence[Strategy]]
BATCH = 2


def call(tiny: TinyModel, step: int, lane: int) -> dict[str, Any]:
    """Return a lane's call: the latents of the other one, and conditions of its own."""
    made = tiny.call(step, BATCH)
    for name in ("class_labels", "encoder_hidden_states", "pooled_projections"):
        if name in made:
            made[name] = made[name].flip(0) if lane else made[name]
    return made


def mixed(sites: Sequence[Site], seed: int, layout: CfgLayout = CfgLayout.SEPARATE) -> Rows:
    generator = random.Random(seed)
    computed = [1] * len(sites)
    rows: list[tuple[Strategy, ...]] = [(Strategy.FULL,) * len(sites)]
    while len(rows) < STEPS:
        row = []
        for index, site in enumerate(sites):
            legal = [
                strategy
                for strategy in strategies()
                if not why_not(strategy, site, layout) and computed[index] >= strategy.outputs_read
            ]
            row.append(generator.choice(legal))
            computed[index] += row[-1].computes
        rows.append(tuple(row))
    return rows


def plan_of(tiny: TinyModel, rows: Rows, layout: CfgLayout = CfgLayout.SEPARATE) -> Plan:
    found = captured_once(tiny, BATCH)
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(rows), timesteps=TIMESTEPS, cfg_layout=layout),
        sites=tuple(planned_site(site) for site in found.every),
        strategies=tuple(tuple(row) for row in rows),
        calibration=Calibration(method="manual"),
    )


def compiled(tiny: TinyModel, plan: Plan) -> Any:
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)


def run(tiny: TinyModel, model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(**call(tiny, step, lane))[0] for step in range(STEPS) for lane in range(BATCH)
        ]


def reference(tiny: TinyModel, rows: Rows) -> list[Tensor]:
    sites = captured_once(tiny, BATCH).every
    interpreter = PlanInterpreter(tiny.model, rows, sites, CfgLayout.SEPARATE)
    results: list[Tensor] = []
    for step in range(STEPS):
        for lane in range(2):
            with torch.no_grad(), interpreter.step(step, lane):
                results.append(tiny.model(**call(tiny, step, lane))[0])
    return results


@pytest.mark.parametrize(
    ("layout", "seed"),
    [
        (CfgLayout.SEPARATE, 0),
        *(slow((CfgLayout.SEPARATE, seed)) for seed in (1, 2)),
        (CfgLayout.SEPARATE_UNCOND_FIRST, 0),
    ],
)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_mixed_plans_are_the_interpreters(name: str, layout: CfgLayout, seed: int) -> None:
    tiny = TINY_MODELS[name]()
    rows = mixed(captured_once(tiny, BATCH).every, seed, layout)
    model = compiled(tiny, plan_of(tiny, rows, layout))
    expected = reference(tiny, rows)
    assert largest_difference(run(tiny, model), expected) < 1e-5
    assert largest_difference(run(tiny, model), expected) < 1e-5  # and a second generation


F, C, Q = Strategy.FULL, Strategy.SHARE_CFG, Strategy.EXTRAPOLATE_QUADRATIC


@pytest.mark.parametrize("steps", [(F, C, F, C, Q, Q), (F, F, C, C, Q, C), (F, C, C, Q, F, Q)])
def test_a_parabola_goes_through_outputs_of_the_other_call(steps: tuple[Strategy, ...]) -> None:
    tiny = TINY_MODELS["dit"]()
    sites = captured_once(tiny, BATCH).every
    rows: list[tuple[Strategy, ...]] = [(strategy,) * len(sites) for strategy in steps]
    expected = reference(tiny, rows)
    model = compiled(tiny, plan_of(tiny, rows))
    assert largest_difference(run(tiny, model), expected) < 1e-5
    assert largest_difference(run(tiny, model), expected) < 1e-5


def test_a_shared_second_call_computes_no_attention() -> None:
    tiny = TINY_MODELS["dit"]()
    sites = captured_once(tiny, BATCH).every
    shared = (Strategy.SHARE_CFG,) * len(sites)
    rows = [(Strategy.FULL,) * len(sites)] + [shared] * (STEPS - 1)
    plan = plan_of(tiny, rows)
    model = compiled(tiny, plan)
    run(tiny, model)
    report = next(r for r in ditfastattn.reports() if r.plan == plan)
    assert report.planned is not None
    share = report.planned.attention / report.dense.attention
    assert share == pytest.approx((2 + STEPS - 1) / (2 * STEPS))
    assert report.peak_cache_bytes > 0


def test_other_latents_in_the_second_call_are_refused() -> None:
    tiny = TINY_MODELS["dit"]()
    sites = captured_once(tiny, BATCH).every
    rows = [(Strategy.FULL,) * len(sites)] + [(Strategy.SHARE_CFG,) * len(sites)] * (STEPS - 1)
    model = compiled(tiny, plan_of(tiny, rows))
    with torch.no_grad():
        model(**call(tiny, 0, 0))
        other = call(tiny, 0, 1)
        other["hidden_states"] = other["hidden_states"] + 1.0
        with pytest.raises(ConfigError, match="different latents"):
            model(**other)


def test_a_missing_second_call_is_noticed_by_its_timestep() -> None:
    tiny = TINY_MODELS["dit"]()
    sites = captured_once(tiny, BATCH).every
    model = compiled(tiny, plan_of(tiny, mixed(sites, 0)))
    with torch.no_grad():
        model(**call(tiny, 0, 0))
        with pytest.raises(ConfigError, match="unexpected timestep"):
            model(**call(tiny, 1, 0))
