"""Whole pipelines by a plan that mixes all strategies, compared with the plan interpreter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.plans import assert_interprets, mixed_plan_for
from tests.tiers import slow_but
from tests.tiny_pipelines import (
    TINY_PIPELINES,
    load_saved,
    tiny_two_stage_wan_pipeline,
    tiny_wan_image_pipeline,
    tiny_wan_pipeline,
)
from tests.works_with import works_with

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STEPS = 5
SEED = 5
TWO_CALLS = ("wan", "qwenimage")
VIDEO = ("wan", "cogvideox", "ltx")


def loaded(name: str, pipelines: Path) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline saved and loaded back, and what to call it with."""
    pipeline, call = load_saved(name, pipelines)
    return pipeline, {"num_inference_steps": STEPS, **call}


def run(pipeline: Any, call: dict[str, Any]) -> Tensor:
    images: Tensor = generate(pipeline, Prompt(call, SEED))
    return images


@exercises("image", *(name for name in TINY_PIPELINES if name not in VIDEO))
@exercises("video", *VIDEO)
@exercises("two-call guidance", *TWO_CALLS)
# By default one pipeline of each layout: batched guidance, none, and guidance in two calls.
@pytest.mark.parametrize("name", slow_but({"sd3", "flux", "wan"}, TINY_PIPELINES))
def test_a_mixed_plan_gives_the_interpreters_images(name: str, pipelines: Path) -> None:
    pipeline, call = loaded(name, pipelines)
    mixed = mixed_plan_for(pipeline, call)
    used = {strategy for row in mixed.plan.strategies for strategy in row}
    assert {Strategy.FULL, Strategy.SHARE_STEP} <= used
    shares = any(strategy.shares_guidance for strategy in used)
    assert shares == (mixed.plan.sampler.cfg_layout is not CfgLayout.NONE)
    assert mixed.plan.sampler.cfg_layout.calls == 1 + (name in TWO_CALLS)
    assert_interprets(pipeline, call, mixed)


@works_with(
    "Pipelines",
    "a timestep per token or frame, some standing still, as of a given first frame (Wan 2.2 TI2V)",
    "works",
    "steps are told by the tokens that move",
)
def test_a_given_first_frame_does_not_stop_the_clock() -> None:
    pipeline: Any = tiny_wan_image_pipeline()
    call = {**TINY_PIPELINES["wan"][1], "num_inference_steps": STEPS}
    texts = tiny_wan_pipeline().encode_prompt(call.pop("prompt"), max_sequence_length=8)
    call |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True))
    call["image"] = torch.rand(1, 3, call["height"], call["width"], generator=torch.manual_seed(0))
    mixed = mixed_plan_for(pipeline, call)
    assert len(set(mixed.plan.sampler.timesteps)) == STEPS
    assert_interprets(pipeline, call, mixed)


@pytest.mark.slow
def test_a_compiled_pipeline_gives_the_interpreters_images(pipelines: Path) -> None:
    pipeline, call = loaded("qwenimage", pipelines)  # guidance in two calls
    assert_interprets(pipeline, call, mixed_plan_for(pipeline, call), "inductor")


def test_a_second_prompt_of_another_length_is_refused_by_its_shape(pipelines: Path) -> None:
    pipeline, call = loaded("qwenimage", pipelines)
    call["max_sequence_length"] = 64
    longer = {**call, "negative_prompt": "a dog runs"}
    with pytest.raises(ConfigError, match=r"encoder_hidden_states[\s\S]*the same .*length"):
        mixed_plan_for(pipeline, longer)
    mixed = mixed_plan_for(pipeline, call)
    ditfastattn.accelerate(pipeline, mixed.plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"inputs\.encoder_hidden_states"):
        run(pipeline, longer)


@pytest.mark.parametrize("name", slow_but({"wan"}, TWO_CALLS))
def test_a_cache_context_reaches_the_accelerated_transformer(name: str, pipelines: Path) -> None:
    pipeline, call = loaded(name, pipelines)
    transformer = pipeline.transformer
    mixed = mixed_plan_for(pipeline, call)
    ditfastattn.accelerate(pipeline, mixed.plan, lowering="eager")
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.append((kwargs, output[0].clone()))

    hook = transformer.register_forward_hook(note, with_kwargs=True)
    run(pipeline, call)
    hook.remove()
    assert len(seen) == 2 * STEPS
    assert not torch.equal(seen[0][1], seen[1][1])  # of the prompt, and of the negative one
    ditfastattn.reset()
    with torch.no_grad():
        for number, (kwargs, expected) in enumerate(seen):  # as loops of one's own do
            with transformer.cache_context("uncond" if number % 2 else "cond"):
                assert torch.equal(transformer(**kwargs)[0], expected)


def test_a_cache_of_diffusers_and_a_plan_exclude_each_other(pipelines: Path) -> None:
    pipeline, call = loaded("wan", pipelines)
    mixed = mixed_plan_for(pipeline, call)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ConfigError, match=r"FirstBlockCacheConfig[\s\S]*disable_cache"):
        ditfastattn.accelerate(pipeline, mixed.plan)
    pipeline.transformer.disable_cache()
    assert_interprets(pipeline, call, mixed)


