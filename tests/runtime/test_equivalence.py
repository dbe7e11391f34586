"""The rewritten graph computes what the plan interpreter computes."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.lowering import Lowering
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    capture_sites,
    compile_plan,
    largest_difference,
    make_plan,
    mixed_strategies,
    run_plan,
    uniform_strategies,
)
from tests.tiers import slow_but

LAYOUTS = (CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST)


def strategies_by_layout() -> list[Any]:
    """Return pairs; those that halve no batch, of which the order matters, are quick in one."""
    return [
        pytest.param(
            *(strategy, layout),
            id=f"{strategy}-{layout}",
            marks=() if strategy.shares_guidance or layout is LAYOUTS[0] else pytest.mark.slow,
        )
        for strategy, layout in product(strategies(), LAYOUTS)
    ]


@pytest.mark.parametrize(("strategy", "layout"), strategies_by_layout())
@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_each_strategy_equals_the_reference(
    name: str, strategy: Strategy, layout: CfgLayout
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    strategies = uniform_strategies(sites, strategy)
    expected = tiny.reference(strategies, sites, layout)
    got = run_plan(tiny, make_plan(tiny, strategies, layout, feed_forwards=True))
    assert largest_difference(got, expected) < 1e-5
    changed = any(item != Strategy.FULL for item in strategies[-1])
    dense = tiny.run(tiny.model)
    assert (largest_difference(expected, dense) > 1e-3) == changed  # the oracle is not dense


@pytest.mark.parametrize(
    ("seed", "layout"), slow_but({(1, LAYOUTS[0]), (2, LAYOUTS[1])}, product([1, 2], LAYOUTS))
)
@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_mixed_plans_equal_the_reference(name: str, seed: int, layout: CfgLayout) -> None:
    tiny = TINY_MODELS[name](seed)
    _, sites = capture_every_site(tiny)
    strategies = mixed_strategies(sites, seed)
    expected = tiny.reference(strategies, sites, layout)
    got = tiny.run(compile_plan(tiny, make_plan(tiny, strategies, layout, feed_forwards=True)))
    assert largest_difference(got, expected) < 1e-5


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_an_all_full_plan_is_bitwise_dense(name: str) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_sites(tiny)
    plan = make_plan(tiny, uniform_strategies(sites, Strategy.FULL))
    assert largest_difference(run_plan(tiny, plan), tiny.run(tiny.model)) == 0.0


@pytest.mark.parametrize("variants", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_compiled_variants_equal_the_reference(variants: int) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    strategies = (mixed_strategies(sites, seed=3)[:variants] * 3)[:6]
    expected = tiny.reference(strategies, sites, CfgLayout.COND_FIRST)
    plan = make_plan(tiny, strategies, feed_forwards=True)
    assert largest_difference(run_plan(tiny, plan, Lowering.INDUCTOR), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        *((name, Lowering.EAGER) for name in TINY_MODELS),
        pytest.param("dit", Lowering.INDUCTOR, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_equals_the_reference_in_bfloat16(name: str, lowering: Lowering) -> None:
    narrow = in_bfloat16(TINY_MODELS[name]())
    _, sites = capture_every_site(narrow)
    strategies = mixed_strategies(sites, seed=3)
    if lowering is Lowering.INDUCTOR:
        strategies = strategies[:2] * 3  # two variants to compile in place of six
    plan = make_plan(narrow, strategies, feed_forwards=True)
    assert plan.model.dtype == "bfloat16"
    expected = narrow.reference(strategies, sites, CfgLayout.COND_FIRST)
    got = run_plan(narrow, plan, lowering)
    assert {item.dtype for item in got} == {torch.bfloat16}
    largest = max(float(item.abs().max()) for item in expected)
    step = 2.0**-8  # of bfloat16's mantissa; the sums of a few layers lose several
    assert largest_difference(got, expected) < 8 * step * largest


_TEXT = ("encoder_hidden_states", "pooled_projections")


def in_bfloat16(tiny: TinyModel) -> TinyModel:
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)

    def call(step: int, batch: int) -> dict[str, Any]:
        given = tiny.call(step, batch)
        return {
            key: item.to(torch.bfloat16) if key in ("hidden_states", *_TEXT) else item
            for key, item in given.items()
        }

    return TinyModel(model, call)
