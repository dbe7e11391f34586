"""Plans of whole steps and of sites, found in one search, in real pipelines."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import ditfastattn
from ditfastattn import ConfigError, Plan, Strategy, Target, TargetMissedError
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.whole_steps import calibrate as whole_steps
from ditfastattn.runtime.search.whole_steps.observed import UnobservableError
from ditfastattn.tools.commands.search_output import print_outcome
from tests.tiny_pipelines import TINY_PIPELINES, tiny_unet_pipeline

STEPS = 6
TARGET = Target.min_psnr(40.0)


def opened(name: str) -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    make, given = TINY_PIPELINES[name]
    return make(), {"num_inference_steps": STEPS, **given}


def search(pipeline: Any, call: dict[str, Any], **options: Any) -> Plan:
    """Search by counted operations, so that two searches find the same plan."""
    given = {"target": TARGET, "objective": "flops", **options}
    return ditfastattn.calibrate(pipeline, call, **given)


def accelerated(pipeline: Any, plan: Plan, prompt: Prompt) -> Tensor:
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    images: Tensor = generate(pipeline, prompt)
    ditfastattn.restore(pipeline)
    return images


def decibels(dense: Tensor, planned: Tensor) -> float:
    return float(-10 * (dense - planned).square().mean().log10())


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Generator[None]:
    """Fit on three images: what is found differs, how it is found does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_steps, "FITTED_ON", 3)
        yield


@pytest.fixture(scope="module")
def pixart() -> tuple[Any, dict[str, Any], Plan]:
    pipeline, call = opened("pixart")
    return pipeline, call, search(pipeline, call)


def check_found(pipeline: Any, call: dict[str, Any], plan: Plan) -> None:
    """Check that ``plan`` skips steps, saves within the others, and does what its record says."""
    *_, output = zip(*plan.strategies, strict=True)
    assert plan.sites[-1].kind is SiteKind.OUTPUT
    runs = [step for step, strategy in enumerate(output) if strategy.computes]
    assert 0 < len(runs) < STEPS
    inside = [entry for step in runs for entry in plan.strategies[step][:-1]]
    assert set(inside) > {Strategy.FULL}
    found = plan.calibration
    assert found.method == "joint"
    fastest = max(found.tried, key=lambda each: each.predicted_speedup or 0.0)
    assert fastest.what == f"{len(runs)} of {STEPS} steps, and sites"
    assert fastest.predicted_speedup == found.predicted_speedup
    assert found.tried[-1].what == f"{STEPS} of {STEPS} steps, and sites"
    assert found.predicted_speedup is not None
    assert found.predicted_speedup > STEPS / len(runs)
    assert found.calibrated is not None
    assert found.held_out is not None
    assert min(found.calibrated.worst, found.held_out.worst) >= TARGET.bound
    for seed, worst in ((0, found.calibrated.worst), (500, found.held_out.worst)):
        prompt = Prompt(call, seed)
        value = decibels(generate(pipeline, prompt), accelerated(pipeline, plan, prompt))
        assert value >= worst - 0.01
        if found.held_out.prompts == 1 and seed == 500:
            assert value == pytest.approx(worst, abs=0.01)


