"""A plan runs a model in its own dtype: autocast around it is refused, or left to whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditfastattn
from ditfastattn import ConfigError, Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import attentive_pipeline
from tests.plans import opaque_plan_for, plan_for
from tests.works_with import works_with

CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 3}
FULL = [Strategy.FULL] * 3
SHARED = [Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@works_with(
    "Torch",
    "`torch.autocast` around a generation: plans of sites",
    "refused",
    "load the pipeline in that dtype",
)
def test_autocast_is_refused_and_leaves_nothing() -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan_for(pipeline, CALL, SHARED), lowering="eager")
    expected = generate(pipeline, Prompt(CALL, 3))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match=r"torch\.autocast\('cpu', torch\.bfloat16\)"),
    ):
        generate(pipeline, Prompt(CALL, 3))
    assert torch.equal(generate(pipeline, Prompt(CALL, 3)), expected)


def test_nothing_is_calibrated_under_autocast() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match="leave autocast off"),
    ):
        plan_for(attentive_pipeline(), CALL, FULL)


@works_with(
    "Torch",
    "`torch.autocast` around a generation: whole-step plans of a model called as it is",
    "works",
    "",
)
def test_a_model_that_is_called_as_it_is_runs_under_autocast() -> None:
    pipeline = attentive_pipeline()
    plan = opaque_plan_for(pipeline, CALL, FULL)
    with torch.autocast("cpu", torch.bfloat16):
        dense = generate(pipeline, Prompt(CALL, 3))
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
        assert torch.equal(generate(pipeline, Prompt(CALL, 3)), dense)
