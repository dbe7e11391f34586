"""Retargeting: rows are mapped by position, stay legal, and count only where images agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from ditfastattn import (
    CfgLayout,
    ConfigError,
    Plan,
    Strategy,
    Target,
    TargetMissedError,
    retarget,
    validate,
)
from ditfastattn.passes.analysis.site import Site
from ditfastattn.runtime.search.adapted_rows import retarget_rows
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import (
    TINY_DIGITS,
    capture_sites,
    make_plan,
    mixed_strategies,
    tiny_digits_pipeline,
    tiny_dit,
)
from tests.plans import plan_for

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

F, S, W, C = Strategy.FULL, Strategy.SHARE_STEP, Strategy.WINDOW, Strategy.SHARE_CFG
CALL: dict[str, Any] = {"class_labels": [1, 2], "guidance_scale": 2.0}
HARMLESS = Target.min_ssim(0.01)
STEPS = 4


def tiny_pipeline(scheduler: Any = None) -> DigitsPipeline:
    return tiny_digits_pipeline(scheduler or DDIMScheduler(clip_sample=False))


def larger_pipeline() -> DigitsPipeline:
    """Return the tiny pipeline for 32x32 pixels: the same parameters, other position buffers."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**TINY_DIGITS, "sample_size": 32}).eval()
    model.load_state_dict(tiny_pipeline().transformer.state_dict(), strict=False)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    pipeline = DigitsPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def steps(count: int) -> dict[str, Any]:
    return {**CALL, "num_inference_steps": count}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(tiny_pipeline(), steps(STEPS), (F, W, S, S), Target.min_ssim(0.5))


def rows_of(
    plan: Plan,
    count: int,
    sites: Sequence[Site],
    layout: CfgLayout = CfgLayout.COND_FIRST,
) -> list[Row]:
    session: Any = SimpleNamespace(steps=count, sites=tuple(sites), layout=layout)
    return retarget_rows(plan, session)


def a_plan(*strategies: Strategy) -> tuple[Plan, tuple[Site, ...]]:
    """Return a plan of six steps for a tiny DiT, the same strategy at each site, and its sites."""
    sites = capture_sites(tiny_dit())[1]
    return make_plan(tiny_dit(), [(strategy,) * len(sites) for strategy in strategies]), sites


def first_column(rows: Sequence[Row]) -> list[Strategy]:
    return [row[0] for row in rows]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (6, [F, S, W, F, C, S]),  # nothing to adapt
        (3, [F, W, S]),  # positions 0, 1/2, 1: between old steps 2 and 3 the earlier
        (2, [F, S]),
        (1, [F]),
        (11, [F, F, S, S, W, W, F, F, C, C, S]),
    ],
)
def test_a_step_takes_the_row_of_its_place(count: int, expected: list[Strategy]) -> None:
    plan, sites = a_plan(F, S, W, F, C, S)
    assert first_column(rows_of(plan, count, sites)) == expected


def test_the_first_step_is_full_whatever_the_plan() -> None:
    plan, sites = a_plan(C, C, F, W, S, S)
    assert first_column(rows_of(plan, 6, sites)) == [F, C, F, W, S, S]


@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_is_legal_at_any_number_of_steps(seed: int) -> None:
    sites = capture_sites(tiny_dit())[1]
    plan = make_plan(tiny_dit(), mixed_strategies(sites, seed))
    for count in range(1, 25):
        rows = rows_of(plan, count, sites)
        timesteps = tuple(float(count - step) for step in range(count))
        sampler = plan.sampler.model_copy(update={"steps": count, "timesteps": timesteps})
        fields = {**dict(plan), "sampler": sampler, "strategies": tuple(rows)}
        assert Plan(**fields).sampler.steps == count  # the plan's own check


def test_what_is_not_legal_here_becomes_full_and_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan, (first, second, *others) = a_plan(F, W, S, W, C, S)
    no_window = replace(second, no_window="only 4 tokens")
    stranger = replace(first, name="another.attn")
    with caplog.at_level(logging.INFO, "ditfastattn"):
        rows = rows_of(plan, 6, [stranger, no_window, *others])
    assert [row[0] for row in rows] == [F] * 6
    assert [row[1] for row in rows] == [F, F, S, F, C, S]
    assert [row[2] for row in rows] == [F, W, S, W, C, S]
    assert "another.attn: the plan does not list this site" in caplog.text
    assert f"{second.name}, window: only 4 tokens" in caplog.text
    assert "2 shortcuts are not legal here" in caplog.text


