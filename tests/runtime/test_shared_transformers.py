"""Pipelines that share an accelerated transformer, as ``from_pipe`` makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.three_steps import STRATEGIES, run
from tests.tiny_pipelines import IMG2IMG_ARGUMENTS, TINY_PIPELINES
from tests.works_with import works_with


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Sharing(DigitsPipeline):
    """Another pipeline with the same transformer."""


def sharing(pipeline: Any, **changes: Any) -> Any:
    """Return a pipeline with the transformer of ``pipeline``, and a scheduler of its own."""
    scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    made = Sharing(pipeline.transformer, scheduler)
    made.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return made


@works_with(
    "Pipelines that share a transformer",
    "`from_pipe`: another pipeline calls the accelerated transformer",
    "works",
    "its own scheduler and guidance are checked",
)
def test_the_scheduler_and_guidance_of_the_pipeline_that_calls_are_checked(
    plan: Plan,
) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline)
    assert torch.equal(run(sharing(pipeline)), expected)
    other = sharing(pipeline, beta_end=0.05)  # of the same timesteps
    with pytest.raises(ConfigError, match=r"Sharing[\s\S]*shares[\s\S]*config\.beta_end"):
        run(other)
    with pytest.raises(ConfigError, match=r"Sharing[\s\S]*guidance_scale[\s\S]*got:\s+5\.0"):
        run(sharing(pipeline), guidance_scale=5.0)
    assert torch.equal(run(pipeline), expected)
    with pytest.raises(ConfigError, match=r"beta_end"):
        run(other)
    assert torch.equal(run(sharing(pipeline)), expected)


def test_a_pipeline_is_checked_where_the_accelerated_one_is_gone(plan: Plan) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    other = sharing(pipeline, beta_end=0.05)
    del pipeline
    with pytest.raises(ConfigError, match=r"config\.beta_end"):
        run(other)


@works_with(
    "Pipelines that share a transformer",
    "`restore` of one of them",
    "works",
    "all run dense",
)
def test_restoring_one_restores_all(plan: Plan) -> None:
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    other = sharing(pipeline)
    assert not torch.equal(run(other), dense)
    ditfastattn.restore(other)
    assert torch.equal(run(pipeline), dense)
    assert torch.equal(run(other), dense)


@works_with(
    "Pipelines that share a transformer",
    "an image-to-image pipeline of another `strength` than the plan is for",
    "refused",
    "the error names the pipeline and its strength",
)
def test_the_strength_is_named_where_it_shortens_the_schedule() -> None:
    make, given = TINY_PIPELINES["flux"]
    pipeline = make()
    call = {"num_inference_steps": len(STRATEGIES), **given}
    plan = plan_for(pipeline, call, STRATEGIES)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    generate(pipeline, Prompt(call, 3))
    other: Any = FluxImg2ImgPipeline.from_pipe(pipeline)  # type: ignore[no-untyped-call]
    other.set_progress_bar_config(disable=True)
    shortened = {**IMG2IMG_ARGUMENTS, "strength": 0.5, "num_inference_steps": len(STRATEGIES)}
    with pytest.raises(ConfigError, match=r"FluxImg2ImgPipeline\(strength=0\.5\) shares"):
        generate(other, Prompt(shortened, 3))
