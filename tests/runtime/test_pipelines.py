"""Calibrating a diffusers pipeline: guidance is observed, the sampler recorded and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from ditfastattn import (
    CfgLayout,
    ConfigError,
    Plan,
    Strategy,
    Target,
    accelerate,
    calibrate,
    check_sampler,
    restore,
)
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.measure.session import open_session
from tests.helpers import tiny_dit
from tests.plans import mixed_plan_for

SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


class Pipeline:
    """Sample as diffusers' class-conditional pipelines do, with either order of the halves.

    An order of two calls, ``separate`` or ``separate-uncond-first``, runs one half after the other.
    """

    def __init__(self, order: str, scheduler: Any = None) -> None:
        self.transformer = tiny_dit().model
        self.scheduler: Any = scheduler or DDIMScheduler(**SCHEDULE)
        self.order = order

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int],
        num_inference_steps: int = 4,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn((len(labels), 4, 8, 8), generator=generator)
        classes = torch.tensor(labels)
        null = torch.full_like(classes, 10)
        swapped, apart = "uncond-first" in self.order, "separate" in self.order
        both = [null, classes] if swapped else [classes, null]
        for step, timestep in enumerate(self.scheduler.timesteps):
            guided = guidance_scale != 1.0 and self._guides(step)
            halves = both if guided else [classes]
            calls = halves if apart else [torch.cat(halves)]
            found = [self._predict(latents, timestep, labels) for labels in calls]
            self._after_calls(step, latents, timestep, classes)
            out = torch.cat(found)
            if guided:
                one, two = out.chunk(2)
                cond, uncond = (two, one) if swapped else (one, two)
                out = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(out, timestep, latents).prev_sample
        return self._decoded(latents)

    def _guides(self, step: int) -> bool:
        """Return whether guidance is on at ``step``."""
        return True

    def _after_calls(self, step: int, latents: Tensor, timestep: Tensor, classes: Tensor) -> None:
        """Do what comes between the calls of a step and the scheduler's."""

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return what a generation gives for its last ``latents``."""
        return latents

    def _predict(self, latents: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        halves = latents.repeat(len(classes) // len(latents), 1, 1, 1)
        times = self._given(timestep).expand(len(halves))
        found: Tensor = self.transformer(halves, timestep=times, class_labels=classes).sample
        return found

    def _given(self, timestep: Tensor) -> Tensor:
        """Return what the transformer is given for ``timestep``."""
        return timestep


class Rounded(Pipeline):
    """Give the transformer rounded timesteps, so that two steps at a time have equal ones.

    So does half precision: from 512 to 1024, bfloat16 has every fourth number.
    """

    def _given(self, timestep: Tensor) -> Tensor:
        return timestep // 400 * 400  # of 750, 500, 250 and 0


class Unguided(Rounded):
    """Take a guidance scale, and do nothing with it."""

    def __call__(
        self,
        labels: list[int],
        num_inference_steps: int = 4,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return super().__call__(labels, num_inference_steps, 1.0, generator)


ORDERS = ["cond-first", "uncond-first", "separate", "separate-uncond-first"]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_guidance_is_observed(order: str) -> None:
    assert detect_cfg_layout(Pipeline(order), {"labels": [1, 2]}) == CfgLayout(order)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_guidance_is_observed_where_timesteps_are_rounded(order: str) -> None:
    assert detect_cfg_layout(Rounded(order), {"labels": [1, 2]}) == CfgLayout(order)


def test_two_steps_of_one_rounded_timestep_are_not_guidance_in_two_calls() -> None:
    assert detect_cfg_layout(Unguided("cond-first"), {"labels": [1, 2]}) is CfgLayout.NONE


@pytest.mark.parametrize("order", ["cond-first", "separate"])
def test_steps_of_rounded_timesteps_are_counted_by_calls(order: str) -> None:
    pipeline: Any = Rounded(order)
    call: dict[str, Any] = {"labels": [1]}
    mixed = mixed_plan_for(pipeline, call, seed=1)
    assert mixed.plan.sampler.timesteps == (400.0, 400.0, 0.0, 0.0)
    expected = mixed.interpret(pipeline, Prompt(call, 5))
    accelerate(pipeline, mixed.plan, lowering="eager")
    got = [generate(pipeline, Prompt(call, 5)) for _ in range(2)]
    restore(pipeline)
    assert max(float((one - expected).abs().max()) for one in got) < 1e-4


@pytest.mark.parametrize("kind", [Pipeline, Rounded])
def test_two_calls_a_step_are_refused_by_a_layout_of_one(kind: type[Pipeline]) -> None:
    opening = open_session(kind("separate"), Prompt({"labels": [1]}, 0), CfgLayout.NONE)
    with pytest.raises(ConfigError, match="once a step"), opening:
        pass


class Cancelled(Exception):  # noqa: N818  # a user's own
    """End a generation between two calls of its transformer."""


@pytest.mark.parametrize("kind", [Pipeline, Rounded])
@pytest.mark.parametrize("order", ["cond-first", "separate"])
def test_a_generation_cancelled_between_two_calls_leaves_nothing(
    order: str, kind: type[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = kind(order)
    call: dict[str, Any] = {"labels": [1]}
    mixed = mixed_plan_for(pipeline, call, seed=1)
    accelerate(pipeline, mixed.plan, lowering="eager")
    expected = generate(pipeline, Prompt(call, 5))
    predict = pipeline._predict
    for calls in range(1, 4 * mixed.plan.sampler.cfg_layout.calls):
        left = [None] * calls

        def cancelled(*args: Any, left: list[None] = left) -> Tensor:
            if not left:
                raise Cancelled
            left.pop()
            found: Tensor = predict(*args)
            return found

        monkeypatch.setattr(pipeline, "_predict", cancelled)
        with pytest.raises(Cancelled):
            generate(pipeline, Prompt(call, 6))  # another image
        monkeypatch.setattr(pipeline, "_predict", predict)
        assert torch.equal(generate(pipeline, Prompt(call, 5)), expected)
    restore(pipeline)


def test_a_self_calibration_of_one_step_ends_where_the_sampler_begins_anew() -> None:
    pipeline: Any = Pipeline("cond-first")
    call: dict[str, Any] = {"labels": [1], "num_inference_steps": 1}
    dense = generate(pipeline, Prompt(call, 5))
    accelerate(pipeline, lowering="eager", cfg_layout="cond-first")
    assert all(torch.equal(generate(pipeline, Prompt(call, 5)), dense) for _ in range(3))
    restore(pipeline)


def test_without_guidance_there_is_no_layout() -> None:
    call = {"labels": [1, 2], "guidance_scale": 1.0}
    assert detect_cfg_layout(Pipeline("cond-first"), call) is CfgLayout.NONE


def test_other_conditions_in_both_calls_are_refused() -> None:
    class Other(Pipeline):
        def __call__(
            self,
            labels: list[int],
            num_inference_steps: int = 4,
            guidance_scale: float = 2.0,
            generator: torch.Generator | None = None,
        ) -> Tensor:
            guided = guidance_scale != 1.0
            shifted = [label + guided for label in labels]
            return super().__call__(shifted, num_inference_steps, guidance_scale, generator)

    with pytest.raises(ConfigError, match=r"in neither call[\s\S]*got: .*class_labels"):
        detect_cfg_layout(Other("separate"), {"labels": [1, 2]})


@pytest.mark.parametrize("order", ["separate", "separate-uncond-first"])
def test_a_plan_of_two_calls_in_either_order_is_the_interpreters(order: str) -> None:
    pipeline: Any = Pipeline(order)
    call: dict[str, Any] = {"labels": [1], "num_inference_steps": 5}
    mixed = mixed_plan_for(pipeline, call, seed=1)
    used = {strategy for row in mixed.plan.strategies for strategy in row}
    assert any(strategy.shares_guidance for strategy in used) == (order == "separate")
    expected = mixed.interpret(pipeline, Prompt(call, 5))
    dense = generate(pipeline, Prompt(call, 5))
    accelerate(pipeline, mixed.plan, lowering="eager")
    got = generate(pipeline, Prompt(call, 5))
    restore(pipeline)
    assert float((got - expected).abs().max()) < 1e-4
    assert float((got - dense).abs().max()) > 1e-3


def test_the_first_of_two_calls_cannot_take_the_second_ones() -> None:
    mixed = mixed_plan_for(Pipeline("separate-uncond-first"), {"labels": [1]})
    rows = [list(row) for row in mixed.plan.strategies]
    rows[1][0] = Strategy.SHARE_CFG
    strategies = tuple(map(tuple, rows))
    text = mixed.plan.model_copy(update={"strategies": strategies}).model_dump_json()
    with pytest.raises(ConfigError, match="the unconditional call comes first"):
        Plan.parse(text)


@pytest.fixture(scope="module")
def calibrated() -> Plan:
    call = {"labels": [1, 2], "num_inference_steps": 4}
    return calibrate(Pipeline("uncond-first"), call, target=Target.threshold(0.2))


def test_a_plan_records_what_it_holds_for(calibrated: Plan) -> None:
    sampler = calibrated.sampler
    assert (sampler.scheduler, sampler.steps) == ("DDIMScheduler", 4)
    assert sampler.timesteps == (750.0, 500.0, 250.0, 0.0)
    assert sampler.config["beta_end"] == 0.02
    assert sampler.guidance_scale == 2.0
    assert sampler.cfg_layout is CfgLayout.UNCOND_FIRST
    assert calibrated.inputs["hidden_states"] == (4, 8, 8)
    assert calibrated.changed > 0
    assert calibrated.calibration.seed == 0


def test_calibration_is_reproducible_and_restores_the_pipeline(calibrated: Plan) -> None:
    pipeline = Pipeline("uncond-first")
    original = pipeline.transformer
    again = calibrate(
        pipeline, {"labels": [1, 2], "num_inference_steps": 4}, target=Target.threshold(0.2)
    )
    assert pipeline.transformer is original
    assert again.strategies == calibrated.strategies
    assert again.model == calibrated.model


def test_the_plan_runs_in_the_pipeline_and_stays_close(calibrated: Plan) -> None:
    pipeline: Any = Pipeline("uncond-first")
    call: dict[str, Any] = {"labels": [1, 2], "num_inference_steps": 4}
    dense = pipeline(**call, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"plan": calibrated, "lowering": "eager"}
    torch._dynamo.reset()
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend="ditfastattn", fullgraph=True, options=options
    )
    planned = pipeline(**call, generator=torch.Generator().manual_seed(5))
    difference = float((planned - dense).norm() / dense.norm())
    assert 0.0 < difference < 0.5
    with pytest.raises(ConfigError, match="unexpected timestep"):
        pipeline(labels=[1, 2], num_inference_steps=3)


def test_another_sampler_is_refused_by_field(calibrated: Plan) -> None:
    check_sampler(calibrated, DDIMScheduler(**SCHEDULE), 2.0)
    with pytest.raises(ConfigError, match=r"plan.sampler.scheduler[\s\S]*DPMSolver"):
        check_sampler(calibrated, DPMSolverMultistepScheduler(**SCHEDULE))
    with pytest.raises(ConfigError, match=r"plan.sampler.config.beta_end"):
        check_sampler(calibrated, DDIMScheduler(**{**SCHEDULE, "beta_end": 0.03}))
    with pytest.raises(ConfigError, match=r"plan.sampler.guidance_scale"):
        check_sampler(calibrated, DDIMScheduler(**SCHEDULE), 3.0)


def test_a_sampler_with_an_infinite_setting_survives_the_file() -> None:
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE)  # lambda_min_clipped is -inf
    pipeline = Pipeline("cond-first", scheduler)
    plan = calibrate(
        pipeline, {"labels": [1, 2], "num_inference_steps": 2}, target=Target.threshold(0.1)
    )
    check_sampler(Plan.parse(plan.model_dump_json()), DPMSolverMultistepScheduler(**SCHEDULE))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="the pipeline has no transformer"):
        calibrate(object(), {})
    with pytest.raises(ConfigError, match="bound is out of range"):
        calibrate(Pipeline("cond-first"), {"labels": [1]}, target=Target.threshold(0.0))