def test_a_second_transformer_runs_dense_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline: Any = tiny_two_stage_wan_pipeline()
    call = {"num_inference_steps": 2 * STEPS, **TINY_PIPELINES["wan"][1]}
    mixed = mixed_plan_for(pipeline, call)
    assert 1 < mixed.plan.sampler.steps < 2 * STEPS  # those of the first one
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        assert_interprets(pipeline, call, mixed)
    assert "transformer_2 runs dense" in caplog.text


@works_with(
    "Pipelines",
    "two transformers, each at some of the steps (Wan 2.2 A14B)",
    "works",
    "by a plan each: see `second_transformer(pipeline)`; either may be absent",
)
def test_two_transformers_run_by_a_plan_each(caplog: pytest.LogCaptureFixture) -> None:
    pipeline: Any = tiny_two_stage_wan_pipeline()
    second = ditfastattn.second_transformer(pipeline)
    call = {"num_inference_steps": 2 * STEPS, **TINY_PIPELINES["wan"][1]}
    plans = [mixed_plan_for(each, call) for each in (pipeline, second)]
    assert sum(each.plan.sampler.steps for each in plans) == 2 * STEPS
    assert all(each.plan.sampler.steps > 1 for each in plans)
    prompt, dense = Prompt(call, SEED), run(pipeline, call)

    ditfastattn.accelerate(second, plans[1].plan, lowering="eager")
    expected = plans[0].interpret(pipeline, prompt)  # the first one alone; the second by its plan
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        ditfastattn.accelerate(pipeline, plans[0].plan, lowering="eager")
    assert "transformer_2 runs dense" not in caplog.text
    assert float((run(pipeline, call) - expected).abs().max()) < 1e-4
    ditfastattn.restore(second)
    alone = run(pipeline, call)
    assert float((alone - expected).abs().max()) > 1e-3

    ditfastattn.restore(pipeline)
    ditfastattn.accelerate(pipeline, plans[0].plan, lowering="eager")
    expected = plans[1].interpret(second, prompt)
    ditfastattn.accelerate(second, plans[1].plan, lowering="eager")
    assert float((run(pipeline, call) - expected).abs().max()) < 1e-4
    ditfastattn.restore(pipeline)  # both
    assert torch.equal(run(pipeline, call), dense)


def test_the_second_transformer_has_a_scale_of_its_own() -> None:
    pipeline: Any = tiny_two_stage_wan_pipeline()
    second = ditfastattn.second_transformer(pipeline)
    call = {"num_inference_steps": 2 * STEPS, **TINY_PIPELINES["wan"][1], "guidance_scale": 4.0}
    plan = mixed_plan_for(second, {**call, "guidance_scale_2": 3.0}).plan
    assert plan.sampler.guidance_scale == 3.0
    ditfastattn.accelerate(second, plan, lowering="eager")
    run(pipeline, {**call, "guidance_scale_2": 3.0})
    for other in ({}, {"guidance_scale_2": 2.0}):  # without one, the first one's
        with pytest.raises(ConfigError, match=r"sampler\.guidance_scale"):
            run(pipeline, {**call, **other})
    run(pipeline, {**call, "guidance_scale": 3.0})


def test_the_second_transformer_may_be_the_only_one() -> None:
    pipeline: Any = tiny_two_stage_wan_pipeline()
    call = {"num_inference_steps": STEPS, **TINY_PIPELINES["wan"][1]}
    pipeline.register_to_config(boundary_ratio=1.1)
    pipeline.transformer = None
    second = ditfastattn.second_transformer(pipeline)
    mixed = mixed_plan_for(second, call)
    assert mixed.plan.sampler.steps == STEPS
    assert_interprets(second, call, mixed)
    with pytest.raises(ConfigError, match="no second transformer"):
        ditfastattn.second_transformer(second)


@works_with(
    "Hooks and offloading",
    "`enable_sequential_cpu_offload()`: plans of sites",
    "refused",
    "`enable_model_cpu_offload()` works, and so do plans of whole steps",
)
def test_weights_that_move_part_by_part_are_refused(pipelines: Path) -> None:
    pipeline, call = loaded("dit", pipelines)
    mixed = mixed_plan_for(pipeline, call)
    pipeline.enable_sequential_cpu_offload(device="cpu")
    for refused in (
        lambda: ditfastattn.accelerate(pipeline, mixed.plan),
        lambda: mixed_plan_for(pipeline, call),
    ):
        with pytest.raises(ConfigError, match=r"part by part[\s\S]*enable_model_cpu_offload"):
            refused()


def test_model_offloading_moves_what_runs_by_a_plan(pipelines: Path) -> None:
    pipeline, call = loaded("pixart", pipelines)
    mixed = mixed_plan_for(pipeline, call)
    expected = mixed.interpret(pipeline, Prompt(call, SEED))
    dense = run(pipeline, call)
    pipeline.enable_model_cpu_offload(device="cpu")  # the hooks of a GPU; weights stay in place
    ditfastattn.accelerate(pipeline, mixed.plan, lowering="eager")
    for _ in range(2):  # the pipeline takes its hooks off and puts them on after each generation
        assert float((run(pipeline, call) - expected).abs().max()) < 1e-4
        assert pipeline.transformer._hf_hook is not None
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline, call), dense)
