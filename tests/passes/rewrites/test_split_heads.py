"""Attentions split by heads: the same numbers, and whole again where heads agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ditfastattn import Plan
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site, SiteKind, attentions
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.head_groups import even_groups
from ditfastattn.passes.graph.ir import ATTENTION, aten, calls, clone, graph_text, outputs
from ditfastattn.passes.graph.verify import verify
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.hoist_invariants import find_hoisted
from ditfastattn.passes.rewrites.merge_heads import MergeHeads
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.rewrites.split_heads import groups_of, split_heads
from ditfastattn.passes.windows.forms import WINDOWED
from tests.heads import head_plan, split
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_model,
    captured_once,
    flat_inputs,
    tiny_dit,
    uniform_strategies,
)
from tests.tiers import slow_but

COND_FIRST = CfgLayout.COND_FIRST
FULL, SHARE = Strategy.FULL, Strategy.SHARE_STEP
TINY: dict[str, Any] = {**TINY_MODELS, "dit of 4 heads": lambda: tiny_dit(heads=4)}


class Heads(torch.nn.Module):
    """Attend by four heads, under a mask of each."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return linear(scaled_dot_product_attention(x, text, text, mask), self.out)


def four_heads(keys: int = 4) -> tuple[CapturedGraph, tuple[Site, ...]]:
    call = {
        "x": torch.randn(2, 4, 16, 8),
        "text": torch.randn(2, keys, 5, 8),
        "mask": torch.randn(1, 4, 16, 5),
    }
    captured = capture_model(Heads(), call)
    return captured, find_sites(captured).sites


GOLDEN_SPLIT = """\
%0 = input arg0_1: float32[2, 4, 16, 8]
%1 = input arg1_1: float32[2, 4, 5, 8]
%2 = input arg2_1: float32[1, 4, 16, 5]
%3 = input arg3_1: float32[8, 8]
%4 = aten.slice.Tensor(%0, 1, 0, 1): float32[2, 1, 16, 8]
%5 = aten.slice.Tensor(%1, 1, 0, 1): float32[2, 1, 5, 8]
%6 = aten.slice.Tensor(%1, 1, 0, 1): float32[2, 1, 5, 8]
%7 = aten.slice.Tensor(%2, 1, 0, 1): float32[1, 1, 16, 5]
%8 = aten.slice.Tensor(%0, 1, 1, 4): float32[2, 3, 16, 8]
%9 = aten.slice.Tensor(%1, 1, 1, 4): float32[2, 3, 5, 8]
%10 = aten.slice.Tensor(%1, 1, 1, 4): float32[2, 3, 5, 8]
%11 = aten.slice.Tensor(%2, 1, 1, 4): float32[1, 3, 16, 5]
%12 = aten.scaled_dot_product_attention.default(%4, %5, %6, %7): float32[2, 1, 16, 8]
%13 = aten.scaled_dot_product_attention.default(%8, %9, %10, %11): float32[2, 3, 16, 8]
%14 = aten.cat.default([%12, %13], 1): float32[2, 4, 16, 8]
%15 = aten.linear.default(%14, %3): float32[2, 4, 16, 8]
return [%15]"""


def test_golden_split() -> None:
    captured, sites = four_heads()
    divided = split_heads(captured, sites, {sites[0].name: (1, 3)}).captured
    assert graph_text(divided.module.graph) == GOLDEN_SPLIT


def test_golden_merged() -> None:
    captured, sites = four_heads()
    divided = split_heads(captured, sites, {sites[0].name: (1, 3)}).captured
    groups = tuple((site, FULL) for site in find_sites(divided).sites)
    assert [site.heads for site, _ in groups] == [1, 3]
    module = clone(divided.module)
    assert MergeHeads(groups).run(module).changed == 2
    EliminateDeadCode().run(module)
    assert graph_text(module.graph) == graph_text(captured.module.graph)
    assert MergeHeads(groups).run(module).changed == 0
    apart = tuple((site, SHARE if site.first_head else FULL) for site, _ in groups)
    assert MergeHeads(apart).run(clone(divided.module)).changed == 0


