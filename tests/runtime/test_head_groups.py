"""Heads with strategies of their own: interpreter, rewritten graph and bundle agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy, load
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.reference import PlanInterpreter
from tests.export.helpers import export_once
from tests.heads import head_plan, split
from tests.helpers import (
    STEPS,
    TINY_MODELS,
    largest_difference,
    run_plan,
    tiny_dit,
    uniform_strategies,
)
from tests.tiers import slow_but

FULL, SHARE = Strategy.FULL, Strategy.SHARE_STEP
LAYOUTS = (CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST)
TINY: dict[str, Any] = {**TINY_MODELS, "dit of 4 heads": lambda: tiny_dit(heads=4)}
Rows = list[tuple[Strategy, ...]]


def some_rows(sites: Sequence[Site], seed: int, steps: int = STEPS) -> Rows:
    """Return a random legal schedule in which all groups of an attention often do the same."""
    generator = random.Random(seed)
    together = _attentions(sites)
    computed = [1] * len(sites)
    rows: Rows = [(FULL,) * len(sites)]
    while len(rows) < steps:
        row = [FULL] * len(sites)
        for members in together:
            legal = [_legal(sites[index], computed[index]) for index in members]
            common = generator.choice([strategy for strategy in legal[0] if strategy in legal[-1]])
            agree = generator.random() < 0.5 and all(common in each for each in legal)
            for index, each in zip(members, legal, strict=True):
                row[index] = common if agree else generator.choice(each)
                computed[index] += row[index].computes
        rows.append(tuple(row))
    return rows


def _attentions(sites: Sequence[Site]) -> list[list[int]]:
    """Return the sites by the attention they are groups of; others are by themselves."""
    found: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        found.setdefault(site.name if site.whole is None else site.whole.name, []).append(index)
    return list(found.values())


def _legal(site: Site, computed: int) -> list[Strategy]:
    return [
        strategy
        for strategy in strategies()
        if not why_not(strategy, site) and computed >= strategy.outputs_read
    ]


@pytest.mark.parametrize("seed", slow_but({1, 2}, range(4)))  # one of each layout
@pytest.mark.parametrize("name", slow_but({"pixart", "sd3", "dit of 4 heads"}, TINY))
def test_mixed_heads_equal_the_reference(name: str, seed: int) -> None:
    tiny, layout = TINY[name](), LAYOUTS[seed // 2]
    sites = split(tiny, 4).every
    rows = some_rows(sites, seed)
    expected = tiny.reference(rows, sites, layout)
    plan = head_plan(tiny, 4, rows, layout)
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5


@pytest.mark.parametrize("strategy", strategies(), ids=str)
def test_heads_that_agree_equal_the_whole_site(strategy: Strategy) -> None:
    tiny = tiny_dit(heads=4)
    groups, whole = split(tiny, 2).sites, split(tiny, 1).sites
    rows = uniform_strategies(groups, strategy)
    expected = tiny.reference(uniform_strategies(whole, strategy), whole, LAYOUTS[0])
    assert largest_difference(tiny.reference(rows, groups, LAYOUTS[0]), expected) < 1e-5
    plan = head_plan(tiny, 2, rows, feed_forwards=False)
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5


@pytest.mark.slow  # heads without Inductor, and Inductor without heads, are tested by default
def test_compiled_heads_equal_the_reference() -> None:
    tiny = tiny_dit(heads=4, layers=2)
    sites = split(tiny, 4).every
    rows = some_rows(sites, 3)[:2] * 3
    expected = tiny.reference(rows, sites, LAYOUTS[0])
    got = run_plan(tiny, head_plan(tiny, 4, rows), Lowering.INDUCTOR)
    assert largest_difference(got, expected) < 1e-5


@pytest.mark.parametrize("seed", [1, 2])
def test_merged_variants_equal_the_reference(seed: int) -> None:
    tiny = tiny_dit(heads=4)
    sites = split(tiny, 4).sites
    rows = [row for row in some_rows(sites, seed)[:4]]
    rows += [rows[1], rows[2]]
    plan = head_plan(tiny, 4, rows, feed_forwards=False).model_copy(update={"merge_variants": True})
    expected = tiny.reference(rows, sites, LAYOUTS[0])
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5


@pytest.mark.parametrize("seed", slow_but({1}, [0, 1]))
@pytest.mark.parametrize("name", slow_but({"sd3", "dit of 4 heads"}, TINY))
def test_guidance_in_two_calls_equals_the_reference(name: str, seed: int) -> None:
    tiny = TINY[name]()
    sites = split(tiny, 4, batch=2).every
    layout = CfgLayout.SEPARATE
    rows = some_rows(sites, seed)
    interpreter = PlanInterpreter(tiny.model, rows, sites, layout)
    plan = head_plan(tiny, 4, rows, layout)
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    torch._dynamo.reset()
    model: Any = torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)
    for step in range(STEPS):
        for call in range(2):
            given = tiny.call(step, 2)
            for item in ("class_labels", "encoder_hidden_states"):
                if call and item in given:
                    given[item] = given[item].flip(0)
            with torch.no_grad():
                got = model(**given)[0]
                with interpreter.step(step, call):
                    expected = tiny.model(**given)[0]
            assert largest_difference([got], [expected]) < 1e-5


@pytest.mark.parametrize("name", slow_but({"dit"}, TINY))
def test_a_bundle_of_mixed_heads_equals_the_reference(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]()
    sites = split(tiny, 4).every
    rows = some_rows(sites, 3)
    plan = head_plan(tiny, 4, rows)
    export_once(tiny, plan, tmp_path / "bundle")
    expected = tiny.reference(rows, sites, LAYOUTS[0])
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


def test_a_plan_of_other_heads_is_refused() -> None:
    tiny = tiny_dit(heads=4)
    data = head_plan(tiny, 2, [(FULL,) * 6] * STEPS, feed_forwards=False).model_dump()
    for site in data["sites"]:
        site["group"]["of"], site["heads"] = 6, 3
        site["group"]["first"] = 3 if site["group"]["first"] else 0
    with pytest.raises(ConfigError, match=r"plan\.sites[\s\S]*attn1"):
        run_plan(tiny, Plan.model_validate(data))
