"""torch.compile around an accelerated transformer, before and after: the plan runs, or it says why.

An outer compilation must not trace through what runs by a plan, as that would run the dense model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditfastattn
from ditfastattn import ConfigError, Plan
from tests.helpers import attentive_pipeline
from tests.three_steps import run
from tests.works_with import works_with

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def planned_images(plan: Plan) -> Tensor:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    return run(pipeline)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


class Graphs:
    """A backend that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.made: list[nn.Module] = []

    def __call__(self, graph: Any, _example: Any) -> Any:
        self.made.append(graph)
        return graph.forward


def wrap(pipeline: Any, graphs: Graphs, **options: Any) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer, backend=graphs, **options)


def compile_inside(pipeline: Any, graphs: Graphs, **options: Any) -> None:
    pipeline.transformer.compile(backend=graphs, **options)


WAYS: dict[str, Callable[..., None]] = {"torch.compile": wrap, "compile()": compile_inside}


@works_with(
    "Torch",
    "`torch.compile(transformer)` or `transformer.compile()` before `accelerate`",
    "works",
    "set aside, and given back by `restore`; what is called as it is stays compiled",
)
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_compiled_before_runs_by_the_plan_and_is_given_back(
    way: str, fullgraph: bool, plan: Plan
) -> None:
    expected = planned_images(plan)
    pipeline, graphs = attentive_pipeline(), Graphs()
    dense = run(pipeline)
    WAYS[way](pipeline, graphs, fullgraph=fullgraph)
    held = pipeline.transformer
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    assert difference(run(pipeline), expected) < TOLERANCE
    opaque = len(plan.sites) == 1
    assert bool(graphs.made) == opaque  # the steps that run stay compiled
    ditfastattn.restore(pipeline)
    assert pipeline.transformer is held
    assert difference(run(pipeline), dense) < TOLERANCE
    assert graphs.made


@works_with(
    "Torch",
    "`pipeline.transformer = torch.compile(pipeline.transformer)` after `accelerate`",
    "works",
    "set aside as the next generation begins, and given back by `restore`",
)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_is_compiled_after_runs_by_the_plan(fullgraph: bool, plan: Plan) -> None:
    expected = planned_images(plan)
    pipeline, graphs = attentive_pipeline(), Graphs()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    run(pipeline)
    wrap(pipeline, graphs, fullgraph=fullgraph)
    assert difference(run(pipeline), expected) < TOLERANCE
    wrap(pipeline, graphs, fullgraph=fullgraph)
    held = pipeline.transformer
    assert difference(run(pipeline), expected) < TOLERANCE
    opaque = len(plan.sites) == 1
    assert bool(graphs.made) == opaque  # the steps that run are compiled
    ditfastattn.restore(pipeline)
    assert pipeline.transformer is held
    assert difference(run(pipeline), dense) < TOLERANCE


@works_with(
    "Torch",
    "`transformer.compile()` after `accelerate`",
    "refused",
    "compile first",
)
def test_compiling_an_accelerated_module_is_refused(plan: Plan) -> None:
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"compile\(\) first and accelerate"):
        pipeline.transformer.compile(fullgraph=True)
    ditfastattn.restore(pipeline)
    pipeline.transformer.compile(backend="eager", fullgraph=True)
    assert difference(run(pipeline), dense) < TOLERANCE


@works_with(
    "Copies and processes",
    "another transformer put into an accelerated pipeline",
    "runs dense, with a warning",
    "once, as a generation ends",
)
def test_a_plan_that_does_not_run_is_warned_of_once(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline: Any = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    accelerated = pipeline.transformer
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        run(pipeline)
        pipeline.maybe_free_model_hooks()
        assert not caplog.records
        pipeline.transformer = attentive_pipeline().transformer
        run(pipeline)
        run(pipeline)
    (record,) = caplog.records
    assert "its transformer is another one now" in record.getMessage()
    pipeline.transformer = accelerated
    ditfastattn.restore(pipeline)
    assert "maybe_free_model_hooks" not in vars(pipeline)
