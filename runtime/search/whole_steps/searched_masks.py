"""The masks that a search finds: which steps run, by how many of them do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.climb import Sample, climb
from ditfastattn.runtime.search.whole_steps.judge import Judge
from ditfastattn.runtime.search.whole_steps.masks import (
    OUTPUTS,
    Path,
    drift,
    fit_mask,
    search_masks,
)
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.record import Recorder
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State

SEARCHED_ON = 3  # images
MOST_RUNS = 0.5  # of the steps: above, sites within the steps save more than whole steps
FEW_STEPS = 8  # of which more may run


@dataclass
class _Mask:
    """Hold the steps that run, and what the images they were searched on are worth."""

    runs: tuple[int, ...]
    judged: list[float]  # by the target's metric, more is better; none without a quality
    climbed: bool = False


class Masks:
    """The steps that run, in order, by how many run; they are searched as they are asked for."""

    def __init__(
        self,
        recorder: Recorder,
        checkpoint: Checkpoint,
        judge: Judge,
        observed: Sequence[Observed],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Take the dense generations of the calibration prompts, and what judges images."""
        self._request, self._meter = recorder.request, recorder.meter
        self._checkpoint, self._judge = checkpoint, judge
        self._observed, self._rollouts = observed, rollouts
        self._steps = len(observed[0].steps)
        begins = len(observed[0].begins)
        self.most = min(self._steps - 1, max(FEW_STEPS, int(MOST_RUNS * self._steps), begins))
        self._known: dict[int, _Mask | None] = {}
        self._searched = 0
        self._search: Iterator[list[Path]] | None = None

    def __getitem__(self, number: int) -> tuple[int, ...]:
        """Return the mask of ``number`` runs.

        Raises:
            KeyError: so many runs do not come to the end, or no nearer than fewer do.
        """
        found = self._mask(number)
        if found is None:
            raise KeyError(number)
        return found.runs

    def __contains__(self, number: int) -> bool:
        """Return whether there is a mask of ``number`` runs."""
        return self._mask(number) is not None

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers of runs, fewest first."""
        return (number for number in range(1, self.most + 1) if number in self)

    def promises(self, number: int) -> bool:
        """Return whether a quality is met on the images that a mask was searched on."""
        found = self._mask(number)
        bound = self._request.target.gain(self._request.target.bound)
        return found is not None and min(found.judged) >= bound

    def _mask(self, number: int) -> _Mask | None:
        def make() -> dict[str, list[Any]]:
            found = self._best(self._ways(number))
            return {} if found is None else {"runs": list(found.runs), "judged": found.judged}

        if not 0 < number <= self.most:
            return None
        if number not in self._known:
            kept = self._checkpoint.data(f"mask-{number}", make)
            found = _Mask(tuple(kept["runs"]), kept["judged"]) if kept else None
            self._known[number] = found
        return self._known[number]

    def _ways(self, number: int) -> list[Path]:
        """Return the best ways to the end in which ``number`` steps run."""
        self._meter.begin("which steps run")
        if self._search is None:
            images = [self._rollouts[index] for index in _spread(self._by_hardness)]
            self._search = search_masks(images, self._meter.spend)
        found: list[Path] = []
        while self._searched < number:
            found, self._searched = next(self._search, []), self._searched + 1
        return found

    def climb(self, number: int) -> bool:
        """Move single runs of the mask of ``number`` runs; return whether that made it better.

        A move that some images lose by, which the mask was not searched on, is not tried on all.
        """

        def make() -> list[int]:
            searched = _spread(self._by_hardness)
            others = [image for image in self._by_hardness if image not in searched]
            few = self._sample(_spread(others)) if others else None
            every = self._sample(range(len(self._rollouts)))
            self._meter.begin(f"{number} of {self._steps} steps: moving single runs")
            return list(climb(few, every, before, self._meter.spend))

        mask, before = self._mask(number), self[number]
        if mask is None or mask.climbed:
            return False
        mask.climbed = True
        mask.runs = tuple(self._checkpoint.data(f"climbed-{number}", make))
        return mask.runs != before

    def _sample(self, images: Sequence[int]) -> Sample:
        """Return what a mask is worth to ``images``."""
        rollouts = [self._rollouts[index] for index in images]

        def worth(mask: FittedMask, states: Sequence[State]) -> list[float]:
            if self._request.target.kind is TargetKind.QUALITY:
                return self._judged(mask, images, states)
            pairs = zip(rollouts, states, strict=True)
            missed = [drift([rollout], [state], self._steps) for rollout, state in pairs]
            return [-math.log(each) if each else math.inf for each in missed]

        return Sample(rollouts, worth)

    def _judged(
        self, mask: FittedMask, images: Sequence[int], states: Sequence[State]
    ) -> list[float]:
        """Return the target's metric of ``images``; more is better."""
        prompts = [self._request.prompts[index] for index in images]
        observed = [self._observed[index] for index in images]
        judged = self._judge.replayed(mask, prompts, observed, states)
        return [self._request.target.gain(item.value) for item in judged]

    def _best(self, paths: Sequence[Path]) -> _Mask | None:
        """Return the path whose worst image is best by the target's metric.

        Latents do not show it all: noise that the last step would have taken away is small there.
        """
        if not paths:
            return None
        if self._request.target.kind is not TargetKind.QUALITY:
            return _Mask(paths[0].runs, [])
        images = _spread(self._by_hardness)
        masks = [
            _Mask(path.runs, self._judged(_fitted(path), images, path.states)) for path in paths
        ]
        return max(masks, key=lambda mask: min(mask.judged))

    @cached_property
    def _by_hardness(self) -> list[int]:
        """Return the images, the hardest first: that is where every third step runs."""
        self._meter.begin("which images are hard")
        every_third = sorted(self._observed[0].begins.union(range(0, self._steps, 3)))
        _, states = fit_mask(self._rollouts, every_third, self._meter.spend)
        pairs = zip(self._rollouts, states, strict=True)
        missed = [drift([rollout], [state], self._steps) for rollout, state in pairs]
        return sorted(range(len(missed)), key=missed.__getitem__, reverse=True)


def _fitted(path: Path) -> FittedMask:
    return FittedMask(path.runs, path.coefficients, OUTPUTS)


def _spread(by_hardness: Sequence[int]) -> list[int]:
    """Return ``SEARCHED_ON`` of the images, from the hardest to the easiest.

    Masks that are found on them suit other images by 1 to 3 dB more, on the demo's model, than
    those found on the first ones, or the hardest alone.
    """
    last = len(by_hardness) - 1
    places = [round(place * last / max(SEARCHED_ON - 1, 1)) for place in range(SEARCHED_ON)]
    return [by_hardness[place] for place in dict.fromkeys(places)]
