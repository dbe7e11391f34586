"""Coefficients are fitted to what would bring the next latent back to the dense trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.search.whole_steps.candidates import branch_rows
from ditfastattn.runtime.search.whole_steps.fit import fit, linear_rule
from ditfastattn.runtime.search.whole_steps.observe import (
    ModelCall,
    Observed,
    SamplerStep,
    Step,
)
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
        Step((call,), SamplerStep(latent, 0, latent, {}, None, after), 0.5, GUIDANCE)
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
    rows = branch_rows(guided, layout, GUIDANCE)
    made = []
    for branch, row in enumerate(rows):
        own = [both if layout.batched else (both[branch],) for both in at.outputs]
        parts = [0.5 * at.latent, *(half for both in own for half in both)]
        made.append(sum(a * part for a, part in zip(row, parts, strict=True)))
    combined = sum(weight * part for weight, part in zip(GUIDANCE, made, strict=True))
    assert float((combined - predicted(guided, at)).abs().max()) < 1e-5