def test_sites_save_within_the_steps_that_run(pixart: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, call, plan = pixart
    check_found(pipeline, call, plan)
    whole = search(pipeline, call, method="whole-steps").calibration
    assert plan.calibration.predicted_speedup is not None
    assert whole.predicted_speedup is not None
    assert plan.calibration.predicted_speedup >= 1.02 * whole.predicted_speedup


@pytest.mark.slow  # the same with guidance in two calls
def test_guidance_in_two_calls() -> None:
    pipeline, call = opened("wan")
    check_found(pipeline, call, search(pipeline, call))


@pytest.mark.slow
def test_an_interrupted_search_resumes(
    pixart: tuple[Any, dict[str, Any], Plan], tmp_path: Any
) -> None:
    pipeline, call, expected = pixart

    def stop(progress: Any) -> None:
        if "sites: the held-out" in progress.phase:
            raise KeyboardInterrupt

    out = tmp_path / "plan.json"
    with pytest.raises(KeyboardInterrupt):
        search(pipeline, call, out=out, on_progress=stop)
    phases: list[str] = []
    plan = search(pipeline, call, out=out, on_progress=lambda each: phases.append(each.phase))
    assert "which steps run" not in phases
    assert plan.strategies == expected.strategies
    assert plan.sites == expected.sites
    assert Plan.load(out) == plan
    assert not list(tmp_path.glob("*.search"))


def test_another_guidance_scale_is_fitted_anew(pixart: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, call, plan = pixart
    other = {**call, "guidance_scale": call["guidance_scale"] + 1.0}
    target = Target.min_psnr(TARGET.bound - 10.0)
    refitted = ditfastattn.retarget(pipeline, plan, other, target=target)
    assert refitted.strategies == plan.strategies
    assert refitted.sites[:-1] == plan.sites[:-1]
    assert refitted.sites[-1].coefficients != plan.sites[-1].coefficients
    found = refitted.calibration.held_out
    assert found is not None
    prompt = Prompt(other, 500)
    value = decibels(generate(pipeline, prompt), accelerated(pipeline, refitted, prompt))
    assert value == pytest.approx(found.worst, abs=0.01)


def test_other_steps_keep_whole_steps_and_sites(pixart: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, call, plan = pixart
    longer = {**call, "num_inference_steps": 2 * STEPS}
    adapted = ditfastattn.retarget(pipeline, plan, longer, target=Target.min_psnr(10.0))
    runs = sum(row[-1].computes for row in adapted.strategies)
    assert 0 < runs < 2 * STEPS
    assert len({entry for row in adapted.strategies for entry in row[:-1]}) > 1


def test_where_no_shortcut_fits_the_plan_is_of_whole_steps_or_dense(
    pixart: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, _ = pixart
    plan = search(pipeline, call, target=Target.min_psnr(150.0))
    assert plan.calibration.method == "joint"
    assert plan.changed == 0
    assert plan.calibration.tried[0].outcome == "no plan that skips a step meets the target"
    assert plan.calibration.tried[-1].predicted_speedup is None


def test_what_the_joint_search_cannot_do_is_refused(
    pixart: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, _ = pixart
    with pytest.raises(ConfigError, match="jointly for a quality"):
        search(pipeline, call, target=Target.min_speedup(1.5), method="joint")
    with pytest.raises(ConfigError, match="cannot be capped"):
        search(pipeline, call, max_variants=3, method="joint")


def test_where_whole_steps_cannot_be_searched_sites_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> Any:
        raise UnobservableError("one call", "two")

    pipeline, call = opened("pixart")
    monkeypatch.setattr(whole_steps, "observe", refuse)
    options: Any = {"target": Target.min_psnr(20.0), "out": tmp_path / "plan.json"}
    with pytest.raises(UnobservableError):
        search(pipeline, call, method="joint", **options)
    plan = search(pipeline, call, **options)
    assert "only sites: one call; seen: two" in caplog.text
    assert plan.calibration.method == "global"
    assert [(each.what, each.outcome) for each in plan.calibration.tried] == [
        ("whole steps", "not possible: one call; seen: two")
    ]
    assert Plan.load(tmp_path / "plan.json") == plan
    console = Console(record=True, width=120)
    print_outcome(console, plan)
    assert "tried: whole steps: not possible: one call; seen: two" in console.export_text()


def test_even_dense_images_below_the_bound_are_reported(
    pixart: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, _ = pixart
    dark = Target.quality(lambda _, planned: planned.flatten(1).mean(1), at_least=2.0)
    with pytest.raises(TargetMissedError, match="even the dense model"):
        search(pipeline, call, target=dark, method="whole-steps")


def test_options_of_sites_are_checked_before_anything_is_kept(
    pixart: tuple[Any, dict[str, Any], Plan], tmp_path: Path
) -> None:
    pipeline, call, _ = pixart
    with pytest.raises(ConfigError, match=r"calibrate\(cache_dtype\)"):
        search(pipeline, call, out=tmp_path / "plan.json", cache_dtype="float64")
    assert not list(tmp_path.glob("*.search"))


def test_a_model_that_is_not_captured_gets_whole_steps() -> None:
    call = {"prompt": "a cat", "num_inference_steps": STEPS, "height": 8, "width": 8}
    plan = search(tiny_unet_pipeline(), call, target=Target.min_psnr(20.0))
    assert plan.calibration.method == "whole-steps"
    assert [each.what for each in plan.calibration.tried] == ["sites"]
    assert plan.changed > 0
