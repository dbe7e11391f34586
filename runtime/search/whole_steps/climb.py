"""Move single runs of a mask to steps where they are worth more: hill climbing.

Forward dynamic programming keeps one way to come to a step: the one whose latents are nearest to
the dense ones there. From which way later outputs are predicted best does not show yet, so that
early runs tend to lie too far apart. Here each run but the first of a phase is moved, step by step,
while that makes images better; the early ones come first, and generations go on to their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import fit
from ditfastattn.runtime.search.whole_steps.masks import Begun, Rule, fit_mask
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State

Worth = Callable[[FittedMask, Sequence[State]], float]  # of the last states; more is better


@dataclass(frozen=True)
class Sample:
    """Some generations, and what a mask is worth to them."""

    rollouts: Sequence[Rollout]
    worth: Worth


@dataclass(frozen=True)
class _Fitted:
    """What a mask is worth to a sample; ``begun`` lets others begin as it does."""

    worth: float
    begun: Begun


def climb(
    samples: Sequence[Sample],
    runs: Sequence[int],
    spend: Callable[[float], None],
    rule: Rule = fit,
) -> tuple[int, ...]:
    """Return ``runs`` with some of them moved; a move is worth more to each of ``samples``.

    Args:
        samples: few generations first: what these do not gain by, others are not run for.
        runs: the steps that run, in order.
        spend: is told of every forward pass of one image.
        rule: gives the coefficients of the steps that do not run.

    """

    def fitted(sample: Sample, moved: Sequence[int], begun: Begun) -> _Fitted:
        own = dict(begun)
        mask, states = fit_mask(sample.rollouts, moved, spend, rule=rule, begun=own)
        return _Fitted(sample.worth(mask, states), own)

    def better(moved: Sequence[int]) -> list[_Fitted] | None:
        found = []
        for sample, best in zip(samples, known, strict=True):
            found.append(fitted(sample, moved, best.begun))
            if found[-1].worth <= best.worth:
                return None
        return found

    best, steps = tuple(runs), len(samples[0].rollouts[0].observed.steps)
    known = [fitted(sample, best, {}) for sample in samples]
    begins = samples[0].rollouts[0].observed.begins
    for place in range(len(best)):
        if best[place] in begins:
            continue
        for by in (-1, 1):
            start = best
            while (moved := _moved(best, place, by, steps)) is not None:
                found = better(moved)
                if found is None:
                    break
                best, known = moved, found
            if best != start:
                break
    return best


def _moved(runs: tuple[int, ...], place: int, by: int, steps: int) -> tuple[int, ...] | None:
    """Return ``runs`` with the one at ``place`` moved; None where another run is, or no step."""
    step = runs[place] + by
    if step in runs or step == steps:
        return None
    return (*runs[:place], step, *runs[place + 1 :])
