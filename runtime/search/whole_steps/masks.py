"""Search which steps run: forward dynamic programming over (step, runs so far).

A state is the best way to come to a step with so many runs, as the latents of a few calibration
images; all plans of all budgets come from one pass, as every state runs the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import fit, terms
from ditfastattn.runtime.search.whole_steps.rollout import HISTORY, Rollout, State

LONGEST_GAP = 7  # steps in a row that do not run


@dataclass(frozen=True)
class _Path:
    drift: float
    states: tuple[State, ...]
    runs: tuple[int, ...]


def run_step(rollouts: Sequence[Rollout], states: Sequence[State], step: int) -> tuple[State, ...]:
    """Run the model at ``step`` in each generation."""
    found = []
    for rollout, state in zip(rollouts, states, strict=True):
        ran = rollout.run(state, step)
        found.append(rollout.advance(ran, step, rollout.guided(ran.outputs[0], step)))
    return tuple(found)


def skip_step(
    rollouts: Sequence[Rollout], states: Sequence[State], step: int, coefficients: Tensor
) -> tuple[State, ...]:
    """Make the output at ``step`` of earlier ones in each generation."""
    found = []
    for rollout, state in zip(rollouts, states, strict=True):
        outputs = (len(coefficients) - 1) // len(state.outputs[0])
        made = terms(rollout, state, step, outputs) @ coefficients
        found.append(rollout.advance(state, step, made.reshape(state.latent.shape)))
    return tuple(found)


def drift(rollouts: Sequence[Rollout], states: Sequence[State], step: int) -> float:
    """Return the mean squared distance of the latents before ``step`` from the dense ones."""
    pairs = zip(rollouts, states, strict=True)
    errors = [
        (state.latent.float() - rollout.observed.latents[step].float()).square().mean()
        for rollout, state in pairs
    ]
    return float(torch.stack(errors).mean())


def search_masks(
    rollouts: Sequence[Rollout],
    most_runs: int,
    spend: Callable[[float], None],
    outputs: int = HISTORY - 1,
) -> dict[int, tuple[int, ...]]:
    """Return the steps that run, by their number, up to ``most_runs``.

    ``spend`` is told of every forward pass of one image.
    """
    steps = len(rollouts[0].observed.steps)
    best: dict[tuple[int, int], _Path] = {
        (0, 0): _Path(0.0, tuple(rollout.begin for rollout in rollouts), ())
    }
    for step in range(steps):
        for runs in range(most_runs):
            path = best.pop((step, runs), None)
            if path is None:
                continue
            states = run_step(rollouts, path.states, step)
            spend(len(rollouts))
            following = step + 1
            while True:
                key = (following, runs + 1)
                error = drift(rollouts, states, following)
                if key not in best or error < best[key].drift:
                    best[key] = _Path(error, states, (*path.runs, step))
                if following == steps or following - step > LONGEST_GAP:
                    break
                known = min(outputs, runs + 1)
                found = fit(rollouts, states, following, known)
                states = skip_step(rollouts, states, following, found)
                following += 1
    ended = (number for number in range(1, most_runs + 1) if (steps, number) in best)
    return {number: best[steps, number].runs for number in ended}


def fit_mask(
    rollouts: Sequence[Rollout],
    runs: Sequence[int],
    spend: Callable[[float], None],
    outputs: int = HISTORY - 1,
) -> tuple[FittedMask, tuple[State, ...]]:
    """Return the coefficients of the steps that are not in ``runs``, and the last states."""
    states = tuple(rollout.begin for rollout in rollouts)
    found: list[Tensor | None] = []
    for step in range(len(rollouts[0].observed.steps)):
        if step in runs:
            states = run_step(rollouts, states, step)
            spend(len(rollouts))
            found.append(None)
            continue
        known = min(outputs, sum(run < step for run in runs))
        coefficients = fit(rollouts, states, step, known)
        found.append(coefficients)
        states = skip_step(rollouts, states, step, coefficients)
    return FittedMask(tuple(runs), tuple(found), outputs), states
