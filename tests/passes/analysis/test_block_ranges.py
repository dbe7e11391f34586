"""Ranges of blocks are found by data flow, whatever the blocks are, or refused with the reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from ditfastattn import Strategy
from ditfastattn.passes.analysis.block_ranges import BlockRanges
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import ATTENTION, calls, graph_text
from ditfastattn.passes.plan.actions import DENSE, SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import declined_strategies, legal_strategies
from ditfastattn.passes.rewrites.pipeline import rewrite
from tests.helpers import TINY_MODELS, capture_every_site, capture_model
from tests.ranges import block_range

FULL, SHARE = Strategy.FULL, Strategy.SHARE_STEP


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        q = linear(layer_norm(x, (8,)), self.query)
        return gate * scaled_dot_product_attention(q, x, x)


class Stack(nn.Module):
    """Three residual blocks; as asked, with a long skip connection, or without residuals."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        early, *others = self.blocks
        x = first = x + early(x, gate)
        for block in others:
            x = block(x, gate) if self.kind == "replacing" else x + block(x, gate)
        return x + 0.5 * first if self.kind == "skipping" else x


@cache
def stack(kind: str) -> tuple[CapturedGraph, tuple[Site, ...]]:
    call = {"x": torch.randn(2, 1, 16, 8), "gate": torch.randn(2, 1, 1, 1)}
    captured = capture_model(Stack(kind), call)
    return captured, find_sites(captured).sites


def found(kind: str, first: int, last: int) -> Site:
    captured, sites = stack(kind)
    return BlockRanges(captured, sites).site(sites[first].name, sites[last].name)


def latent(kind: str) -> str:
    return stack(kind)[0].node("x").name


def test_a_range_goes_from_stream_to_stream() -> None:
    every, later, last = (found("plain", *ends) for ends in ((0, 2), (1, 2), (2, 2)))
    assert every.bases == (latent("plain"),)
    assert every.exits == later.exits == last.exits
    assert later.bases != last.bases
    assert (later.kind, later.tokens, later.head_dim) == (SiteKind.BLOCKS, 16, 8)
    assert later.name == f"{later.ends[0]}..{later.ends[1]}"


def test_joint_attention_has_two_streams_but_after_its_last_block() -> None:
    captured, sites = capture_every_site(TINY_MODELS["sd3"]())
    spans = [block_range(captured, sites, *ends) for ends in ((0, 0), (0, 1), (1, 2))]
    assert [len(span.exits) for span in spans] == [2, 2, 1]
    assert spans[0].tokens == 16 + 5


def test_a_long_skip_connection_is_in_the_way_of_some_ranges() -> None:
    assert found("skipping", 0, 0).bases == (latent("skipping"),)
    for ends in ((1, 1), (0, 1), (1, 2), (2, 2)):
        with pytest.raises(ValueError, match="the hidden stream is all that is handed on"):
            found("skipping", *ends)


def test_blocks_that_add_nothing_to_a_stream_are_refused() -> None:
    assert found("replacing", 0, 0).bases == (latent("replacing"),)
    with pytest.raises(ValueError, match="goes on by additions"):
        found("replacing", 1, 2)
    with pytest.raises(ValueError, match="has no site nowhere"):
        BlockRanges(*stack("plain")).site("nowhere", "nowhere")


def test_what_a_range_may_do() -> None:
    site = found("plain", 1, 2)
    reuse = (SHARE, Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC)
    for layout in CfgLayout:
        assert legal_strategies(site, layout) == (FULL, *reuse)
    reasons = declined_strategies(site)
    assert "a range of blocks" in reasons[Strategy.WINDOW]
    assert "streams of their own" in reasons[Strategy.SHARE_CFG]


def test_the_blocks_of_a_range_are_gone_where_it_is_reused() -> None:
    captured, sites = stack("plain")
    span = found("plain", 1, 2)
    every = (*sites, span)
    store = rewrite(captured, every, (*[DENSE] * 3, SiteAction(FULL, True)), CfgLayout.NONE)
    share = rewrite(captured, every, (*[DENSE] * 3, SiteAction(SHARE)), CfgLayout.NONE)
    assert len(calls(store.graph, ATTENTION)) == 3
    assert graph_text(store.graph).endswith(
        """
%20 = aten.sub.Tensor(%19, %9): float32[2, 1, 16, 8]
return [%19, %20]"""
    )
    assert (
        graph_text(share.graph)
        == """\
%0 = input arg0_1: float32[2, 1, 16, 8]
%1 = input arg1_1: float32[8, 8]
%2 = input arg2_1: float32[2, 1, 1, 1]
%3 = input arg3_1: float32[8, 8]
%4 = input arg4_1: float32[8, 8]
%5 = input cache_blocks_1__blocks_2_output_0: float32[2, 1, 16, 8]
%6 = aten.layer_norm.default(%0, [8]): float32[2, 1, 16, 8]
%7 = aten.linear.default(%6, %1): float32[2, 1, 16, 8]
%8 = aten.scaled_dot_product_attention.default(%7, %0, %0): float32[2, 1, 16, 8]
%9 = aten.mul.Tensor(%2, %8): float32[2, 1, 16, 8]
%10 = aten.add.Tensor(%0, %9): float32[2, 1, 16, 8]
%11 = aten.add.Tensor(%10, %5): float32[2, 1, 16, 8]
return [%11]"""
    )
