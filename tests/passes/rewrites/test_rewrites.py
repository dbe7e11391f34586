"""Each pass: golden text, near misses, idempotence; and proof that skipped work is gone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import dropout, layer_norm, linear, scaled_dot_product_attention

from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.canonicalize import canonicalize
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import ATTENTION, aten, calls, clone, graph_text, value
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.plan.actions import DENSE, SiteAction
from ditfastattn.passes.plan.curves import change_factors
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.base import Pass
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.hoist_batch_slices import HoistBatchSlices, insert_half
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from ditfastattn.passes.rewrites.share_guidance import ShareGuidance
from ditfastattn.passes.rewrites.store_caches import StoreCaches
from ditfastattn.passes.rewrites.window_residual import WindowResidual
from tests.helpers import TINY_MODELS, capture_model, capture_sites

COND_FIRST = CfgLayout.COND_FIRST


class Block(torch.nn.Module):
    """Attend with a query projection and an output projection, the least there is to share."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(8, 8))
        self.out = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        q = linear(x, self.query)
        return gate * linear(scaled_dot_product_attention(q, x, x), self.out)


def block() -> tuple[CapturedGraph, Site]:
    call = {"x": torch.randn(2, 1, 16, 8), "gate": torch.randn(2, 1, 1, 1)}
    captured = capture_model(Block(), call)
    (site,) = find_sites(captured).sites
    return captured, site


def after(captured: CapturedGraph, *passes: Pass) -> str:
    module = clone(captured.module)
    for step in passes:
        assert step.run(module).changed > 0
    return graph_text(module.graph)


GOLDEN_INPUTS = """\
%0 = input arg0_1: float32[8, 8]
%1 = input arg1_1: float32[2, 1, 16, 8]
%2 = input arg2_1: float32[8, 8]
%3 = input arg3_1: float32[2, 1, 1, 1]
"""


def test_golden_dense() -> None:
    captured, _ = block()
    assert graph_text(captured.module.graph) == GOLDEN_INPUTS + (
        "%4 = aten.linear.default(%1, %0): float32[2, 1, 16, 8]\n"
        "%5 = aten.scaled_dot_product_attention.default(%4, %1, %1): float32[2, 1, 16, 8]\n"
        "%6 = aten.linear.default(%5, %2): float32[2, 1, 16, 8]\n"
        "%7 = aten.mul.Tensor(%3, %6): float32[2, 1, 16, 8]\n"
        "return [%7]"
    )


def test_golden_window_residual() -> None:
    captured, site = block()
    assert after(captured, WindowResidual((site,))) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_residual: float32[2, 1, 16, 8]\n"
        "%5 = aten.linear.default(%1, %0): float32[2, 1, 16, 8]\n"
        "%6 = ditfastattn.window_attention.default(%5, %1, %1, 2, 0.35355339059327373): "
        "float32[2, 1, 16, 8]\n"
        "%7 = aten.add.Tensor(%6, %4): float32[2, 1, 16, 8]\n"
        "%8 = aten.linear.default(%7, %2): float32[2, 1, 16, 8]\n"
        "%9 = aten.mul.Tensor(%3, %8): float32[2, 1, 16, 8]\n"
        "return [%9]"
    )


def test_golden_share_across_steps() -> None:
    captured, site = block()
    assert after(
        captured, ReuseOutputs(((site, Strategy.SHARE_STEP),)), EliminateDeadCode()
    ) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_output_0: float32[2, 1, 16, 8]\n"
        "%5 = aten.mul.Tensor(%3, %4): float32[2, 1, 16, 8]\n"
        "return [%5]"
    )


def test_golden_extrapolate_steps() -> None:
    captured, site = block()
    assert after(
        captured, ReuseOutputs(((site, Strategy.EXTRAPOLATE),)), EliminateDeadCode()
    ) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_factor_0: float32[]\n"
        "%5 = input cache_attention_0_output_0: float32[2, 1, 16, 8]\n"
        "%6 = input cache_attention_0_output_0_1: float32[2, 1, 16, 8]\n"
        "%7 = aten.sub.Tensor(%5, %6): float32[2, 1, 16, 8]\n"
        "%8 = aten.mul.Tensor(%7, %4): float32[2, 1, 16, 8]\n"
        "%9 = aten.add.Tensor(%5, %8): float32[2, 1, 16, 8]\n"
        "%10 = aten.mul.Tensor(%3, %9): float32[2, 1, 16, 8]\n"
        "return [%10]"
    )


