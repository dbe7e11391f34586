"""Equal blocks are compiled once, and the outlined step is the step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor.utils import fresh_cache
from torch.fx import Graph, GraphModule

from ditfastattn import Strategy
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.dynamo import capture
from ditfastattn.passes.graph.ir import aten
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime import lowering
from ditfastattn.runtime.lowering import Lowering, OutlinedStep, compiled_regions, lower
from tests.helpers import (
    TinyModel,
    capture_every_site,
    capture_sites,
    largest_difference,
    make_plan,
    randomize,
    tiny_dit,
    tiny_sd3,
    uniform_strategies,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Compiled = list[GraphModule]


def dit_of(layers: int) -> TinyModel:
    """Return a DiT of any depth that is called as ``tiny_dit`` is."""
    torch.manual_seed(0)
    tiny = tiny_dit()
    config = {**dict(tiny.model.config), "num_layers": layers}  # type: ignore[arg-type]  # diffusers
    return TinyModel(randomize(DiTTransformer2DModel(**config)), tiny.call)


def planned(tiny: TinyModel, plan: Plan, **options: Any) -> Any:
    given: dict[str, Any] = {"plan": plan, **options}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=given)


def uniform_plan(tiny: TinyModel, strategy: Strategy) -> Plan:
    _, sites = capture_sites(tiny)
    plan = make_plan(tiny, uniform_strategies(sites, strategy))
    torch._dynamo.reset()
    return plan


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Return what is handed to Inductor, which is left out: graphs run eagerly."""
    gc.collect()  # what other tests compiled
    seen: Compiled = []

    def compile_fx(module: GraphModule, args: Sequence[Tensor], **_: Any) -> Callable[..., Any]:
        seen.append(module)
        return lambda *inputs: module(*inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(lowering, "_compiled", weakref.WeakValueDictionary())
    return seen


def test_inductor_is_told_the_environment_that_its_cache_on_disk_asks_for(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compile_fx(module: GraphModule, args: Sequence[Tensor], **_: Any) -> Callable[..., Any]:
        mode = TracingContext.get().fake_mode
        seen.append(mode and mode.shape_env)
        return lambda *inputs: module(*inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    tiny = tiny_dit()
    tiny.run(planned(tiny, uniform_plan(tiny, Strategy.SHARE_STEP)))
    assert seen
    assert None not in seen


@pytest.mark.slow
def test_what_was_compiled_is_read_from_the_cache_on_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[dict[str, int]] = []
    tiny = tiny_dit(layers=1)
    plan = uniform_plan(tiny, Strategy.SHARE_STEP)
    with fresh_cache():
        for _ in range(2):
            monkeypatch.setattr(lowering, "_compiled", weakref.WeakValueDictionary())
            torch._dynamo.reset()
            counters.clear()
            tiny.run(planned(tiny, plan), steps=2)
            counts.append(dict(counters["inductor"]))
    first, second = counts
    assert first["fxgraph_cache_miss"] == second["fxgraph_cache_hit"] > 0
    assert "fxgraph_cache_bypass" not in first


def test_compiled_regions_do_not_grow_with_the_layers(compiled: Compiled) -> None:
    counts: list[int] = []
    for layers in (2, 5):
        tiny = dit_of(layers)
        plan = uniform_plan(tiny, Strategy.WINDOW_SHARE_CFG)
        del compiled[:]
        got = tiny.run(planned(tiny, plan))
        counts.append(len(compiled))
        _, sites = capture_sites(tiny)
        expected = tiny.reference(plan.strategies, sites, plan.sampler.cfg_layout)
        assert largest_difference(got, expected) < 1e-5
    assert counts[0] == counts[1] < 20


@pytest.mark.slow
def test_regions_of_joint_attention_grow_with_what_blocks_do_not_with_the_layers(
    compiled: Compiled,
) -> None:
    """Every third block shares all of its sites, the next one shares guidance."""
    does = (Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_CFG)
    counts: list[int] = []
    for layers in (6, 9):
        tiny = tiny_sd3(layers=layers)
        _, sites = capture_every_site(tiny)
        blocks = [int(site.name.split(".")[1]) for site in sites]
        row = tuple(does[block % 3] for block in blocks)
        plan = make_plan(tiny, [(Strategy.FULL,) * len(row)] + [row] * 5, feed_forwards=True)
        del compiled[:]
        tiny.run(planned(tiny, plan), steps=2)
        counts.append(len(compiled))
    assert counts[0] == counts[1]


def test_variants_and_plans_share_compiled_blocks(compiled: Compiled) -> None:
    tiny = tiny_dit()
    first, second = (uniform_plan(tiny, s) for s in (Strategy.FULL, Strategy.SHARE_CFG))
    models = [planned(tiny, plan) for plan in (first, second)]
    tiny.run(models[0], steps=2)
    dense = len(compiled)
    tiny.run(models[1], steps=2)  # its first step is the dense one
    assert len(compiled) == dense + 2  # attention, feed-forward


def test_compiled_blocks_go_with_the_last_model_that_runs_them(compiled: Compiled) -> None:
    tiny = tiny_dit()
    model = planned(tiny, uniform_plan(tiny, Strategy.FULL))
    tiny.run(model, steps=1)
    assert compiled_regions() > 4
    del model
    torch._dynamo.reset()
    gc.collect()
    assert compiled_regions() == 0


@pytest.mark.parametrize("options", [{"outline": False}, {"inductor": {"triton.cudagraphs": True}}])
def test_a_step_is_one_graph_when_told_so_and_for_cuda_graphs(
    options: dict[str, Any], compiled: Compiled
) -> None:
    tiny = tiny_dit()
    tiny.run(planned(tiny, uniform_plan(tiny, Strategy.SHARE_CFG), **options))
    assert len(compiled) == 2  # nothing is worth hoisting


@pytest.mark.slow
def test_outlined_and_whole_graphs_agree_under_inductor() -> None:
    tiny = tiny_dit(layers=2)
    full = (Strategy.FULL,) * 2
    mixed = (Strategy.WINDOW_SHARE_CFG, Strategy.SHARE_STEP)
    plan = make_plan(tiny, [full, *[mixed] * 5])
    torch._dynamo.reset()
    outlined = tiny.run(planned(tiny, plan))
    torch._dynamo.reset()
    whole = tiny.run(planned(tiny, plan, outline=False))
    assert largest_difference(outlined, whole) < 1e-6


def test_views_inputs_and_literals_among_the_results_stay_what_they_are() -> None:
    module = GraphModule({}, Graph())
    graph = module.graph
    x = graph.placeholder("x")
    view = graph.call_function(aten.transpose.int, (x, 0, 1))
    doubled = graph.call_function(aten.mul.Tensor, (view, 2.0))
    flipped = graph.call_function(aten.transpose.int, (doubled, 0, 1))
    graph.output((view, x, None, doubled, flipped))
    given = torch.randn(3, 5)
    captured = capture(module, [GraphInput("x", static=False)], [given]).module
    run = lower(captured, [given], Lowering.INDUCTOR, {})
    got_view, got_x, nothing, got_doubled, got_flipped = run([given])
    assert nothing is None
    assert got_x is given
    assert got_view.data_ptr() == given.data_ptr()
    assert got_view.stride() == (1, 5)
    assert torch.equal(got_doubled, given.T * 2.0)
    assert got_doubled.stride() == (given.T * 2.0).stride()
    assert torch.equal(got_flipped, given * 2.0)
    assert got_flipped.stride() == (given.T * 2.0).T.stride()


def test_a_running_step_frees_values_after_their_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def region(*sources: Tensor) -> tuple[Tensor]:
        alive.append([reference() is not None for reference in made])
        result = sources[0] + 1
        made.append(weakref.ref(result))
        return (result,)

    step = OutlinedStep(
        constants=(),
        calls=(
            lowering._Call(region, (0,), ()),
            lowering._Call(region, (1,), ()),
            lowering._Call(region, (2, 1), (1, 2)),
            lowering._Call(region, (3,), (3,)),
            lowering._Call(region, (4,), (4,)),
        ),
        returned=(5,),
    )
    (result,) = step([torch.zeros(1)])
    assert result.item() == 5.0
    assert alive == [
        [],
        [True],
        [True, True],
        [False, False, True],
        [False, False, False, True],
    ]
