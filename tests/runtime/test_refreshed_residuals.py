"""A step that shares guidance may refresh the residual: of the conditional half, for both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.slots import residual_slot
from ditfastattn.passes.plan.guidance import GuidanceCall
from ditfastattn.passes.plan.legality import legal_strategies, why_not
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.reference import PlanInterpreter
from tests.export.helpers import export_tiny
from tests.heads import head_plan, split
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    captured_once,
    largest_difference,
    make_plan,
    run_plan,
    tiny_dit,
)
from tests.runtime import test_separate_guidance as two_calls
from tests.tiers import slow, slow_but

F, W, S, C = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG
X, R = Strategy.WINDOW_SHARE_CFG, Strategy.SHARE_CFG_REFRESH
AFTER_FULL, FROM_THE_START = (F, W, R, W, X, W), (R, W, X, C, R, W)
LAYOUTS = (CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST)
Rows = list[tuple[Strategy, ...]]


def rows_of(sites: Sequence[Site], column: Sequence[Strategy]) -> Rows:
    """Return the plan in which all sites do ``column``, as far as they have a window."""
    return [
        tuple(F if strategy.needs_window and site.no_window else strategy for site in sites)
        for strategy in column
    ]


@pytest.mark.parametrize(
    ("name", "layout", "column"),
    slow_but(
        [("dit", LAYOUTS[0], AFTER_FULL), ("pixart", LAYOUTS[1], FROM_THE_START)],
        product(TINY_MODELS, LAYOUTS, (AFTER_FULL, FROM_THE_START)),
    ),
)
def test_graphs_equal_the_interpreter(
    name: str, layout: CfgLayout, column: Sequence[Strategy]
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    rows = rows_of(sites, column)
    expected = tiny.reference(rows, sites, layout)
    got = run_plan(tiny, make_plan(tiny, rows, layout, feed_forwards=True))
    assert largest_difference(got, expected) < 1e-5
    old = [tuple(C if entry is R else entry for entry in row) for row in rows]
    if column is AFTER_FULL:  # which share-cfg leaves as it is
        assert largest_difference(tiny.reference(old, sites, layout), expected) > 1e-4


@pytest.mark.slow
def test_compiled_graphs_equal_the_interpreter() -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    rows = rows_of(sites, AFTER_FULL)
    expected = tiny.reference(rows, sites, LAYOUTS[0])
    plan = make_plan(tiny, rows, feed_forwards=True)
    assert largest_difference(run_plan(tiny, plan, Lowering.INDUCTOR), expected) < 1e-5


@pytest.mark.parametrize("layout", [slow(LAYOUTS[0]), LAYOUTS[1]])
def test_a_bundle_equals_the_interpreter(layout: CfgLayout, tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    rows = rows_of(sites, AFTER_FULL)
    export_tiny(tiny, rows, tmp_path / "bundle", layout)
    expected = tiny.reference(rows, sites, layout)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


@pytest.mark.parametrize(
    "column", [AFTER_FULL, *map(slow, [(FROM_THE_START,), ((F, R, W, R, X, W),)])]
)
def test_the_second_of_two_calls_takes_over_the_residual(column: Sequence[Strategy]) -> None:
    tiny = TINY_MODELS["dit"]()
    rows = rows_of(captured_once(tiny, two_calls.BATCH).every, column)
    expected = two_calls.reference(tiny, rows)
    model = two_calls.compiled(tiny, two_calls.plan_of(tiny, rows))
    assert largest_difference(two_calls.run(tiny, model), expected) < 1e-5
    assert largest_difference(two_calls.run(tiny, model), expected) < 1e-5  # a second generation


def test_the_interpreter_attends_half_and_stores_it_twice() -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    rows = rows_of(sites, (R, W))

    def residuals(layout: CfgLayout) -> Tensor:
        interpreter = PlanInterpreter(tiny.model, rows, sites, layout)
        with torch.no_grad(), interpreter.step(0):
            tiny.model(**tiny.call(0, 4))
        return interpreter._branch.residuals[0]

    first, second = residuals(LAYOUTS[0]), residuals(LAYOUTS[1])
    assert torch.equal(first[:2], first[2:])
    assert torch.equal(second[:2], second[2:])
    assert not torch.allclose(first, second, atol=1e-4)  # another half


@pytest.mark.parametrize("layout", [LAYOUTS[0], slow(LAYOUTS[1])])
def test_heads_that_agree_equal_the_interpreter(layout: CfgLayout) -> None:
    tiny = tiny_dit(heads=4)
    sites = split(tiny, 2).every
    rows = rows_of(sites, (F, R, S, W, R, W))
    expected = tiny.reference(rows, sites, layout)
    got = run_plan(tiny, head_plan(tiny, 2, rows, layout))
    assert largest_difference(got, expected) < 1e-5


def test_half_of_the_work_is_done_and_the_residual_is_stored_where_it_is_read() -> None:
    tiny = TINY_MODELS["dit"]()
    captured, sites = capture_every_site(tiny)
    program = unroll(rows_of(sites, (F, R, R, W, W, R)), captured, sites)
    residuals = [s for s in program.slots.slots if s.slot == residual_slot(sites[0].name)]
    assert [slot.lives for slot in residuals] == [((2, 4),)]

    def attention(step: int) -> int:
        actions = program.variants[program.schedule[step]]
        graph = rewrite(captured, program.sites, actions, LAYOUTS[0]).graph
        return count_flops(graph).attention

    assert attention(1) == attention(0) // 2
    windowed = attention(3)
    assert attention(2) == attention(1) + windowed // 2
    assert attention(5) == attention(1)  # nothing reads it


def test_it_is_legal_where_there_is_a_window_and_the_conditional_branch_comes_first() -> None:
    _, sites = capture_every_site(TINY_MODELS["dit"]())
    attention, feed_forward = sites[:2]
    assert R in legal_strategies(attention)
    assert R in legal_strategies(attention, CfgLayout.SEPARATE)
    assert why_not(R, feed_forward) == feed_forward.no_window
    assert why_not(R, attention, CfgLayout.NONE)
    assert "unconditional call" in why_not(R, attention, CfgLayout.SEPARATE_UNCOND_FIRST)


def test_older_plans_mean_what_they_did() -> None:
    """A plan of an older version has no such entry: its residuals are those of full steps."""
    tiny = TINY_MODELS["dit"]()
    captured, sites = capture_every_site(tiny)
    plan = make_plan(tiny, rows_of(sites, (F, W, C, W, X, W)), feed_forwards=True)
    again = Plan.parse(plan.model_dump_json())
    program = unroll(again.strategies, captured, sites)
    (slot,) = [s for s in program.slots.slots if s.slot == residual_slot(sites[0].name)]
    assert slot.lives == ((0, 5),)


def second_program(tiny: TinyModel, column: Sequence[Strategy]) -> list[bool]:
    """Return at which steps the second call adopts the first site's residual."""
    found = captured_once(tiny, two_calls.BATCH)
    rows = rows_of(found.every, column)
    program = unroll(rows, found.graph, found.every, call=GuidanceCall.SECOND)
    slot = residual_slot(found.every[0].name)
    return [slot in program.slots.adopted_at(step) for step in range(len(column))]


def test_a_residual_is_handed_over_only_if_the_second_call_will_read_it() -> None:
    tiny = TINY_MODELS["dit"]()
    assert second_program(tiny, (F, R, W, R, X, X)) == [False, True, False, False, False, False]
    assert second_program(tiny, (F, R, R, W, F, W)) == [False, False, True, False, False, False]
