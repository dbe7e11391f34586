"""Fit the coefficients of a skipped step: on-policy least squares with drift compensation.

The output at a skipped step is a weighted sum of the latent and of earlier outputs. It is fitted
on the trajectories that the plan itself produces, and its target is not the dense output but the
one that would put the next latent back on the dense trajectory. With ``f`` for what the sampler
makes of an output, and ``y0`` for the linear rule's::

    minimize  | f(y0) + f'(y0) (A w - y0) - x_dense |^2 + ridge * | w - w0 |^2

``f`` works element by element, so its slope is one difference; where it clips, the slope is 0 and
the element does not count. Where guidance brings its sum to another norm, the factor of each token
is taken as fixed. As other coefficients clip other elements and change norms, this is repeated
with what was found in place of ``y0`` (Gauss and Newton's method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditfastattn.passes.plan.curves import output_weights
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State

RIDGE = 1e-3  # of the mean square of a term
_ITERATIONS = 4  # one is exact where the sampler is linear
_SETTLED = 1e-4  # a change of coefficients that changes nothing
_SMALL = 0.05  # a change of the output that shows the slope, of its root mean square


def terms(rollout: Rollout, state: State, step: int, outputs: int) -> Tensor:
    """Return what a fitted output is the sum of, ``[elements, 1 + outputs * branches]``."""
    held = [half.float() for both in state.outputs[:outputs] for half in both]
    return torch.stack([t.flatten() for t in (rollout.latent_input(state, step), *held)], 1)


def combined(
    rollout: Rollout, step: int, matrix: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Return the weighted mean of the fitted branches, and what guidance multiplies it by.

    Both are flat; ``matrix`` holds the terms. In a batch both branches return the mean, which
    guidance leaves as it is. In two calls each has its own outputs alone.
    """
    observed = rollout.observed
    guidance, mean = observed.steps[step].guidance, matrix @ coefficients
    if guidance.norm_of is None or observed.layouts[step].batched:
        return mean, 1.0
    outputs = []
    for branch, share in enumerate(guidance.shares):
        own = matrix[:, 1 + branch :: 2] @ coefficients[1 + branch :: 2] / share
        outputs.append((matrix[:, 0] * coefficients[0] + own).reshape(observed.latents[step].shape))
    factor = torch.as_tensor(guidance.rescaling(outputs)).to(mean.dtype)
    return mean, factor.expand(outputs[0].shape).flatten()


def linear_rule(rollout: Rollout, state: State, step: int, outputs: int) -> Tensor:
    """Return the coefficients of the line through the last two outputs, or of the last output."""
    share = rollout.observed.steps[step].guidance.shares
    known = min(2, outputs)
    gaps = [state.ran[index] - state.ran[index + 1] for index in range(known - 1)]
    lines = output_weights(step - state.ran[0], gaps)
    padded = (*lines, *(0.0,) * (outputs - known))
    return torch.tensor(
        [0.0, *(line * own for line in padded for own in share)], dtype=torch.double
    )


def fit(
    rollouts: Sequence[Rollout],
    states: Sequence[State],
    step: int,
    outputs: int,
    ridge: float = RIDGE,
) -> Tensor:
    """Return the coefficients of ``step``, fp32, given each generation's state before it.

    Args:
        rollouts: one per calibration image.
        states: of each, before ``step``.
        step: the step that does not run.
        outputs: how many earlier outputs it reads.
        ridge: how strongly to keep to the linear rule.

    """
    prior = linear_rule(rollouts[0], states[0], step, outputs)
    images = [
        _Image(rollout, state, step, terms(rollout, state, step, outputs).double())
        for rollout, state in zip(rollouts, states, strict=True)
    ]
    found = prior
    for _ in range(_ITERATIONS):
        before, found = found, _improved(images, found, prior, ridge)
        if float((found - before).abs().max()) < _SETTLED:
            break
    return found.float()


@dataclass(frozen=True)
class _Image:
    """One calibration image at the step that is fitted: ``matrix`` holds its terms."""

    rollout: Rollout
    state: State
    step: int
    matrix: Tensor

    def around(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Return how the next latent changes with ``coefficients``, and what it lacks."""
        mean, factor = combined(self.rollout, self.step, self.matrix, coefficients)
        rule = (mean * factor).reshape(self.state.latent.shape)
        after = self._after(rule)
        change = _SMALL * float(rule.square().mean().sqrt())
        slope = ((self._after(rule + change) - after) / change).flatten()[:, None]
        dense = self.rollout.observed.latents[self.step + 1].double()
        scaled = self.matrix * torch.as_tensor(factor).reshape(-1, 1)
        return slope * scaled, (dense - after).flatten()

    def _after(self, output: Tensor) -> Tensor:
        return self.rollout.peek(self.state, self.step, output.float()).double()


def _improved(images: Sequence[_Image], start: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Return the coefficients that are best where the sampler is linear around ``start``."""
    square = torch.zeros(len(prior), len(prior), dtype=torch.double)
    right = torch.zeros(len(prior), dtype=torch.double)
    for image in images:
        rows, missed = image.around(start)
        square += rows.T @ rows
        right += rows.T @ missed
    kept = ridge * square.diagonal().mean() * torch.eye(len(prior), dtype=torch.double)
    change: Tensor = torch.linalg.solve(square + kept, right + kept @ (prior - start))
    return start + change
