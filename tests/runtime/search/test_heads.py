"""A search gives heads of one attention strategies of their own, where they differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ditfastattn import ConfigError, Plan, Strategy, Target, accelerate, calibrate, retarget
from ditfastattn.runtime.pipeline.prompts import as_images, generate, split_prompts
from ditfastattn.runtime.search.judge.judgement import metric_values
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from tests.helpers import TINY_DIGITS, attentive_pipeline, tiny_digits_pipeline

SHARE = Strategy.SHARE_STEP
CALL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 6, "guidance_scale": 2.0}
HELD_OUT: dict[str, Any] = {**CALL, "class_labels": [3, 4, 5]}
TARGET = Target.min_ssim(0.99)


def pipeline() -> Any:
    """Return a tiny model in each of whose attentions the first of two heads never changes."""
    made = attentive_pipeline()
    with torch.no_grad():
        for name, parameter in made.transformer.named_parameters():
            if ".attn1.to_v." in name and parameter.dim() == 2:
                parameter[: len(parameter) // 2] = 0.0  # of its values the bias is left
    return made


def search(**options: Any) -> Plan:
    given: dict[str, Any] = {"objective": "attention-flops", "lowering": "eager", **options}
    given["method"] = "global"
    return calibrate(pipeline(), CALL, target=TARGET, held_out=HELD_OUT, **given)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(head_groups=2)


def images_of(plan: Plan) -> list[tuple[Tensor, Tensor]]:
    prompts = split_prompts(CALL, 0)
    with open_session(pipeline(), prompts[0], head_groups=plan.head_groups) as session:
        variants = Variants(session)
        return [
            (
                session.run(DenseStepper(session), prompt),
                session.run(PlanStepper(variants, plan.strategies), prompt),
            )
            for prompt in prompts
        ]


def columns(plan: Plan) -> dict[str, tuple[Strategy, ...]]:
    pairs = zip(plan.sites, zip(*plan.strategies, strict=True), strict=True)
    return {site.name: column for site, column in pairs}


def test_the_head_that_never_changes_is_computed_once(plan: Plan) -> None:
    found = columns(plan)
    for block in range(2):
        path = f"transformer_blocks.{block}.attn1"
        constant, other = found[f"{path}.heads_0_1"], found[f"{path}.heads_1_2"]
        assert constant == (Strategy.FULL, *[Strategy.SHARE_STEP] * 5)
        assert sum(strategy == Strategy.FULL for strategy in other) > 1


def test_the_target_is_met_when_run_again(plan: Plan) -> None:
    values = [metric_values(TARGET, d, p, CALL)[0] for d, p in images_of(plan)]
    assert plan.calibration.calibrated is not None
    assert min(values) == pytest.approx(plan.calibration.calibrated.worst, abs=1e-4)
    assert min(values) >= 0.99


def test_it_saves_more_than_whole_attentions_do(plan: Plan) -> None:
    saved = plan.calibration.predicted_speedup
    whole = search().calibration.predicted_speedup
    assert saved is not None
    assert whole is not None
    assert saved > whole * 1.05


def test_a_pipeline_runs_the_plan_that_it_found(plan: Plan) -> None:
    made = pipeline()
    accelerate(made, plan, lowering="eager")
    prompt = split_prompts(CALL, 0)[0]
    _, planned = images_of(plan)[0]
    assert float((as_images(generate(made, prompt)) - as_images(planned)).abs().max()) < 1e-4


def test_a_plan_is_retargeted_with_its_heads(plan: Plan) -> None:
    longer = {**CALL, "num_inference_steps": 9}
    adapted = retarget(pipeline(), plan, longer, target=Target.min_ssim(0.5))
    assert adapted.head_groups == plan.head_groups
    assert [site.name for site in adapted.sites] == [site.name for site in plan.sites]
    assert columns(adapted)["transformer_blocks.0.attn1.heads_0_1"][1:] == (SHARE,) * 8


@pytest.mark.parametrize("method", ["greedy", pytest.param("per-step", marks=pytest.mark.slow)])
def test_every_method_finds_strategies_of_heads(method: str) -> None:
    target = TARGET if method == "per-step" else Target.threshold(0.1)
    found = calibrate(
        pipeline(), CALL, target=target, method=method, head_groups=2, objective="attention-flops"
    )
    assert len(found.sites) == 4
    assert SHARE in columns(found)["transformer_blocks.1.attn1.heads_0_1"]


def test_no_number_of_groups_below_one() -> None:
    with pytest.raises(ConfigError, match=r"head_groups[\s\S]*got: +0"):
        search(head_groups=0)


def test_heads_that_cannot_be_split_are_refused() -> None:
    made = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    config: dict[str, Any] = TINY_DIGITS | {"num_attention_heads": 1}
    made.transformer = DiTTransformer2DModel(**config).eval()
    with pytest.raises(ConfigError, match=r"split by heads[\s\S]*one head"):
        calibrate(made, CALL, target=TARGET, head_groups=2)
