"""Whole steps of plans with phases: earlier outputs are those of the same phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ditfastattn import ConfigError, Plan, Strategy, accelerate, export, load, restore, verify
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.passes.analysis.output_site import OUTPUT
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Span
from ditfastattn.passes.plan.planned_site import PlannedSite
from ditfastattn.passes.plan.strategies import FITTED, fitted_terms
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import noise
from tests.plans import MixedPlan
from tests.runtime.test_phases import CALL, Interval, mixed_plan
from tests.tiers import slow

F, S, E = Strategy.FULL, Strategy.SHARE_STEP, Strategy.EXTRAPOLATE
PROMPT = Prompt({**CALL, "labels": [1, 3]}, 5)


def fitted_at(steps: range, layout: CfgLayout, column: list[Strategy]) -> list[Any]:
    """Return coefficients for the fitted steps of a phase."""
    numbers = iter(noise(steps.start, 1000).mul(0.4).tolist())
    return [
        [
            [next(numbers) for _ in range(fitted_terms(column[step].outputs_read, layout.batched))]
            for _ in range(layout.branches)
        ]
        if column[step].fitted
        else []
        for step in steps
    ]


def column_of(spans: tuple[Span, ...]) -> list[Strategy]:
    """Return a column in which each phase is fitted, repeats or extrapolates."""
    column: list[Strategy] = []
    for steps, _ in spans:
        own = [F, FITTED[0], F, FITTED[1], S][: len(steps)]
        column += [F, F, E] if steps.start == 1 else own
    return column


def whole_steps(order: str, guided: range, opaque: bool = False) -> MixedPlan:
    """Return a plan with phases that skips whole steps, and shares every other site at others."""
    made = mixed_plan(order, guided)
    column = column_of(made.plan.sampler.spans)
    coefficients = [
        row for steps, layout in made.plan.sampler.spans for row in fitted_at(steps, layout, column)
    ]
    latent = made.plan.inputs["hidden_states"]
    output = PlannedSite.model_validate(
        {
            "name": OUTPUT,
            "kind": SiteKind.OUTPUT,
            "tokens": latent[1] * latent[2],
            "heads": 1,
            "head_dim": latent[0],
            "window": 0,
            "latent": "hidden_states",
            "coefficients": coefficients,
        }
    )
    begins = {steps.start for steps, _ in made.plan.sampler.spans}
    inner = [
        [
            F if own.computes and (step in begins or place % 2) else S
            for place in range(len(made.sites))
        ]
        for step, own in enumerate(column)
    ]
    data = made.plan.model_dump()
    if opaque:
        model = module_fingerprint(Interval(order, guided).transformer)
        data |= {"model": model, "inputs": {"hidden_states": latent}, "sites": []}
        inner = [[] for _ in column]
    data["sites"] = [*data["sites"], output]
    data["strategies"] = [[*row, own] for row, own in zip(inner, column, strict=True)]
    sites = () if opaque else made.sites
    return MixedPlan(Plan.model_validate(data), sites)


@pytest.fixture
def accelerated() -> Iterator[Callable[..., Tensor]]:
    """Generate by a plan, the second time in a model that has run by it."""
    with ExitStack() as undo:

        def run(pipeline: Any, plan: Plan, **options: Any) -> Tensor:
            accelerate(pipeline, plan, **options)
            undo.callback(restore, pipeline)
            generate(pipeline, PROMPT)
            images: Tensor = generate(pipeline, PROMPT)
            return images

        yield run


@pytest.mark.parametrize(
    ("order", "guided", "way"),
    [
        ("cond-first", range(3), "opaque"),
        ("uncond-first", range(1, 4), "eager"),
        slow(("separate", range(1, 4), "opaque")),
        slow(("separate", range(1, 4), "eager")),
        slow(("uncond-first", range(1, 4), "inductor")),
    ],
    ids=["opaque", "eager", "two-calls-opaque", "two-calls", "compiled"],
)
def test_skipped_steps_are_made_of_outputs_of_their_phase(
    order: str, guided: range, way: str, accelerated: Callable[..., Tensor]
) -> None:
    pipeline: Any = Interval(order, guided)
    made = whole_steps(order, guided, way == "opaque")
    expected = made.interpret(pipeline, PROMPT)
    assert float((generate(pipeline, PROMPT) - expected).abs().max()) > 1e-3
    got = accelerated(pipeline, made.plan, **({} if way == "opaque" else {"lowering": way}))
    assert float((got - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("order", "guided"),
    [("uncond-first", range(1, 4)), slow(("separate", range(1, 4)))],
    ids=["interval", "two-calls"],
)
def test_a_bundle_is_the_interpreters(order: str, guided: range, tmp_path: Path) -> None:
    made, pipeline = whole_steps(order, guided), Interval(order, guided)
    expected = made.interpret(pipeline, PROMPT)
    export(pipeline, CALL, made.plan, tmp_path / "bundle", loop=True)
    found = verify(tmp_path / "bundle")
    assert found.passed
    assert 0.0 < found.loop_error < 1e-5
    running: Any = pipeline
    running.transformer = load(tmp_path / "bundle")
    assert float((generate(running, PROMPT) - expected).abs().max()) < 1e-4


def test_a_phase_begins_with_a_step_that_runs() -> None:
    plan = whole_steps("cond-first", range(3)).plan
    rows = list(plan.strategies)
    rows[3] = (S,) * len(plan.sites)
    data = plan.model_copy(update={"strategies": tuple(rows)}).model_dump_json()
    with pytest.raises(ConfigError, match="since the phase began at step 3"):
        Plan.parse(data)