def test_golden_extrapolate_steps_quadratic() -> None:
    captured, site = block()
    assert after(
        captured, ReuseOutputs(((site, Strategy.EXTRAPOLATE_QUADRATIC),)), EliminateDeadCode()
    ) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_factor_0: float32[]\n"
        "%5 = input cache_attention_0_factor_1: float32[]\n"
        "%6 = input cache_attention_0_output_0: float32[2, 1, 16, 8]\n"
        "%7 = input cache_attention_0_output_0_1: float32[2, 1, 16, 8]\n"
        "%8 = input cache_attention_0_output_0_2: float32[2, 1, 16, 8]\n"
        "%9 = aten.sub.Tensor(%6, %7): float32[2, 1, 16, 8]\n"
        "%10 = aten.mul.Tensor(%9, %4): float32[2, 1, 16, 8]\n"
        "%11 = aten.add.Tensor(%6, %10): float32[2, 1, 16, 8]\n"
        "%12 = aten.sub.Tensor(%7, %8): float32[2, 1, 16, 8]\n"
        "%13 = aten.mul.Tensor(%12, %5): float32[2, 1, 16, 8]\n"
        "%14 = aten.add.Tensor(%11, %13): float32[2, 1, 16, 8]\n"
        "%15 = aten.mul.Tensor(%3, %14): float32[2, 1, 16, 8]\n"
        "return [%15]"
    )


