"""Plans of whole steps in bundles, loops and engines, compared with plain torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from examples.whole_steps import WholeSteps
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, Plan, Strategy, Target
from ditfastattn.passes.analysis.output_site import output_site
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.passes.plan.strategies import FITTED, fitted_terms
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from tests.export.helpers import export_once
from tests.helpers import (
    STEPS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    noise,
    run_plan,
    tiny_digits_pipeline,
)

COLUMN = (Strategy.FULL, FITTED[0], Strategy.FULL, FITTED[1], Strategy.EXTRAPOLATE, Strategy.FULL)


def mixed_plan(tiny: TinyModel, layout: CfgLayout = CfgLayout.COND_FIRST) -> Plan:
    """Return a plan of whole steps, and of attentions that share at the last one."""
    captured, sites = capture_every_site(tiny)
    assert len(COLUMN) == STEPS
    inner = [
        Strategy.SHARE_STEP if step == STEPS - 1 or not own.computes else Strategy.FULL
        for step, own in enumerate(COLUMN)
    ]
    numbers = iter(noise(3, 1000).mul(0.5).tolist())
    coefficients = tuple(
        tuple(
            tuple(next(numbers) for _ in range(fitted_terms(own.outputs_read, layout.batched)))
            for _ in range(layout.branches)
        )
        if own.fitted
        else ()
        for own in COLUMN
    )
    whole = planned_site(replace(output_site(captured), coefficients=coefficients))
    plan = make_plan(tiny, [(own,) * len(sites) for own in inner], layout, feed_forwards=True)
    rows = ((*row, own) for row, own in zip(plan.strategies, COLUMN, strict=True))
    data = json.loads(plan.model_dump_json())
    data["sites"].append(json.loads(whole.model_dump_json()))
    data["strategies"] = [[str(entry) for entry in row] for row in rows]
    return Plan.parse(json.dumps(data))


def interpreted(tiny: TinyModel, plan: Plan) -> list[Tensor]:
    _, sites = capture_every_site(tiny)
    interpreter = PlanInterpreter(tiny.model, plan.strategies, sites, plan.sampler.cfg_layout)
    whole, found = WholeSteps(json.loads(plan.model_dump_json())), []
    for step in range(STEPS):
        call = tiny.call(step, 4)

        def run(call: dict[str, Any] = call) -> Tensor:
            result: Tensor = tiny.model(**call)[0]
            return result

        with torch.no_grad(), interpreter.step(step):
            found.append(whole(step, call["hidden_states"], run))
    return found


@pytest.mark.parametrize("name", ["dit", "pixart"])  # pixart predicts variances too
def test_graphs_and_bundles_are_the_interpreters(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]()
    plan = mixed_plan(tiny)
    expected = interpreted(tiny, plan)
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5
    manifest = export_once(tiny, plan, tmp_path / "bundle")
    # Two that run in full, as one stores its output and is not stored; one that shares sites.
    assert len(manifest.variants) == 6
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


def test_caches_are_of_the_output_alone() -> None:
    captured, _ = capture_every_site(TINY_MODELS["dit"]())
    whole = output_site(captured)
    rows = [(Strategy.FULL if own.fitted else own,) for own in COLUMN]
    rows[-2] = (Strategy.EXTRAPOLATE,)
    output = 4 * 4 * 8 * 8 * 4
    assert unroll(rows, captured, [whole]).slots.peak_bytes == 2 * output  # the last, and a new one


@pytest.fixture(scope="module")
def digits() -> tuple[Any, dict[str, Any], Plan]:
    torch._dynamo.reset()
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [1], "num_inference_steps": 6, "guidance_scale": 2.0}
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    plan = calibrate_whole_steps(pipeline, prompts, unseen, Options(Target.min_speedup(2.0)))
    return pipeline, call, plan


def test_a_searched_plan_is_exported_with_its_loop(
    digits: tuple[Any, dict[str, Any], Plan], tmp_path: Path
) -> None:
    pipeline, call, plan = digits
    ditfastattn.export(pipeline, call, plan, tmp_path / "bundle", loop=True)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    images = generate(pipeline, Prompt(call, 9))
    ditfastattn.restore(pipeline)
    own = pipeline.transformer
    pipeline.transformer = load(tmp_path / "bundle")
    exported = generate(pipeline, Prompt(call, 9))
    pipeline.transformer = own
    assert float((exported - images).abs().max()) < 1e-4
    verified = ditfastattn.verify(tmp_path / "bundle", pipeline, call)
    assert verified.passed
    assert verified.loop_error < 1e-4


def test_another_guidance_scale_is_refitted(digits: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, call, plan = digits
    other = call | {"guidance_scale": 3.0}
    refitted = ditfastattn.retarget(pipeline, plan, other, target=Target.min_psnr(5.0))
    assert refitted.sampler.guidance_scale == 3.0
    assert [row[0].computes for row in refitted.strategies] == [
        row[0].computes for row in plan.strategies
    ]
    assert refitted.sites[0].coefficients != plan.sites[0].coefficients
    ditfastattn.accelerate(pipeline, refitted, lowering="eager")
    generate(pipeline, Prompt(other, 9))
    ditfastattn.restore(pipeline)
