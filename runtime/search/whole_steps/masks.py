"""Search which steps run: forward dynamic programming over (runs so far, step).

A state is the best way to come to a step with so many runs, as the latents of a few calibration
images, and runs the model once. The ways of one run more are made of it, so that a search stops
at the number that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import combined, fit, terms
from ditfastattn.runtime.search.whole_steps.rollout import HISTORY, Rollout, State

OUTPUTS = HISTORY - 1  # that a skipped step reads at most
SHORTEST_LIMIT = 7  # steps in a row that may always be skipped
ENDINGS = 3  # plans of each number of runs that are looked at as images

Rule = Callable[[Sequence[Rollout], Sequence[State], int, int], Tensor]  # as ``fit``

# After each of a mask's runs, by the runs so far: the states, and the coefficients of each step.
Begun = dict[tuple[int, ...], tuple[tuple[State, ...], tuple[Tensor | None, ...]]]


@dataclass(frozen=True)
class Path:
    """Hold a way to come to a step: what has run, and what was made of it elsewhere.

    Attributes:
        drift: mean squared distance of the latents from the dense ones.
        states: of each generation.
        runs: the steps that ran, in order.
        coefficients: of each step so far; None where the model ran.
    """

    drift: float
    states: tuple[State, ...]
    runs: tuple[int, ...]
    coefficients: tuple[Tensor | None, ...]


def longest_gap(steps: int) -> int:
    """Return how many steps in a row may be skipped."""
    return max(SHORTEST_LIMIT, steps // 4)


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
        matrix = terms(rollout, state, step, outputs)
        mean, rescaling = combined(rollout, step, matrix, coefficients)
        made = (mean * rescaling).reshape(state.latent.shape)
        found.append(rollout.advance(state, step, made))
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
    spend: Callable[[float], None],
    rule: Rule = fit,
) -> Generator[list[Path]]:
    """Yield the best ways to the end in which one step runs, then two, and so on; best first.

    Those of one number differ in the last step that runs; there may be none. A way is left where
    one of fewer runs is as near to the dense generation. ``spend`` is told of every forward pass
    of one image; ``rule`` gives the coefficients of a skipped step.
    """
    steps = len(rollouts[0].observed.steps)
    nearest = [math.inf] * steps  # that fewer runs come to the dense latents, by the step
    ways = {0: Path(0.0, tuple(rollout.begin for rollout in rollouts), (), ())}  # to each step
    while ways:
        longer: dict[int, Path] = {}
        ends: list[Path] = []
        for step, path in sorted(ways.items()):
            if path.drift >= nearest[step]:
                continue
            nearest[step] = path.drift
            spend(len(rollouts))
            for following in _continued(rollouts, path, step, rule):
                reached = len(following.coefficients)
                if reached == steps:
                    ends.append(following)
                elif reached not in longer or following.drift < longer[reached].drift:
                    longer[reached] = following
        yield sorted(ends, key=lambda path: path.drift)[:ENDINGS]
        ways = longer


def _continued(rollouts: Sequence[Rollout], path: Path, step: int, rule: Rule) -> Generator[Path]:
    """Run ``step``, and yield where that leads: to the next step, and past skipped ones.

    The first step of a phase is not skipped.
    """
    steps, runs = len(rollouts[0].observed.steps), (*path.runs, step)
    states, made = run_step(rollouts, path.states, step), (*path.coefficients, None)
    known = min(OUTPUTS, len(states[0].ran))
    last = rollouts[0].observed.begins | {steps}
    while True:
        reached = len(made)
        yield Path(drift(rollouts, states, reached), states, runs, made)
        if reached in last or reached - step > longest_gap(steps):
            return
        found = rule(rollouts, states, reached, known)
        states, made = skip_step(rollouts, states, reached, found), (*made, found)


def fit_mask(
    rollouts: Sequence[Rollout],
    runs: Sequence[int],
    spend: Callable[[float], None],
    rule: Rule = fit,
    begun: Begun | None = None,
) -> tuple[FittedMask, tuple[State, ...]]:
    """Return the coefficients of the steps that are not in ``runs``, and the last states.

    The first step of each phase is one of ``runs``.

    ``begun`` holds the mask that was fitted before it, to the same generations by the same rule:
    where that begins with the same runs, it is continued. It is replaced by this one.
    """
    known = {} if begun is None else begun
    own: Begun = {}
    states = tuple(rollout.begin for rollout in rollouts)
    found: tuple[Tensor | None, ...] = ()
    for step in range(len(rollouts[0].observed.steps)):
        ran = tuple(run for run in runs if run < step)
        if step not in runs:
            coefficients = rule(rollouts, states, step, min(OUTPUTS, len(states[0].ran)))
            found = (*found, coefficients)
            states = skip_step(rollouts, states, step, coefficients)
            continue
        if (*ran, step) in known:
            states, found = known[*ran, step]
        else:
            states, found = run_step(rollouts, states, step), (*found, None)
            spend(len(rollouts))
        own[*ran, step] = states, found
    if begun is not None:
        begun.clear()
        begun.update(own)
    return FittedMask(tuple(runs), found, OUTPUTS), states