@pytest.mark.parametrize("gaps", [(1, 1), (3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("elapsed", [1, 2, 7])
def test_a_parabola_at_any_spacing_is_followed_exactly(gaps: tuple[int, int], elapsed: int) -> None:
    def curve(step: float) -> float:
        return 0.25 * step**2 - 3.0 * step + 2.0

    last, previous, earlier = curve(0), curve(-gaps[0]), curve(-sum(gaps))
    distance, curvature = change_factors(elapsed, gaps)
    found = last + distance * (last - previous) + curvature * (previous - earlier)
    assert found == pytest.approx(curve(elapsed), rel=1e-12)
    (line,) = change_factors(elapsed, gaps[:1])
    assert last + line * (last - previous) != pytest.approx(curve(elapsed), rel=1e-3)


def test_golden_store_caches() -> None:
    captured, site = block()
    assert after(captured, StoreCaches((site,), (site,))) == GOLDEN_INPUTS + (
        "%4 = aten.linear.default(%1, %0): float32[2, 1, 16, 8]\n"
        "%5 = aten.scaled_dot_product_attention.default(%4, %1, %1): float32[2, 1, 16, 8]\n"
        "%6 = ditfastattn.window_attention.default(%4, %1, %1, 2, 0.35355339059327373): "
        "float32[2, 1, 16, 8]\n"
        "%7 = aten.sub.Tensor(%5, %6): float32[2, 1, 16, 8]\n"
        "%8 = aten.linear.default(%5, %2): float32[2, 1, 16, 8]\n"
        "%9 = aten.mul.Tensor(%3, %8): float32[2, 1, 16, 8]\n"
        "return [%9, %8, %7]"
    )


@pytest.mark.parametrize(
    ("layout", "rows"), [(CfgLayout.COND_FIRST, "0, 1"), (CfgLayout.UNCOND_FIRST, "1, 2")]
)
def test_golden_share_across_cfg(layout: CfgLayout, rows: str) -> None:
    captured, site = block()
    assert after(captured, ShareGuidance((site,), layout), HoistBatchSlices()) == GOLDEN_INPUTS + (
        f"%4 = aten.slice.Tensor(%1, 0, {rows}): float32[1, 1, 16, 8]\n"
        "%5 = aten.linear.default(%4, %0): float32[1, 1, 16, 8]\n"
        "%6 = aten.scaled_dot_product_attention.default(%5, %4, %4): float32[1, 1, 16, 8]\n"
        "%7 = aten.linear.default(%6, %2): float32[1, 1, 16, 8]\n"
        "%8 = aten.cat.default([%7, %7]): float32[2, 1, 16, 8]\n"
        "%9 = aten.mul.Tensor(%3, %8): float32[2, 1, 16, 8]\n"
        "return [%9]"
    )


def test_canonicalize_drops_what_computes_nothing() -> None:
    class Idle(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dropout(x.to(torch.float32), 0.5, training=False) / 1.0 + 1

    module = capture_model(Idle(), {"x": torch.randn(2, 4)}).module
    assert graph_text(module.graph) == (
        "%0 = input arg0_1: float32[2, 4]\n%1 = aten.add.Tensor(%0, 1): float32[2, 4]\nreturn [%1]"
    )
    assert canonicalize(module) == 0  # idempotent


def test_canonicalize_lets_what_is_filled_depend_on_no_other_tensor() -> None:
    class Filled(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            left, whole = x.cos().new_full((3,), 2.5), torch.ones_like(x.sin(), dtype=torch.bool)
            return left, whole, torch.zeros_like(x.T)

    module = capture_model(Filled(), {"x": torch.randn(2, 4)}).module
    options = "device=cpu, pin_memory=False"
    assert graph_text(module.graph).splitlines()[1:3] == [
        f"%1 = aten.full.default([3], 2.5, dtype=torch.float32, {options}): float32[3]",
        f"%2 = aten.full.default([2, 4], 1, dtype=torch.bool, {options}): bool[2, 4]",
    ]
    assert "aten.zeros_like.default" in graph_text(module.graph)  # whose layout is another one
    assert canonicalize(module) == 0  # idempotent


def test_canonicalize_makes_values_without_elements_depend_on_nothing() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left = x[2:]
            return torch.cat([x, left]).cos(), (left @ x.T).exp()

    module = capture_model(Masked(), {"x": torch.randn(2, 4)}).module
    assert graph_text(module.graph) == (
        "%0 = input arg0_1: float32[2, 4]\n"
        "%1 = aten.cos.default(%0): float32[2, 4]\n"
        "%2 = aten.full.default([0, 2], 0, dtype=torch.float32, device=cpu, pin_memory=False): "
        "float32[0, 2]\n"
        "return [%1, %2]"
    )
    assert canonicalize(module) == 0  # idempotent


def test_canonicalize_keeps_what_computes_something() -> None:
    class Busy(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dropout(x.to(torch.float64) / 2.0, 0.5, training=True)

    module = capture_model(Busy(), {"x": torch.randn(2, 4)}).module
    assert {str(node.target) for node in module.graph.nodes if node.op == "call_function"} == {
        "aten.to.dtype",
        "aten.div.Tensor",
        "aten.dropout.default",
    }


def test_canonicalize_lets_a_cast_depend_on_no_other_tensor() -> None:
    class Like(torch.nn.Module):
        def forward(self, x: Tensor, wide: Tensor) -> Tensor:
            return x.type_as(wide).sin().type_as(wide)

    given = {"x": torch.randn(2, 4), "wide": torch.randn(3).double()}
    module = capture_model(Like(), given).module
    assert graph_text(module.graph) == (
        "%0 = input arg0_1: float32[2, 4]\n"
        "%1 = input arg1_1: float64[3]\n"
        "%2 = aten.to.dtype(%0, torch.float64): float64[2, 4]\n"
        "%3 = aten.sin.default(%2): float64[2, 4]\n"
        "return [%3]"
    )


def sunk(function: type[torch.nn.Module], *shape: int) -> tuple[GraphModule, int]:
    """Return the graph of ``function`` with its last node halved and sunk, and the moves."""
    module = capture_model(function(), {"x": torch.randn(*shape)}).module
    last = module.graph.output_node().all_input_nodes[0]
    half = insert_half(module.graph, last, second=True)
    module.graph.output_node().args = ((half,),)
    result = HoistBatchSlices().run(module)
    module.recompile()
    return module, result.changed


class RowWise(torch.nn.Module):
    """Use every kind of operator that slices may pass."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = layer_norm(x, (width,)) * 2 + x.mean(dim=-1, keepdim=True)
        left, right = y.chunk(2, dim=-1)
        y = torch.cat([left.exp(), right.sin()], dim=-1)
        y = y.reshape(batch * tokens, width).view(batch, tokens, 2, -1).permute(0, 2, 1, 3)
        y = torch.softmax(torch.matmul(y, y.transpose(-1, -2)), dim=-1).unsqueeze(1).squeeze(1)
        return y.flatten(2)[:, :, 3:].expand(batch, 2, -1)


class AcrossBatch(torch.nn.Module):
    """Mix rows: a softmax over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * 2, dim=0) + 1


class Turned(torch.nn.Module):
    """Move the batch away from dimension 0 and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).exp().transpose(0, 1)


@pytest.mark.parametrize("function", [RowWise, AcrossBatch, Turned])
def test_sinking_is_exact(function: type[torch.nn.Module]) -> None:
    module, _ = sunk(function, 4, 6, 8)
    x = torch.randn(4, 6, 8)
    (got,) = module(x)
    torch.testing.assert_close(got, function()(x)[2:], rtol=0.0, atol=1e-6)


def test_slices_sink_to_the_input_through_row_wise_work() -> None:
    module, _ = sunk(RowWise, 4, 6, 8)
    (half,) = [node for node in calls(module.graph, aten.slice.Tensor) if node.args[1] == 0]
    assert half.args[0] is module.graph.find_nodes(op="placeholder")[0]


def test_near_miss_slices_stop_where_rows_mix() -> None:
    module, moved = sunk(AcrossBatch, 4, 6, 8)
    (half,) = calls(module.graph, aten.slice.Tensor)
    assert moved == 1  # above "+ 1" only
    assert half.args[0].target is aten.softmax.int  # type: ignore[union-attr]
    assert sunk(Turned, 4, 6, 8)[1] == 0


def test_near_miss_shared_values_are_not_computed_twice() -> None:
    class Shared(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.exp()
            return y * 2, y

    module = capture_model(Shared(), {"x": torch.randn(4, 3)}).module
    output = module.graph.output_node()
    doubled, shared = output.all_input_nodes
    output.args = ((insert_half(module.graph, doubled, second=False), shared),)
    HoistBatchSlices().run(module)
    assert len(calls(module.graph, aten.exp.default)) == 1


def test_sinking_is_idempotent() -> None:
    module, _ = sunk(RowWise, 4, 6, 8)
    before = graph_text(module.graph)
    assert HoistBatchSlices().run(module).changed == 0
    assert graph_text(module.graph) == before


def one_site(sites: Sequence[Site], index: int, action: SiteAction) -> tuple[SiteAction, ...]:
    return tuple(action if i == index else DENSE for i in range(len(sites)))


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_a_shared_step_holds_nothing_of_the_site(name: str) -> None:
    captured, sites = capture_sites(TINY_MODELS[name]())
    dense = rewrite(captured, sites, (DENSE,) * len(sites), COND_FIRST)
    module = rewrite(
        captured, sites, one_site(sites, 0, SiteAction(Strategy.SHARE_STEP)), COND_FIRST
    )
    gone = len(calls(dense.graph, aten.linear.default)) - len(
        calls(module.graph, aten.linear.default)
    )
    joint = name == "sd3"
    assert gone == (8 if joint else 4)  # q, k, v and output projections, of both streams if joint
    assert len(calls(module.graph, ATTENTION)) == len(sites) - 1
    assert len(read_slots(module.graph)) == len(sites[0].exits)
    before, behind = count_flops(dense.graph), count_flops(module.graph)
    assert before.attention - behind.attention == before.attention // len(sites) or name == "pixart"
    assert behind.linear < before.linear


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_sharing_guidance_everywhere_halves_projections_and_attention(name: str) -> None:
    captured, sites = capture_sites(TINY_MODELS[name]())
    dense = rewrite(captured, sites, (DENSE,) * len(sites), COND_FIRST)
    shared = (SiteAction(Strategy.SHARE_CFG),) * len(sites)
    module = rewrite(captured, sites, shared, COND_FIRST)
    assert count_flops(module.graph).attention * 2 == count_flops(dense.graph).attention
    batches = [value(node.args[0]).shape[0] for node in calls(module.graph, ATTENTION)]
    assert batches == [2] * len(sites)
    narrow = [n for n in calls(module.graph, aten.linear.default) if value(n).shape[0] == 2]
    assert len(narrow) >= 4 * len(sites)
    dense_linears, linears = (
        calls(dense.graph, aten.linear.default),
        calls(module.graph, aten.linear.default),
    )
    assert len(linears) == len(dense_linears)  # halved, not repeated


def test_a_windowed_site_counts_only_the_pairs_in_its_band() -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    dense = count_flops(captured.module.graph).attention
    windowed = (SiteAction(Strategy.WINDOW),) * len(sites)
    module = rewrite(captured, sites, windowed, COND_FIRST)
    kept = sum(1 for i in range(16) for j in range(16) if abs(i - j) <= 2)
    assert count_flops(module.graph).attention == dense * kept // 256


def test_nothing_is_stored_that_no_step_reads() -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    module = rewrite(captured, sites, (DENSE,) * len(sites), COND_FIRST)
    assert written_slots(module.graph) == ()
    assert graph_text(module.graph) == graph_text(captured.module.graph)


def test_a_rewrite_leaves_the_captured_graph_alone() -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    before = graph_text(captured.module.graph)
    rewrite(captured, sites, (SiteAction(Strategy.SHARE_CFG, writes_output=True),) * 3, COND_FIRST)
    assert graph_text(captured.module.graph) == before
