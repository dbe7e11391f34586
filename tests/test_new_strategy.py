"""A strategy is one record: a new one goes through search, compile, export and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ditfastattn import CfgLayout, Plan, Strategy, Target, calibrate
from ditfastattn.passes.plan import strategies as table
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.search.measure.error_table import Array
from ditfastattn.runtime.search.solve.memory import needs_caches
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.tools.commands.inspect import show_plan
from ditfastattn.tools.figures import plan_map
from tests.export.helpers import export_tiny
from tests.helpers import (
    TINY_MODELS,
    attentive_pipeline,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    run_plan,
    uniform_strategies,
)
from tests.runtime.search.solve.test_budget import problem

BEFORE_LAST = Strategy(
    name="before-last",
    label="the output before the last",
    symbol="-",
    colour="#123456",
    terminal_colour="red",
    effort=0.0,
    outputs_read=2,
    weights=lambda elapsed, gaps: (0.0, 1.0),
    combine=lambda outputs, factors: outputs[1],
    reference=lambda history, step: history[-2][1],
)


@pytest.fixture(autouse=True)
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "STRATEGIES", (*table.STRATEGIES, BEFORE_LAST))


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_the_compiled_plan_equals_the_interpreter(name: str) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    for rows in (uniform_strategies(sites, BEFORE_LAST), mixed_strategies(sites, seed=3)):
        assert any(BEFORE_LAST in row for row in rows)
        plan = make_plan(tiny, rows, feed_forwards=True)
        assert Plan.parse(plan.model_dump_json()) == plan
        expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
        assert largest_difference(run_plan(tiny, plan), expected) < 1e-5


def test_the_bundle_equals_the_interpreter(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, BEFORE_LAST)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    assert len(manifest.variants) == 2
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


def test_its_caches_are_those_of_two_outputs() -> None:
    captured, sites = capture_every_site(TINY_MODELS["dit"]())
    toy, line = (
        unroll(uniform_strategies(sites, strategy), captured, sites).slots
        for strategy in (BEFORE_LAST, Strategy.EXTRAPOLATE)
    )
    assert toy.slots == line.slots
    assert not any(toy.factors)


def test_a_search_prices_it_and_takes_it_where_it_is_best() -> None:
    case = problem(0, sites=2)
    forbidden = case.errors.apply(lambda _, each: each + np.inf)  # all that the table has
    errors: dict[Strategy, Array] = dict(forbidden.by_strategy)
    errors[BEFORE_LAST] = 0.01 * case.errors.by_strategy[Strategy.EXTRAPOLATE]
    prices = tuple({**each, BEFORE_LAST: 0.0} for each in case.costs.sites)
    better = type(case)(
        type(case.errors)(errors), case.weights, type(case.costs)(10.0, prices, (0.1, 0.1))
    )
    assert BEFORE_LAST in {entry for row in solve(better, 1.0) for entry in row}
    assert needs_caches(BEFORE_LAST)


def test_a_search_measures_it(tmp_path: Path) -> None:
    call: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 4, "guidance_scale": 2.0}
    options: dict[str, Any] = {"objective": "attention-flops", "method": "global"}
    target = Target.min_ssim(0.5)
    plan = calibrate(attentive_pipeline(), call, target=target, out=tmp_path / "p.json", **options)
    assert Plan.load(tmp_path / "p.json") == plan


def test_it_is_shown_by_its_symbol_and_colour(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, uniform_strategies(sites, BEFORE_LAST), feed_forwards=True)
    console = Console(record=True, width=120)
    show_plan(console, plan, "toy")
    assert "FF----" in console.export_text()
    plan_map(plan, tmp_path / "plan.png", attention_kept=0.5)
    assert (tmp_path / "plan.png").stat().st_size > 0


def test_without_the_record_a_plan_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    text = make_plan(
        tiny, uniform_strategies(sites, BEFORE_LAST), feed_forwards=True
    ).model_dump_json()
    monkeypatch.setattr(table, "STRATEGIES", table.STRATEGIES[:-1])
    with pytest.raises(ValueError, match="unknown strategy 'before-last', expected one of: full"):
        Plan.parse(text)
