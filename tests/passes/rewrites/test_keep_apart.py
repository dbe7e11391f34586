"""Caches that share memory with what the caller holds are copied, and no others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ditfastattn import Strategy
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import aten, calls, clone
from ditfastattn.passes.rewrites.base import Pass
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from ditfastattn.passes.rewrites.store_caches import StoreCaches
from tests.helpers import capture_model
from tests.passes.rewrites.test_rewrites import GOLDEN_INPUTS, after, block


class Returning(torch.nn.Module):
    """Return the attention's projection, gated and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(8, 8))
        self.out = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        projected = linear(scaled_dot_product_attention(linear(x, self.query), x, x), self.out)
        return gate * projected, projected


def returning() -> tuple[CapturedGraph, Site]:
    call = {"x": torch.randn(2, 1, 16, 8), "gate": torch.randn(2, 1, 1, 1)}
    captured = capture_model(Returning(), call)
    (site,) = find_sites(captured).sites
    return captured, site


def test_golden_store() -> None:
    captured, site = returning()
    assert after(captured, StoreCaches((site,), ())) == GOLDEN_INPUTS + (
        "%4 = aten.linear.default(%1, %0): float32[2, 1, 16, 8]\n"
        "%5 = aten.scaled_dot_product_attention.default(%4, %1, %1): float32[2, 1, 16, 8]\n"
        "%6 = aten.linear.default(%5, %2): float32[2, 1, 16, 8]\n"
        "%7 = aten.clone.default(%6): float32[2, 1, 16, 8]\n"
        "%8 = aten.mul.Tensor(%3, %6): float32[2, 1, 16, 8]\n"
        "return [%8, %6, %7]"
    )


def test_golden_reuse() -> None:
    captured, site = returning()
    passes: tuple[Pass, ...] = ReuseOutputs(((site, Strategy.SHARE_STEP),)), EliminateDeadCode()
    assert after(captured, *passes) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_output_0: float32[2, 1, 16, 8]\n"
        "%5 = aten.clone.default(%4): float32[2, 1, 16, 8]\n"
        "%6 = aten.mul.Tensor(%3, %4): float32[2, 1, 16, 8]\n"
        "return [%6, %5]"
    )


def test_a_second_run_copies_nothing() -> None:
    captured, site = returning()
    module = clone(captured.module)
    assert StoreCaches((site,), (site,)).run(module).changed == 3
    assert keep_caches_apart(module.graph) == 0


def test_near_miss_what_is_not_returned_is_not_copied() -> None:
    captured, site = block()
    module = clone(captured.module)
    assert StoreCaches((site,), (site,)).run(module).changed == 2
    assert calls(module.graph, aten.clone.default) == []
