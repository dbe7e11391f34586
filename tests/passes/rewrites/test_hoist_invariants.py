"""What no step changes is computed once per generation, and anew when its inputs change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ditfastattn import Strategy
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.latent import latent_position
from ditfastattn.passes.graph.ir import graph_text
from ditfastattn.passes.graph.slots import hoisted_slot, read_slots, written_slots
from ditfastattn.passes.plan.actions import DENSE
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.rewrites.hoist_invariants import (
    find_hoisted,
    hoisted_graph,
)
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.runtime import hoisted as hoisted_module
from ditfastattn.runtime import lowering
from ditfastattn.runtime.matching import timestep_position
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    captured_once,
    largest_difference,
    make_plan,
    mixed_strategies,
    uniform_strategies,
)
from tests.works_with import works_with


def found(tiny: TinyModel) -> tuple[str, ...]:
    graph = captured_once(tiny).graph
    latent = latent_position(graph)
    assert latent is not None
    return find_hoisted(graph, {latent, timestep_position(graph, "timestep")})


def test_cross_attention_keys_and_values_of_the_text_are_hoisted() -> None:
    tiny = TINY_MODELS["pixart"]()
    captured, sites = capture_every_site(tiny)
    nodes = found(tiny)
    assert len(nodes) == 2 * 2  # keys and values of two blocks
    once = hoisted_graph(captured, nodes)
    assert written_slots(once.graph) == tuple(map(hoisted_slot, nodes))
    actions = [DENSE] * len(sites)
    whole = rewrite(captured, sites, actions, CfgLayout.COND_FIRST)
    hoisted = rewrite(captured, sites, actions, CfgLayout.COND_FIRST, per_generation=nodes)
    assert set(read_slots(hoisted.graph)) == set(written_slots(once.graph))
    left, moved = count_flops(hoisted.graph), count_flops(once.graph)
    assert moved.linear > 0
    assert left.total + moved.total == count_flops(whole.graph).total  # nothing twice
    assert "encoder_hidden_states" not in graph_text(hoisted.graph).split("return")[1]


def test_there_is_nothing_to_hoist_where_only_a_table_is_read() -> None:
    assert found(TINY_MODELS["dit"]()) == ()  # the class embedding costs no matrix product


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the runs of what is hoisted."""
    counted: list[int] = []
    lower = lowering.lower

    def counting(*args: Any) -> Callable[[Sequence[Tensor]], Any]:
        run = lower(*args)

        def once(inputs: Sequence[Tensor]) -> Any:
            counted.append(1)
            return run(inputs)

        return once

    monkeypatch.setattr(hoisted_module, "lower", counting)
    return counted


def planned(tiny: TinyModel, strategies: Any) -> Any:
    plan = make_plan(tiny, strategies, feed_forwards=True)
    torch._dynamo.reset()
    options: dict[str, Any] = {"lowering": "eager", "plan": plan}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)


def steady(tiny: TinyModel) -> TinyModel:
    """Hand the very same conditions to every step, as pipelines do."""
    first = tiny.call(0, 4)

    def call(step: int, batch: int) -> dict[str, Any]:
        own = tiny.call(step, batch)
        return {**first, "hidden_states": own["hidden_states"], "timestep": own["timestep"]}

    return TinyModel(tiny.model, call)


@works_with(
    "Torch",
    "`torch.inference_mode` around a generation",
    "works",
    "what is hoisted is computed once, as under `torch.no_grad`",
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_hoisted_runs_once_per_generation(mode: Any, runs: list[int]) -> None:
    _, sites = capture_every_site(TINY_MODELS["pixart"]())
    rows = mixed_strategies(sites, seed=4)
    with mode():
        tiny = steady(TINY_MODELS["pixart"]())
        model = planned(tiny, rows)
        expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
        for generation in (1, 2):
            assert largest_difference(tiny.run(model), expected) < 1e-5
            assert len(runs) == generation


def test_an_all_full_plan_stays_bitwise_dense(runs: list[int]) -> None:
    tiny = steady(TINY_MODELS["sd3"]())
    _, sites = capture_every_site(tiny)
    model = planned(tiny, uniform_strategies(sites, Strategy.FULL))
    assert largest_difference(tiny.run(model), tiny.run(tiny.model)) == 0.0
    assert len(runs) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", ["another tensor", "written in place"])
def test_changed_conditions_are_noticed(change: str, mode: Any, runs: list[int]) -> None:
    tiny = TINY_MODELS["pixart"]()
    _, sites = capture_every_site(tiny)
    text = tiny.call(0, 4)["encoder_hidden_states"]

    def call(step: int, batch: int) -> dict[str, Any]:
        nonlocal text
        given = text + step
        if change == "written in place":
            text.add_(1.0)
            given = text
        return {**steady_call(step, batch), "encoder_hidden_states": given}

    steady_call = steady(tiny).call
    changing = TinyModel(tiny.model, call)
    model = planned(tiny, uniform_strategies(sites, Strategy.FULL))
    start = text.clone()
    with mode():
        text = text.clone()  # in inference mode its writes are not counted
        got = changing.run(model)
        text.copy_(start)
        assert largest_difference(got, changing.run(tiny.model)) < 1e-6
    assert len(runs) == len(got)


@pytest.mark.parametrize("replaced", [False, True], ids=["written in place", "replaced"])
def test_weights_that_change_within_a_generation_are_noticed(
    replaced: bool, runs: list[int]
) -> None:
    tiny = TINY_MODELS["pixart"]()
    model = copy.deepcopy(tiny.model)
    keys: Any = model.get_submodule("transformer_blocks.0.attn2.to_k")

    def call(step: int, batch: int) -> dict[str, Any]:
        if step == 3 and replaced:
            keys.weight.data = 2.0 * keys.weight.data
        elif step == 3:
            keys.weight.mul_(2.0)
        return steady_call(step, batch)

    steady_call = steady(tiny).call
    changing = TinyModel(model, call)
    _, sites = capture_every_site(tiny)
    compiled = planned(TinyModel(model, steady_call), uniform_strategies(sites, Strategy.FULL))
    start = keys.weight.data.clone()
    got = changing.run(compiled)
    keys.weight.data.copy_(start)
    assert largest_difference(got, changing.run(model)) == 0.0
    assert len(runs) == 2