@pytest.mark.parametrize("count", slow_but({3}, [2, 3, 4]))
@pytest.mark.parametrize("name", list(TINY))
def test_the_split_graph_is_bitwise_the_same(name: str, count: int) -> None:
    tiny = TINY[name]()
    whole, divided = captured_once(tiny), split(tiny, count)
    verify(divided.graph.module, len(divided.graph.inputs), 1, "split-heads")
    made = len(calls(divided.graph.module.graph, ATTENTION))
    assert made == sum(min(count, site.heads) for site in whole.sites)
    inputs = flat_inputs(tiny, 0)
    with torch.no_grad():
        assert torch.equal(divided.graph.module(*inputs)[0], whole.graph.module(*inputs)[0])


@pytest.mark.parametrize("name", list(TINY))
def test_groups_are_sites_of_their_own(name: str) -> None:
    tiny = TINY[name]()
    whole, divided = captured_once(tiny), split(tiny, 2)
    assert [site for site in divided.every if site.whole is None] == [
        site for site in whole.every if site not in whole.sites
    ]
    for site in whole.sites:
        groups = [g for g in divided.every if g.whole is not None and g.whole.name == site.name]
        half = site.heads // 2
        assert [(g.name, g.first_head, g.heads) for g in groups] == [
            (f"{site.name}.heads_0_{half}", 0, half),
            (f"{site.name}.heads_{half}_{2 * half}", half, half),
        ]
        for group in groups:
            assert group.whole is not None
            assert (group.whole.exits, group.whole.heads) == (site.exits, site.heads)
            same = ("kind", "tokens", "head_dim", "grid", "windows", "text", "no_window", "ordinal")
            assert all(getattr(group, item) == getattr(site, item) for item in same)


def test_sizes_differ_by_one_at_most() -> None:
    assert even_groups(7, 3) == (2, 2, 3)
    assert even_groups(4, 9) == (1, 1, 1, 1)
    assert even_groups(4, 1) == (4,)


def test_what_cannot_be_split_stays_whole_with_its_reason() -> None:
    captured, sites = four_heads()
    name = sites[0].name
    reasons = split_heads(captured, sites, {name: (1, 2), "nowhere": (1, 1)}).declined
    assert reasons == {
        name: "it has 4 heads, the groups are of 1, 2",
        "nowhere": "the model has no such site",
    }
    found = captured_once(tiny_dit())
    branch = next(site for site in found.every if site not in found.sites)
    assert split_heads(found.graph, found.every, {branch.name: (1,)}).declined == {
        branch.name: "it is a feed-forward"
    }
    single = captured_once(tiny_dit(heads=1))
    declined = split_heads(single.graph, single.every, groups_of(single.every, 2))
    assert set(declined.declined.values()) == {"it has one head"}
    assert declined.captured is single.graph


def variant(
    tiny: TinyModel, count: int, rows: Sequence[tuple[Strategy, ...]], step: int
) -> CapturedGraph:
    found = split(tiny, count) if count > 1 else captured_once(tiny)
    program = unroll(rows, found.graph, attentions(found.every))
    actions = program.variants[program.schedule[step]]
    captured = CapturedGraph(
        rewrite(found.graph, program.sites, actions, COND_FIRST), found.graph.inputs
    )
    return captured


def nodes(captured: CapturedGraph) -> int:
    return len(calls(captured.module.graph, ATTENTION, *WINDOWED))


