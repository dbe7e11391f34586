"""What other methods make of earlier outputs, as plans of whole steps and of blocks.

Every method that reuses or predicts the model's whole output by a linear rule is a plan of whole
steps: a set of steps that run, and coefficients. One that skips blocks at fixed steps is a plan of
a range of blocks. So its quality and its speed are measured with nothing of our search, and with
all of our compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.whole_steps.fit import linear_rule
from ditfastattn.runtime.search.whole_steps.masks import Rule, search_masks
from ditfastattn.runtime.search.whole_steps.observe import branches
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State
from ditfastattn.runtime.search.whole_steps.searched_masks import SEARCHED_ON
from ditfastattn.tools.bench.plans import Named, Plans, search_of
from ditfastattn.tools.bench.setup import Setup
from ditfastattn.tools.block_plan import block_plan

_DEGREE = 2
_RIDGE = 1e-6


def reuse(rollouts: Sequence[Rollout], states: Sequence[State], step: int, outputs: int) -> Tensor:
    """Return the coefficients of the last output."""
    last = linear_rule(rollouts[0], states[0], step, 1)
    padding = (outputs - 1) * (len(last) - 1)
    return torch.cat([last, last.new_zeros(padding)]).float()


def chebyshev(
    rollouts: Sequence[Rollout], states: Sequence[State], step: int, outputs: int
) -> Tensor:
    """Return those of the parabola, in Chebyshev's basis, nearest to the last outputs."""
    ran = np.array(states[0].ran[:outputs], dtype=float)
    oldest, reach = ran.min(), max(step - ran.min(), 1.0)
    degree = min(_DEGREE, outputs - 1)
    known = chebvander(2.0 * (ran - oldest) / reach - 1.0, degree)
    wanted = chebvander(np.array([2.0 * (step - oldest) / reach - 1.0]), degree)
    weights = (wanted @ np.linalg.pinv(known))[0]
    share = rollouts[0].observed.steps[step].guidance.shares
    found = [0.0, *(weight * own for weight in weights for own in share)]
    return torch.tensor(found, dtype=torch.float32)


def learned(
    rollouts: Sequence[Rollout], states: Sequence[State], step: int, outputs: int
) -> Tensor:
    """Return those that best predict the dense output from earlier dense outputs."""
    width = 1 + outputs * len(states[0].outputs[0])
    square, right = torch.zeros(width - 1, width - 1).double(), torch.zeros(width - 1).double()
    for rollout, state in zip(rollouts, states, strict=True):
        held = [half for ran in state.ran[:outputs] for half in _dense(rollout, ran)]
        matrix = torch.stack([half.double().flatten() for half in held], 1)
        wanted = rollout.guided(_dense(rollout, step), step).double().flatten()
        square += matrix.T @ matrix
        right += matrix.T @ wanted
    square += _RIDGE * square.diagonal().mean() * torch.eye(width - 1)
    return torch.cat([torch.zeros(1).double(), torch.linalg.solve(square, right)]).float()


def _dense(rollout: Rollout, step: int) -> list[Tensor]:
    """Return the dense generation's outputs at ``step``, by guidance branch."""
    here, layout = rollout.observed.steps[step], rollout.observed.layouts[step]
    return branches([call.output for call in here.calls], layout, here.sampler.latent)


def evenly(runs: int, steps: int) -> list[int]:
    """Return ``runs`` steps, the first and the last among them, evenly spread."""
    return sorted({round(place * (steps - 1) / max(runs - 1, 1)) for place in range(runs)})


def _spread(rule: Rule) -> Callable[[Setup], Named]:
    def find(setup: Setup) -> Named:
        options = setup.options
        masks = {n: evenly(n, options.steps) for n in options.counts(options.rules)}
        search = search_of(setup, Target.min_psnr(30.0))
        return {f"{n} runs": search.fitted(runs, rule) for n, runs in masks.items()}

    return find


def _searched(rule: Rule) -> Callable[[Setup], Named]:
    def find(setup: Setup) -> Named:
        counts = setup.options.counts(setup.options.rules)
        search = search_of(setup, Target.min_psnr(30.0))
        some, most = search.rollouts[:SEARCHED_ON], max(counts)
        ways = islice(search_masks(some, lambda _: None, rule=rule), most)
        masks = {n: paths[0].runs for n, paths in enumerate(ways, 1) if paths and n in counts}
        return {f"{n} runs": search.fitted(runs, rule) for n, runs in masks.items()}

    return find


def _blocks(strategy: Strategy) -> Callable[[Setup], Named]:
    """Return what lets all blocks but the first do ``strategy`` between evenly spread runs."""

    def column(runs: Sequence[int], steps: int) -> list[Strategy]:
        found: list[Strategy] = []
        for step in range(steps):
            known = len([run for run in runs if run < step])
            idle = strategy if known >= strategy.outputs_read else Strategy.SHARE_STEP
            found.append(Strategy.FULL if step in runs else idle)
        return found

    def find(setup: Setup) -> Named:
        steps = setup.options.steps
        call = setup.model.calibration_prompts(steps)[0].call
        columns = {
            f"{n} runs": column(evenly(n, steps), steps)
            for n in setup.options.counts(setup.options.rules)
        }
        return {
            name: block_plan(setup.pipeline, call, {(1, -1): own}) for name, own in columns.items()
        }

    return find


OTHERS = (
    Plans("searched-reuse", _searched(reuse)),  # which steps run is searched, as in BudCache
    Plans("even-chebyshev", _spread(chebyshev)),
    Plans("even-learned", _spread(learned)),  # a linear predictor of the dense outputs, as L2P's
    Plans("even-blocks", _blocks(Strategy.SHARE_STEP)),  # First Block Cache, at fixed steps
    Plans("even-blocks-line", _blocks(Strategy.EXTRAPOLATE)),  # the same with TaylorSeer
)
