"""Move single runs of a mask to steps where they are worth more: hill climbing.

Forward dynamic programming keeps one way to come to a step: the one whose latents are nearest to
the dense ones there. From which way later outputs are predicted best does not show yet, so that
early runs tend to lie too far apart, and late ones too close. Here the late run that is worth least
goes to the gap where it is worth most; then each run but the first of a phase is moved, step by
step, while that makes images better. The early ones come first, and generations go on to their end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import fit
from ditfastattn.runtime.search.whole_steps.masks import Begun, Rule, fit_mask
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State

Worth = Callable[[FittedMask, Sequence[State]], list[float]]  # of each image; more is better


@dataclass(frozen=True)
class Sample:
    """Some generations, and what a mask is worth to each of them, given their last states."""

    rollouts: Sequence[Rollout]
    worth: Worth


@dataclass(frozen=True)
class _Fitted:
    """What a mask is worth to the images of a sample; ``begun`` lets others begin as it does."""

    worth: list[float]
    begun: Begun


def climb(
    few: Sample | None,
    every: Sample,
    runs: Sequence[int],
    spend: Callable[[float], None],
    rule: Rule = fit,
) -> tuple[int, ...]:
    """Return ``runs`` with some of them moved, each to where it is worth more to ``every`` image.

    More in the mean and in the worst image, taken together. A move that is worth less to a ``few``
    images, by more than chance (the standard error of their mean), is not tried on all.

    Args:
        few: images that cost little; None tries all at once.
        every: all images.
        runs: the steps that run, in order.
        spend: is told of every forward pass of one image.
        rule: gives the coefficients of the steps that do not run.

    """
    climber = _Climber([every] if few is None else [few, every], tuple(runs), spend, rule)
    climber.relocate()
    climber.move()
    return climber.best


class _Climber:
    """The best mask so far, and what it is worth to each sample; the last one decides."""

    def __init__(
        self,
        samples: Sequence[Sample],
        runs: tuple[int, ...],
        spend: Callable[[float], None],
        rule: Rule,
    ) -> None:
        self._samples, self._spend, self._rule = samples, spend, rule
        self._observed = samples[-1].rollouts[0].observed
        self._steps = len(self._observed.steps)
        self.best = runs
        self._known = [self._fitted(sample, runs, {}) for sample in samples]

    def relocate(self) -> None:
        """Take the run of the second half that is worth least to the gap where it is worth most.

        The mask does not become slower, where some steps take longer than others.
        """
        few, known, begins = self._samples[0], self._known[0], self._observed.begins
        late = [run for run in self.best[len(self.best) // 2 :] if run not in begins]
        fewer = [tuple(run for run in self.best if run != gone) for gone in late]
        left = {runs: self._fitted(few, runs, known.begun) for runs in fewer}
        if not left:
            return
        least = _most_worth(left)
        middles = [(a + b) // 2 for a, b in pairwise((*least, self._steps)) if b - a > 1]
        others = {tuple(sorted((*least, step))) for step in middles} - {self.best}
        speed = self._observed.speedup
        found = {
            runs: self._fitted(few, runs, left[least].begun)
            for runs in sorted(others)
            if speed(runs) >= speed(self.best)
        }
        if found:
            self._take(_most_worth(found))

    def move(self) -> None:
        """Move one run after the other, each as long as that is worth more."""
        for place in range(len(self.best)):
            if self.best[place] in self._observed.begins:
                continue
            for by in (-1, 1):
                start = self.best
                while (moved := _moved(self.best, place, by, self._steps)) is not None:
                    if not self._take(moved):
                        break
                if self.best != start:
                    break

    def _take(self, runs: tuple[int, ...]) -> bool:
        """Take ``runs`` if they are worth more; return whether they are."""
        found = []
        for sample, before in zip(self._samples, self._known, strict=True):
            now = self._fitted(sample, runs, before.begun)
            decides = sample is self._samples[-1]
            if decides and _total(now.worth) <= _total(before.worth):
                return False
            if not decides and _hopeless(before.worth, now.worth):
                return False
            found.append(now)
        self.best, self._known = runs, found
        return True

    def _fitted(self, sample: Sample, runs: Sequence[int], begun: Begun) -> _Fitted:
        own = dict(begun)
        rollouts, rule = sample.rollouts, self._rule
        mask, states = fit_mask(rollouts, runs, self._spend, rule=rule, begun=own)
        return _Fitted(sample.worth(mask, states), own)


def _most_worth(fitted: Mapping[tuple[int, ...], _Fitted]) -> tuple[int, ...]:
    return max(fitted, key=lambda runs: _total(fitted[runs].worth))


def _total(worth: Sequence[float]) -> float:
    return min(worth) + statistics.fmean(worth)


def _hopeless(before: Sequence[float], after: Sequence[float]) -> bool:
    """Return whether images lose by more than the standard error of what they lose."""
    lost = [0.0 if old == new else old - new for old, new in zip(before, after, strict=True)]
    mean, exact = sum(lost) / len(lost), not all(map(math.isfinite, lost))  # images without error
    error = 0.0 if exact or len(lost) == 1 else statistics.stdev(lost) / math.sqrt(len(lost))
    return mean > error


def _moved(runs: tuple[int, ...], place: int, by: int, steps: int) -> tuple[int, ...] | None:
    """Return ``runs`` with the one at ``place`` moved; None where another run is, or no step."""
    step = runs[place] + by
    if step in runs or step == steps:
        return None
    return (*runs[:place], step, *runs[place + 1 :])
