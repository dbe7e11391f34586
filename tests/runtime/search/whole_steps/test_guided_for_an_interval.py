"""Whole steps where guidance is on for some steps only: each phase reads its own outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Target, TargetMissedError
from ditfastattn.runtime.pipeline.guided_steps import layouts_at_steps
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps import calibrate as whole_steps
from ditfastattn.runtime.search.whole_steps.calibrate import Options, prepare
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.climb import Sample, climb
from ditfastattn.runtime.search.whole_steps.fit import fit
from ditfastattn.runtime.search.whole_steps.masks import search_masks
from ditfastattn.runtime.search.whole_steps.observed import UnobservableError
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State
from ditfastattn.runtime.search.whole_steps.search import WholeStepSearch
from tests.plans import by_example
from tests.runtime.test_phases import Pictures, phases_of
from tests.tiers import slow
from tests.works_with import works_with

STEPS = 6
CALL: dict[str, Any] = {"labels": [1], "num_inference_steps": STEPS}
PROMPT = Prompt({**CALL, "labels": [1, 3]}, 9)
PSNR, SPEED = Target.min_psnr(25.0), Target.min_speedup(1.5)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on three images: what is found differs, how it is found does not."""
    monkeypatch.setattr(whole_steps, "FITTED_ON", 3)


def search_of(pipeline: Any, call: dict[str, Any], target: Target = PSNR) -> WholeStepSearch:
    """Return a search of whole steps that takes the model as it is."""
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    options = Options(target, opaque=True)
    return prepare(pipeline, prompts, unseen, options).search(Checkpoint())


@works_with(
    "Guidance",
    "whole steps (`method='whole-steps'`) with guidance for an interval only",
    "works",
    "the first step of each phase runs; skipped steps are made of outputs of their own phase",
)
@pytest.mark.parametrize(
    ("order", "guided", "target", "opaque"),
    [
        ("cond-first", range(3), PSNR, True),
        ("uncond-first", range(2, 5), SPEED, True),
        slow(("separate-uncond-first", range(2, 5), PSNR, False)),
        slow(("uncond-first", range(3), SPEED, False)),
    ],
    ids=["cutoff", "interval-speed", "two-calls-captured", "cutoff-speed-captured"],
)
def test_a_search_finds_a_plan_with_phases(
    order: str, guided: range, target: Target, opaque: bool
) -> None:
    torch._dynamo.reset()
    pipeline: Any = Pictures(order, guided)
    prompts, unseen = split_prompts(CALL, 0), split_prompts(CALL, 500)
    options = Options(target, opaque=opaque)
    plan = whole_steps.calibrate_whole_steps(pipeline, prompts, unseen, options)
    assert plan.sampler.phases == phases_of(CfgLayout(order), guided, STEPS)
    assert plan.model.structure.startswith("module:") == opaque
    assert any(own.fitted for (own,) in plan.strategies)
    found = plan.calibration
    if target is PSNR:
        assert found.held_out is not None
        assert found.held_out.worst >= target.bound
    else:
        branches = [layout.branches for layout in plan.sampler.layouts]
        runs = [own.computes for (own,) in plan.strategies]
        ran = sum(count for count, own in zip(branches, runs, strict=True) if own)
        assert found.predicted_speedup == pytest.approx(sum(branches) / ran)
        assert sum(branches) / ran >= target.bound
    expected = by_example(pipeline, plan, PROMPT)
    assert float((generate(pipeline, PROMPT) - expected).abs().max()) > 1e-4
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    got = generate(pipeline, PROMPT)
    ditfastattn.restore(pipeline)
    assert float((got - expected).abs().max()) < 1e-5


def test_a_fit_sees_outputs_of_its_phase() -> None:
    whole = search_of(Pictures("cond-first", range(3, 7)), {**CALL, "num_inference_steps": 9})
    observed = whole.observed[0]
    assert observed.begins == {0, 3, 7}
    seen: list[int] = []

    def rule(rollouts: Sequence[Rollout], states: Sequence[State], step: int, known: int) -> Tensor:
        begin = max(first for first in observed.begins if first <= step)
        for state in states:
            assert min(state.ran) >= begin
            assert 1 <= known <= len(state.outputs)
            branches = {len(both) for both in state.outputs}
            assert branches == {observed.layouts[step].branches}
        seen.append(step)
        return fit(rollouts, states, step, known)

    found = list(search_masks(whole.rollouts, lambda _: None, rule=rule))
    assert set(seen) == {1, 2, 4, 5, 6, 8}
    assert next(number for number, paths in enumerate(found, 1) if paths) == len(observed.begins)
    assert all(observed.begins <= set(path.runs) for paths in found for path in paths)