def test_without_guidance_none_is_shared() -> None:
    plan, sites = a_plan(F, C, S, C, Strategy.WINDOW_SHARE_CFG, W)
    assert first_column(rows_of(plan, 6, sites, CfgLayout.NONE)) == [F, F, S, F, F, W]


@pytest.mark.parametrize("count", [7, 3, STEPS])
def test_other_steps_are_measured_recorded_and_run(plan: Plan, count: int, tmp_path: Path) -> None:
    out, pipeline, phases = tmp_path / "plan.json", tiny_pipeline(), set()
    original = pipeline.transformer
    unseen = {**steps(count), "class_labels": [5]}
    made = retarget(
        pipeline,
        plan,
        steps(count),
        held_out=unseen,
        seed=7,
        out=out,
        on_progress=lambda progress: phases.add(progress.phase),
    )
    assert pipeline.transformer is original
    assert Plan.load(out) == made
    assert made.sampler.steps == len(made.sampler.timesteps) == count
    assert made.changed > 0
    if count == STEPS:
        assert made.strategies == plan.strategies
    record = made.calibration
    assert (record.method, record.seed, record.target) == ("retarget", 7, plan.calibration.target)
    assert record.calibrated is not None
    assert record.held_out is not None
    assert (record.calibrated.prompts, record.held_out.prompts) == (2, 1)
    assert phases == {"measuring the calibration prompts", "measuring the held-out prompts"}
    found = validate(tiny_pipeline(), made, {"class_labels": [1, 2]}, seed=7, speed=False)
    assert found.qualities[0].worst == pytest.approx(record.calibrated.worst, abs=1e-5)


def test_another_scheduler_is_one_more_thing_to_adapt_to(plan: Plan) -> None:
    other = tiny_pipeline(DPMSolverMultistepScheduler())
    made = retarget(other, plan, steps(5), target=HARMLESS)
    assert made.sampler.scheduler == "DPMSolverMultistepScheduler"
    assert made.calibration.target is not None
    assert made.calibration.target.bound == HARMLESS.bound


def test_another_resolution_takes_the_windows_of_its_own(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    made = retarget(larger_pipeline(), plan, steps(STEPS), target=HARMLESS)
    assert made.inputs["hidden_states"] == (1, 32, 32)
    assert [site.tokens for site in made.sites] == [4 * site.tokens for site in plan.sites]
    for own, planned in zip(made.sites, plan.sites, strict=True):
        assert isinstance(planned.window, int)
        assert own.window == 4 * planned.window
    assert made.strategies == plan.strategies
    assert made.model.weights != plan.model.weights
    assert "the weights cannot be compared" in caplog.text


def test_a_missed_target_says_by_how_much_and_writes_nothing(plan: Plan, tmp_path: Path) -> None:
    out, target = tmp_path / "plan.json", Target.min_psnr(300.0)
    with pytest.raises(
        TargetMissedError, match=r"worst calibration prompt, \d+ below the bound[\s\S]*a new plan"
    ):
        retarget(tiny_pipeline(), plan, steps(7), target=target, out=out)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_unseen_prompts_are_measured_too(plan: Plan) -> None:
    phases: list[str] = []

    def fit(dense: torch.Tensor, planned: torch.Tensor) -> float:
        return 0.0 if "held-out" in phases[-1] else 1.0

    target = Target.quality(fit, at_least=0.5)
    with pytest.raises(TargetMissedError, match=r"worst held-out prompt, 0\.5 below"):
        retarget(
            tiny_pipeline(),
            plan,
            steps(STEPS),
            target=target,
            on_progress=lambda progress: phases.append(progress.phase),
        )


def test_another_model_is_refused(plan: Plan) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out_1.weight.mul_(1.5)
    with pytest.raises(ConfigError, match=r"plan.model.weights"):
        retarget(pipeline, plan, steps(7), target=HARMLESS)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    shallow = DiTTransformer2DModel(**{**TINY_DIGITS, "num_layers": 1, "sample_size": 32}).eval()
    with pytest.raises(ConfigError, match=r"plan.model.structure"):
        retarget(DigitsPipeline(shallow, scheduler), plan, steps(7), target=HARMLESS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target.min_speedup(1.5), "run `ditfastattn validate` for the speed"),
        (Target.max_latency(1.0), "run `ditfastattn validate` for the speed"),
        (Target.threshold(0.1), "the plan was not searched for one"),
    ],
)
def test_only_a_quality_can_be_kept(plan: Plan, target: Target, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retarget(tiny_pipeline(), plan, steps(7), target=target)
