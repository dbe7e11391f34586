"""Coefficients are fitted to what would bring the next latent back to the dense trajectory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.search.whole_steps.candidates import branch_rows
from ditfastattn.runtime.search.whole_steps.fit import fit, linear_rule
from ditfastattn.runtime.search.whole_steps.guided import Guidance, find_guidance
from ditfastattn.runtime.search.whole_steps.masks import skip_step
from ditfastattn.runtime.search.whole_steps.observed import ModelCall, Observed, SamplerStep, Step
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State
from tests.helpers import noise

SHAPE = (1, 2, 8, 8)
GUIDANCE = (2.0, -1.0)


class Stepping:
    """A sampler of one addition per step; it clips where asked to."""

    def __init__(self, clip: float = 1e9) -> None:
        self.clip = clip

    def step(self, output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        return ((sample - 0.25 * output).clamp(-self.clip, self.clip),)


def rollout(seed: int, following: Tensor, clip: float = 1e9) -> Rollout:
    """Return a generation whose dense latent after step 3 is ``following``."""
    latent = noise(seed, *SHAPE)
    returned = [latent, latent, latent, following]
    call = ModelCall({}, torch.cat([latent, latent]), None)
    steps = tuple(
        Step((call,), SamplerStep(latent, 0, latent, {}, None, after), 0.5, Guidance(GUIDANCE))
        for after in returned
    )
    return Rollout(
        nn.Identity(), Observed(latent, Stepping(clip), "x", CfgLayout.COND_FIRST, steps)
    )


def state(seed: int, clip: float = 1e9) -> State:
    """Return a state before step 3: steps 0 and 2 have run."""
    outputs = tuple(
        (noise(seed + 10 * k, *SHAPE), noise(seed + 10 * k + 5, *SHAPE)) for k in (1, 2)
    )
    return State(noise(seed, *SHAPE), Stepping(clip), outputs, (2, 0))


def predicted(coefficients: Tensor, at: State) -> Tensor:
    parts = [0.5 * at.latent, *(half for both in at.outputs for half in both)]
    return torch.stack([a * part for a, part in zip(coefficients, parts, strict=True)]).sum(0)


@pytest.mark.parametrize("clip", [1e9, 1.0], ids=["linear", "clipping"])
def test_a_linear_recurrence_is_recovered(clip: float) -> None:
    true = torch.tensor([0.3, 1.2, -0.4, 0.5, -0.1])
    states = [state(seed, clip) for seed in range(3)]
    rollouts = [
        rollout(seed, Stepping(clip).step(predicted(true, at), 0, at.latent)[0], clip)
        for seed, at in enumerate(states)
    ]
    found = fit(rollouts, states, 3, 2, ridge=1e-9)
    assert float((found - true).abs().max()) < 1e-3


def test_drift_is_compensated() -> None:
    """The latent may have left the dense trajectory: the output brings it back."""
    at = state(0)
    wanted = at.latent + noise(99, *SHAPE)
    (found,) = (fit([rollout(0, wanted)], [at], 3, 2, ridge=1e-9),)
    made = at.latent - 0.25 * predicted(found, at)
    unfitted = at.latent - 0.25 * predicted(linear_rule(rollout(0, wanted), at, 3, 2), at)
    assert float((made - wanted).square().mean()) < float((unfitted - wanted).square().mean())


def test_a_strong_ridge_keeps_to_the_line() -> None:
    at = state(0)
    found = fit([rollout(0, noise(1, *SHAPE))], [at], 3, 2, ridge=1e12)
    line = [0.0, 1.5 * 2.0, 1.5 * -1.0, -0.5 * 2.0, -0.5 * -1.0]  # from steps 0 and 2 to 3
    assert float((found - torch.tensor(line)).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.SEPARATE])
def test_guidance_makes_the_guided_output_of_both_branches(layout: CfgLayout) -> None:
    guided = torch.tensor([0.3, 1.2, -0.4, 0.5, -0.1])
    at = state(0)
    rows = branch_rows(guided, layout, Guidance(GUIDANCE).shares)
    made = []
    for branch, row in enumerate(rows):
        own = [both if layout.batched else (both[branch],) for both in at.outputs]
        parts = [0.5 * at.latent, *(half for both in own for half in both)]
        made.append(sum(a * part for a, part in zip(row, parts, strict=True)))
    combined = sum(weight * part for weight, part in zip(GUIDANCE, made, strict=True))
    assert float((combined - predicted(guided, at)).abs().max()) < 1e-5


def brought_to_norm(conditional: Tensor, other: Tensor) -> Tensor:
    """Return what Qwen-Image's guidance of scale 3 gives the scheduler."""
    combined = other + 3.0 * (conditional - other)
    norms = [
        torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (conditional, combined)
    ]
    brought: Tensor = combined * (norms[0] / norms[1])
    return brought


@pytest.mark.parametrize("layout", [CfgLayout.SEPARATE, CfgLayout.UNCOND_FIRST])
def test_guidance_is_read_from_what_the_scheduler_is_given(layout: CfgLayout) -> None:
    first, second = noise(1, *SHAPE), noise(2, *SHAPE)
    linear = find_guidance([first, second], 2.0 * first - second, layout)
    assert linear is not None
    assert linear.weights == pytest.approx((2.0, -1.0), abs=1e-5)
    assert linear.norm_of is None
    branches = [first, second] if layout is CfgLayout.SEPARATE else [second, first]
    wanted = brought_to_norm(first, second)
    found = find_guidance(branches, wanted, layout)
    assert found is not None
    assert branches[found.norm_of or 0] is first
    assert float((found(branches) - wanted).abs().max()) < 1e-5
    assert find_guidance(branches, wanted**2, layout) is None


def test_a_skipped_step_keeps_the_norm_that_guidance_keeps() -> None:
    """The next latent is as near to the dense one as the coefficients that made it bring it."""
    true = [0.2, 1.1, 0.9, -0.3, 0.1]
    guidance, at = Guidance((3.0, -2.0), norm_of=0), state(0)

    def after(coefficients: list[float]) -> Tensor:
        rows = branch_rows(torch.tensor(coefficients), CfgLayout.SEPARATE, guidance.shares)
        made = []
        for branch, row in enumerate(rows):
            parts = [0.5 * at.latent, *(both[branch] for both in at.outputs)]
            made.append(torch.stack([a * part for a, part in zip(row, parts, strict=True)]).sum(0))
        return at.latent - 0.25 * brought_to_norm(*made)

    given = rollout(0, after(true))
    steps = tuple(replace(step, guidance=guidance) for step in given.observed.steps)
    given.observed = replace(given.observed, steps=steps, layout=CfgLayout.SEPARATE)
    found = fit([given], [at], 3, 2, ridge=0.0)
    made = skip_step([given], [at], 3, found)[0].latent
    assert float((made - after(found.tolist())).abs().max()) < 1e-5
    assert float((made - after(true)).abs().max()) < 1e-2
