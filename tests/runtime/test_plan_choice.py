"""Several plans in one pipeline: each generation runs by the one that is for it, or dense."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import ditfastattn
from ditfastattn import ConfigError, Plan, Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import attentive_pipeline
from tests.plans import opaque_plan_for, plan_for
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 3, "guidance_scale": 2.0}
SHARED = [Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP]
LONGER = [Strategy.FULL, Strategy.SHARE_STEP, Strategy.FULL, Strategy.SHARE_STEP]
SIZES = ({"height": 16, "width": 16}, {"height": 32, "width": 16})


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def run(pipeline: Any, **changes: Any) -> Tensor:
    images: Tensor = generate(pipeline, Prompt(CALL | changes, 3))
    return images


def alone(plan: Plan, **changes: Any) -> Tensor:
    """Return the images of a pipeline that has this plan alone."""
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    return run(pipeline, **changes)


@works_with(
    "Several plans",
    "`accelerate(pipeline, [plan, other])`, then generations of 3 and 4 steps by turns",
    "works",
    "each by the plan for it, whole steps too",
)
def test_each_generation_runs_by_the_plan_for_its_steps() -> None:
    short = plan_for(attentive_pipeline(), CALL, SHARED)
    long = opaque_plan_for(attentive_pipeline(), CALL | {"num_inference_steps": 4}, LONGER)
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, [short, long], lowering="eager")
    for _ in range(2):
        assert torch.equal(run(pipeline), alone(short))
        assert torch.equal(run(pipeline, num_inference_steps=4), alone(long, num_inference_steps=4))


@works_with(
    "Several plans",
    "two resolutions by turns, a plan for each",
    "works",
    "nothing is compiled again after the first generation of each",
)
def test_a_second_resolution_by_turns_compiles_nothing_again() -> None:
    make, given = TINY_PIPELINES["pixart"]
    calls = [{**given, "num_inference_steps": 3, **size} for size in SIZES]
    plans = [plan_for(make(), call, SHARED) for call in calls]
    torch._dynamo.reset()
    pipeline = make()
    ditfastattn.accelerate(pipeline, plans, lowering="eager")
    first = [generate(pipeline, Prompt(call, 3)) for call in calls]
    compiled = counters["frames"]["total"]
    again = [generate(pipeline, Prompt(call, 3)) for call in calls]
    assert counters["frames"]["total"] == compiled
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for call, plan, images in zip(calls, plans, first, strict=True):
        other = make()
        ditfastattn.accelerate(other, plan, lowering="eager")
        assert torch.equal(generate(other, Prompt(call, 3)), images)


def test_where_no_plan_is_for_a_generation_each_says_why() -> None:
    plans = [
        plan_for(attentive_pipeline(), CALL, SHARED),
        plan_for(attentive_pipeline(), CALL | {"num_inference_steps": 4}, LONGER),
    ]
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plans, lowering="eager")
    with pytest.raises(
        ConfigError, match=r"plan 1: plan\.sampler\.steps[\s\S]*got: +5[\s\S]*plan 2: "
    ):
        run(pipeline, num_inference_steps=5)
    assert torch.equal(run(pipeline), alone(plans[0]))


MISFITS: dict[str, dict[str, Any]] = {
    "steps": {"num_inference_steps": 5},
    "guidance_scale": {"guidance_scale": 3.0},
}


@works_with(
    "Several plans",
    '`on_mismatch="dense"`, and a generation that no plan is for',
    "runs dense, with a warning",
    "once per reason; `dense_generations(pipeline)` counts them",
)
@pytest.mark.parametrize("field", MISFITS)
def test_a_generation_that_no_plan_is_for_runs_dense(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    pipeline = attentive_pipeline()
    dense = run(pipeline, **MISFITS[field])
    ditfastattn.accelerate(pipeline, plan, on_mismatch="dense", lowering="eager")
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        for _ in range(2):
            assert torch.equal(run(pipeline), alone(plan))
            assert torch.equal(run(pipeline, **MISFITS[field]), dense)
    warnings = [text for text in caplog.messages if "runs dense" in text]
    assert len(warnings) == 1
    assert field in warnings[0]
    assert "remedy" not in warnings[0]
    assert list(ditfastattn.dense_generations(pipeline).values()) == [2]


def test_other_weights_run_dense_where_that_is_asked_for() -> None:
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    pipeline = attentive_pipeline()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.01)
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, on_mismatch="dense", lowering="eager")
    assert torch.equal(run(pipeline), dense)
    (reason,) = ditfastattn.dense_generations(pipeline)
    assert "weights" in reason


def test_an_error_in_the_middle_of_a_generation_is_one_still() -> None:
    """What has begun by a plan does not go on dense."""
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, on_mismatch="dense", lowering="eager")
    step, own = iter(range(100)), pipeline.scheduler.scale_model_input

    def other(sample: Tensor, timestep: Any = None) -> Tensor:
        scaled: Tensor = own(sample, timestep)
        return scaled if next(step) < 1 else scaled.repeat(1, 1, 2, 2)

    pipeline.scheduler.scale_model_input = other
    with pytest.raises((ConfigError, RuntimeError)):
        run(pipeline)
    del pipeline.scheduler.scale_model_input
    assert torch.equal(run(pipeline), alone(plan))
    assert ditfastattn.dense_generations(pipeline) == {}


def test_a_copy_keeps_no_choice_and_restoring_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    ditfastattn.accelerate(pipeline, [plan, plan], lowering="eager")
    assert torch.equal(run(copy.deepcopy(pipeline)), dense)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)
    with pytest.raises(ConfigError, match="not accelerated"):
        ditfastattn.dense_generations(pipeline)


def test_plans_may_be_files(tmp_path: Path) -> None:
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    plan.save(tmp_path / "plan.json")
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, [tmp_path / "plan.json"], lowering="eager")
    assert torch.equal(run(pipeline), alone(plan))


def test_bad_choices_are_refused_at_once() -> None:
    pipeline = attentive_pipeline()
    plan = plan_for(attentive_pipeline(), CALL, SHARED)
    with pytest.raises(ConfigError, match="there is no plan"):
        ditfastattn.accelerate(pipeline, [])
    with pytest.raises(ConfigError, match="expected: error, dense"):
        ditfastattn.accelerate(pipeline, plan, on_mismatch="ignore")
    with pytest.raises(ConfigError, match="give a plan"):
        ditfastattn.accelerate(pipeline, on_mismatch="dense")