def test_the_first_run_of_a_phase_stays() -> None:
    whole = search_of(Pictures("separate", range(3)), CALL)

    def worth(mask: FittedMask, _: Any) -> list[float]:
        return [float(-sum(min(abs(step - run) for run in mask.runs) for step in (1, 2, 5)))]

    assert climb(None, Sample(whole.rollouts[:1], worth), (0, 3, 4), lambda _: None) == (0, 3, 5)


def test_where_each_step_is_a_phase_all_of_them_run() -> None:
    alternating: Any = Pictures("cond-first", range(0, STEPS, 2))
    assert search_of(alternating, CALL).run().changed == 0
    with pytest.raises(TargetMissedError, match=r"1\.00x for 6 of 6 steps"):
        search_of(alternating, CALL, SPEED).run()


class Adaptive(Pictures):
    """Guide one step more in the second generation, and in later ones."""

    def _guides(self, step: int) -> bool:
        self.begun = getattr(self, "begun", 0) + (step == 0)
        return step < (3 if self.begun < 2 else 4)


def test_prompts_that_are_guided_at_other_steps_are_refused() -> None:
    pipeline: Any = Adaptive("cond-first", range(3))
    options = Options(PSNR, cfg_layout=CfgLayout.COND_FIRST, opaque=True)
    prompts = split_prompts({**CALL, "labels": [1, 2]}, 0)
    whole = prepare(pipeline, prompts, prompts, options).search(Checkpoint())
    with pytest.raises(UnobservableError, match=r"steps 0-3[\s\S]*alike[\s\S]*steps 0-2"):
        _ = whole.observed


class Further(Pictures):
    """Call the model once more at a step, as skip-layer guidance does."""

    def _after_calls(self, step: int, latents: Tensor, timestep: Tensor, classes: Tensor) -> None:
        if step == 2:
            self._predict(latents, timestep, classes)


def test_calls_that_change_otherwise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 row\(s\) and 1 row\(s\) at step 2"):
        search_of(Further("cond-first", range(STEPS)), CALL)
    for rows in ([(2,), (2,)], [(), (2,)], [(1,), (3,)], [(1,), (2,), (1, 1)], [(1,), (1, 1, 1)]):
        found = layouts_at_steps(rows, [[] for _ in rows], CfgLayout.COND_FIRST, "timestep")
        assert found == ()


def test_the_default_for_a_speed_is_whole_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline: Any = Pictures("separate", range(3))
    out = tmp_path / "plan.json"
    plan = ditfastattn.calibrate(pipeline, CALL, target=SPEED, out=out)
    assert "counted, not measured" in caplog.text
    assert plan.calibration.method == "whole-steps"
    assert plan.calibration.tried[-1].what == "sites"
    assert plan.sampler.phases == phases_of(CfgLayout.SEPARATE, range(3), STEPS)
    assert ditfastattn.Plan.load(out) == plan


@works_with(
    "Guidance",
    "`retarget` of whole steps with guidance for an interval only",
    "works",
    "the phases may be others than the plan's; a plan of sites alone is refused",
)
def test_a_plan_is_fitted_again_for_other_phases() -> None:
    pipeline: Any = Pictures("uncond-first", range(3))
    plan = search_of(pipeline, CALL).run()
    other: Any = Pictures("uncond-first", range(1, 5))
    call = {**CALL, "num_inference_steps": 8}
    adapted = ditfastattn.retarget(other, plan, call, target=Target.min_psnr(10.0))
    assert adapted.sampler.phases == phases_of(CfgLayout.UNCOND_FIRST, range(1, 5), 8)
    runs = {step for step, (own,) in enumerate(adapted.strategies) if own.computes}
    assert {0, 1, 5} <= runs < set(range(8))
    prompt = Prompt(call, 9)
    expected = by_example(other, adapted, prompt)
    ditfastattn.accelerate(other, adapted)
    got = generate(other, prompt)
    ditfastattn.restore(other)
    assert float((got - expected).abs().max()) < 1e-5
