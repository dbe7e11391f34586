"""Real pipelines, saved and loaded, accelerated in one line and restored in another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import (  # type: ignore[import-untyped]  # it has no annotations
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Plan, Strategy, Target
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.plans import plan_for
from tests.shared import digest, made_once
from tests.tiers import slow_but
from tests.tiny_pipelines import (
    IMG2IMG_ARGUMENTS,
    TINY_PIPELINES,
    load_saved,
    tiny_flux_img2img_pipeline,
)
from tests.works_with import works_with

STEPS = 4


def run(pipeline: Any, call: dict[str, Any], seed: int = 5) -> Tensor:
    images: Tensor = generate(pipeline, Prompt({"num_inference_steps": STEPS, **call}, seed))
    return images


def calibrated(pipeline: Any, call: dict[str, Any]) -> Plan:
    two_calls = type(pipeline).__name__ in ("WanPipeline", "QwenImagePipeline")  # a step
    target = Target.min_psnr(12.0) if two_calls else Target.threshold(0.5)
    return ditfastattn.calibrate(pipeline, {"num_inference_steps": STEPS, **call}, target=target)


def planned(pipeline: Any, call: dict[str, Any]) -> Plan:
    """Return what ``calibrated`` does, which is calibrated once a run."""

    def make(folder: Path) -> None:
        calibrated(pipeline, call).save(folder / "plan.json")

    scheduler = dict(pipeline.scheduler.config)
    key = digest([type(pipeline).__name__, pipeline.transformer, scheduler, call])
    return Plan.load(made_once("plans", key, make) / "plan.json")


def loaded(name: str, pipelines: Path) -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    return load_saved(name, pipelines)


# By default batched guidance and none: test_planned_pipelines.py runs guidance in two calls.
@pytest.mark.parametrize("name", slow_but({"pixart", "flux"}, TINY_PIPELINES))
def test_a_loaded_pipeline_is_accelerated_by_its_plan_and_restored(
    name: str, pipelines: Path
) -> None:
    pipeline, call = loaded(name, pipelines)
    dense = run(pipeline, call)
    plan = planned(pipeline, call)
    assert plan.changed > 0
    transformer = pipeline.transformer
    assert ditfastattn.accelerate(pipeline, plan, lowering="eager") is pipeline
    assert pipeline.transformer is transformer
    faster = run(pipeline, call)
    assert faster.isfinite().all()
    assert not torch.equal(faster, dense)
    assert torch.equal(run(pipeline, call), faster)  # a second generation begins anew
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline, call), dense)


def test_a_greedy_search_needs_guidance_in_one_call(pipelines: Path) -> None:
    pipeline, call = loaded("wan", pipelines)
    with pytest.raises(ConfigError, match="needs guidance in one call"):
        ditfastattn.calibrate(pipeline, {**call}, target=Target.threshold(0.1))


@pytest.fixture
def digits(pipelines: Path) -> tuple[Any, dict[str, Any], Plan]:
    pipeline, call = loaded("dit", pipelines)
    return pipeline, call, planned(pipeline, call)


@works_with(
    "Copies and processes",
    "`save_pretrained` of an accelerated pipeline",
    "works",
    "the plan is not part of what is saved",
)
def test_the_plan_may_be_a_file_and_saving_is_unaffected(
    digits: tuple[Any, dict[str, Any], Plan], tmp_path: Path
) -> None:
    pipeline, call, plan = digits
    plan.save(tmp_path / "plan.json")
    ditfastattn.accelerate(pipeline, tmp_path / "plan.json", lowering="eager")
    expected = run(pipeline, call)
    pipeline.save_pretrained(tmp_path / "saved")
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    ditfastattn.accelerate(again, plan, lowering="eager")
    assert torch.equal(run(again, call), expected)


@works_with(
    "Other calls than the plan's",
    "another number of steps, another scheduler",
    "refused",
    "both by name",
)
def test_another_step_count_and_another_scheduler_are_refused(
    digits: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, plan = digits
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match="unexpected timestep"):
        run(pipeline, {**call, "num_inference_steps": STEPS + 1})
    other = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.05)
    pipeline.scheduler = other
    with pytest.raises(ConfigError, match="beta_end"):
        ditfastattn.accelerate(pipeline, plan)


def test_the_sampler_is_compared_as_each_generation_begins(pipelines: Path) -> None:
    pipeline, call = loaded("sd3", pipelines)
    plan = planned(pipeline, {**call, "guidance_scale": 4.0})
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline, {**call, "guidance_scale": 4.0})
    with pytest.raises(ConfigError, match=r"guidance_scale[\s\S]*got:\s+5\.0[\s\S]*4\.0"):
        run(pipeline, {**call, "guidance_scale": 5.0})
    assert torch.equal(run(pipeline, {**call, "guidance_scale": 4.0}), expected)
    scheduler = pipeline.scheduler
    changed = {"num_train_timesteps": 1001}
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changed)
    with pytest.raises(ConfigError, match=r"config\.num_train_timesteps[\s\S]*1001"):
        run(pipeline, {**call, "guidance_scale": 4.0})
    pipeline.scheduler = scheduler
    assert torch.equal(run(pipeline, {**call, "guidance_scale": 4.0}), expected)


@works_with(
    "Other calls than the plan's",
    "another guidance scale",
    "refused",
    "also where the pipeline does not report its own, as PixArt's",
)
@pytest.mark.parametrize("name", slow_but({"pixart"}, ["dit", "pixart", "qwenimage"]))
def test_the_guidance_of_a_pipeline_that_does_not_report_it_is_compared(name: str) -> None:
    make, given = TINY_PIPELINES[name]
    pipeline = make()
    scale = "true_cfg_scale" if name == "qwenimage" else "guidance_scale"
    call = {"num_inference_steps": 2, **given, scale: 3.0}
    plan = plan_for(pipeline, call, [Strategy.FULL, Strategy.FULL])
    assert plan.sampler.guidance_scale == 3.0
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline, call)
    with pytest.raises(ConfigError, match=r"guidance_scale[\s\S]*got:\s+5\.0[\s\S]*3\.0"):
        run(pipeline, {**call, scale: 5.0})
    assert torch.equal(run(pipeline, call), expected)


@works_with(
    "Other calls than the plan's",
    "another resolution, another transformer",
    "refused",
    "see several plans",
)
def test_another_resolution_and_another_structure_are_refused(pipelines: Path) -> None:
    pipeline, call = loaded("pixart", pipelines)
    plan = planned(pipeline, call)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"inputs\.hidden_states[\s\S]*calibrate a plan"):
        run(pipeline, {**call, "height": 2 * call["height"]})
    ditfastattn.restore(pipeline)
    transformer = pipeline.transformer
    shallow = type(transformer).from_config({**transformer.config, "num_layers": 1})
    pipeline.transformer = shallow.eval()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"plan\.sites[\s\S]*calibrate a plan"):
        run(pipeline, call)


@works_with(
    "Other calls than the plan's",
    "`calibrate` of an accelerated pipeline",
    "refused",
    "`restore` it first",
)
def test_an_accelerated_pipeline_is_not_calibrated_before_it_is_restored(
    digits: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, plan = digits
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match="restore"):
        calibrated(pipeline, call)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")  # again is fine: the newer plan counts
    ditfastattn.restore(pipeline)
    ditfastattn.restore(pipeline)
    assert calibrated(pipeline, call).strategies == plan.strategies


def test_bad_input_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="has no transformer"):
        ditfastattn.accelerate(object())
    build, _ = TINY_PIPELINES["dit"]
    with pytest.raises(ConfigError, match="unknown option"):
        ditfastattn.accelerate(build(), None, speed="high")
    with pytest.raises(ConfigError, match="cannot read the plan"):
        ditfastattn.accelerate(build(), "/nowhere/plan.json")


def test_without_a_plan_the_first_generation_calibrates_one(
    pipelines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, call = loaded("dit", pipelines)
    ditfastattn.accelerate(pipeline, lowering="eager", threshold=0.5)
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        run(pipeline, call)
    assert "calibrates" in caplog.text


@works_with(
    "Hooks and offloading",
    "offloading of the whole model (accelerate), before or after `accelerate`",
    "works",
    "the plan runs beneath it",
)
@pytest.mark.parametrize("hooked_first", [True, False])
def test_offloading_hooks_may_come_before_or_after(
    digits: tuple[Any, dict[str, Any], Plan], hooked_first: bool
) -> None:
    pipeline, call, plan = digits
    dense = run(pipeline, call)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline, call)
    ditfastattn.restore(pipeline)
    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    if hooked_first:
        add_hook_to_module(pipeline.transformer, hook)
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
    else:
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
        add_hook_to_module(pipeline.transformer, hook)
    assert torch.equal(run(pipeline, call), expected)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline, call), dense)
    remove_hook_from_module(pipeline.transformer)
    assert torch.equal(run(pipeline, call), dense)


@works_with(
    "Pipelines",
    "several images per prompt, `callback_on_step_end`",
    "works",
)
def test_more_images_per_prompt_and_callbacks(pipelines: Path) -> None:
    pipeline, call = loaded("sd3", pipelines)
    ditfastattn.accelerate(pipeline, planned(pipeline, call), lowering="eager")
    assert ditfastattn.reports() is not None
    seen: list[int] = []

    def note(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return kwargs

    images = run(pipeline, {**call, "num_images_per_prompt": 2, "callback_on_step_end": note})
    assert len(images) == 2
    assert seen == list(range(STEPS))


@exercises("img2img", "flux")
@works_with(
    "Pipelines",
    "image-to-image, which begins in the middle of its schedule",
    "works",
    "another `strength` is refused",
)
def test_img2img_begins_in_the_middle_of_its_schedule(pipelines: Path) -> None:
    pipeline: Any = tiny_flux_img2img_pipeline()
    call = {**IMG2IMG_ARGUMENTS, "strength": 0.5, "num_inference_steps": 2 * STEPS}
    torch._dynamo.reset()
    dense = run(pipeline, call)
    plan = planned(pipeline, call)
    assert plan.sampler.steps == STEPS
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    assert not torch.equal(run(pipeline, call), dense)
    with pytest.raises(ConfigError, match="unexpected timestep"):
        run(pipeline, {**call, "strength": 1.0})


def test_guidance_is_found_as_each_pipeline_runs_it(pipelines: Path) -> None:
    layouts = {}
    for name in ("dit", "pixart", "sd3", "flux", "wan", "ltx", "qwenimage"):
        pipeline, call = loaded(name, pipelines)
        layouts[name] = detect_cfg_layout(pipeline, call)
    assert layouts == {
        "dit": CfgLayout.COND_FIRST,
        "pixart": CfgLayout.UNCOND_FIRST,
        "sd3": CfgLayout.UNCOND_FIRST,
        "flux": CfgLayout.NONE,  # its guidance is an input of the model: nothing to share
        "wan": CfgLayout.SEPARATE,
        "ltx": CfgLayout.UNCOND_FIRST,
        "qwenimage": CfgLayout.SEPARATE,
    }


def test_an_empty_batch_is_refused_by_name(digits: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, _, plan = digits
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    shape = plan.inputs["hidden_states"]
    call = {"hidden_states": torch.zeros(0, *shape), "timestep": torch.zeros(0)}
    with pytest.raises(ConfigError, match="the batch is empty"):
        pipeline.transformer(**call, class_labels=torch.zeros(0, dtype=torch.long))


def test_a_timestep_without_dimensions_is_refused_as_by_the_dense_model(
    digits: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, plan = digits
    given = {"timestep": torch.tensor(1), "class_labels": torch.tensor([1, 1000])}
    latents = torch.zeros(2, 4, 8, 8)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline, call)
    with torch.no_grad(), pytest.raises(AssertionError, match="1d-array"):
        pipeline.transformer(latents, **given)
    assert torch.equal(run(pipeline, call), expected)