@pytest.mark.parametrize("strategy", strategies(), ids=str)
@pytest.mark.parametrize("name", slow_but({"dit of 4 heads"}, TINY))
def test_a_step_whose_heads_agree_costs_what_it_did(name: str, strategy: Strategy) -> None:
    tiny = TINY[name]()
    whole, divided = captured_once(tiny), attentions(split(tiny, 4).every)
    for step in range(6):
        before = variant(tiny, 1, uniform_strategies(whole.sites, strategy), step)
        after = variant(tiny, 4, uniform_strategies(divided, strategy), step)
        assert nodes(after) == nodes(before)
        flops = [count_flops(each.module.graph) for each in (before, after)]
        assert flops[0].attention == flops[1].attention
        if not strategy.extrapolates:  # the curves of its groups meet before the projection
            assert flops[0] == flops[1]


def test_neighbours_of_one_strategy_are_one_attention() -> None:
    tiny = tiny_dit(heads=4)
    rows = [(FULL,) * 12, (FULL, FULL, FULL, SHARE) * 3, (SHARE, FULL, SHARE, FULL) * 3]
    dense, first, second = (variant(tiny, 4, rows, step) for step in range(3))
    assert [nodes(dense), nodes(first), nodes(second)] == [3, 3, 6]
    attention = [count_flops(each.module.graph).attention for each in (dense, first, second)]
    assert attention == [attention[0], attention[0] * 3 // 4, attention[0] // 2]


def test_windows_of_unlike_forms_stay_apart() -> None:
    tiny = tiny_dit(heads=4, size=16)
    found = split(tiny, 2)
    groups = list(attentions(found.every))
    assert len(groups[0].windows) == 3
    groups[0] = replace(groups[0], window=groups[0].windows[1])
    rows = [(FULL,) * 6, (Strategy.WINDOW,) * 6]
    program = unroll(rows, found.graph, groups)
    actions = program.variants[program.schedule[1]]
    module = rewrite(found.graph, program.sites, actions, COND_FIRST)
    assert len(calls(module.graph, *WINDOWED)) == 4  # two in the first block


def test_an_attention_shares_no_step_behind_a_line() -> None:
    found = split(tiny_dit(heads=4), 2)
    line = Strategy.EXTRAPOLATE
    column = [(FULL, FULL), (FULL, FULL), (line, SHARE), (SHARE, SHARE), (SHARE, SHARE)]
    rows = [pair * 3 for pair in column]
    program = unroll(rows, found.graph, attentions(found.every))
    whole = len(program.sites) - 1
    done = [program.variants[variant][whole].strategy for variant in program.schedule]
    assert done == [FULL, FULL, FULL, FULL, SHARE]
    merged = unroll(rows, found.graph, attentions(found.every), merge_variants=True)
    assert len(merged.variants) == len(set(rows))


def test_the_keys_of_the_text_are_hoisted_for_all_heads_at_once() -> None:
    tiny = TINY_MODELS["pixart"]()
    whole, divided = captured_once(tiny), split(tiny, 2)
    names = [entry.name for entry in whole.graph.inputs]
    varying = [names.index(name) for name in ("hidden_states", "timestep")]
    found = find_hoisted(whole.graph, varying)
    assert len(found) >= 2 * len([site for site in whole.sites if site.kind is SiteKind.CROSS])
    assert find_hoisted(divided.graph, varying) == found


def test_a_cache_of_merged_heads_is_no_view_of_all() -> None:
    tiny = tiny_dit(heads=4)
    rows = [(FULL,) * 12, (FULL, FULL, FULL, SHARE) * 3]
    graph = variant(tiny, 4, rows, 0).module.graph
    written = outputs(graph)[1:]
    assert len(written) == 3
    assert {getattr(node, "target", None) for node in written} == {aten.clone.default}


def test_a_plan_holds_the_groups_and_one_without_is_as_before() -> None:
    tiny = tiny_dit(heads=4)
    plan = head_plan(tiny, 3, [(FULL,) * 12] * 6)
    assert plan.head_groups == {f"transformer_blocks.{i}.attn1": (1, 1, 2) for i in range(3)}
    assert Plan.parse(plan.model_dump_json()) == plan
    whole = head_plan(tiny, 1, [(FULL,) * 6] * 6)
    assert "group" not in whole.model_dump_json()
    assert whole.head_groups == {}
