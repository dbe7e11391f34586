"""The masks that a search finds: which steps run, by how many of them do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.climb import Sample, climb
from ditfastattn.runtime.search.whole_steps.judge import Judge
from ditfastattn.runtime.search.whole_steps.masks import Path, drift, fit_mask, search_masks
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.record import Recorder
from ditfastattn.runtime.search.whole_steps.rollout import HISTORY, Rollout, State

SEARCHED_ON = 3  # images
MOST_RUNS = 0.5  # of the steps: above, sites within the steps save more than whole steps
FEW_STEPS = 8  # of which more may run


class Masks(Mapping[int, tuple[int, ...]]):
    """The steps that run, in order, by how many run."""

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
        self._climbed: set[int] = set()

    def __getitem__(self, number: int) -> tuple[int, ...]:
        """Return the mask of ``number`` runs."""
        return self._by_number[number]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers of runs, fewest first."""
        return iter(self._by_number)

    def __len__(self) -> int:
        """Return how many masks there are."""
        return len(self._by_number)

    @cached_property
    def _by_number(self) -> dict[int, tuple[int, ...]]:
        def make() -> list[list[int]]:
            begins = len(self._observed[0].begins)
            most = min(self._steps - 1, max(FEW_STEPS, int(MOST_RUNS * self._steps), begins))
            images = _spread(self._by_hardness)
            self._meter.begin("which steps run")
            rollouts = [self._rollouts[index] for index in images]
            found = search_masks(rollouts, most, self._meter.spend)
            return [list(self._best(paths, images).runs) for paths in found.values()]

        kept = self._checkpoint.data("masks", make)
        return {len(runs): tuple(runs) for runs in kept}

    def climb(self, number: int) -> bool:
        """Move single runs of the mask of ``number`` runs; return whether that made it better.

        A move must be worth more to some images that the mask was not searched on, and then to all.
        """

        def make() -> list[int]:
            searched = _spread(self._by_hardness)
            others = [image for image in self._by_hardness if image not in searched]
            samples = [self._sample(range(len(self._rollouts)))]
            if others:
                samples.insert(0, self._sample(_spread(others)))
            self._meter.begin(f"{number} of {self._steps} steps: moving single runs")
            return list(climb(samples, before, self._meter.spend))

        if number in self._climbed:
            return False
        self._climbed.add(number)
        before = self[number]
        self._by_number[number] = tuple(self._checkpoint.data(f"climbed-{number}", make))
        return self[number] != before

    def _sample(self, images: Sequence[int]) -> Sample:
        """Return what a mask is worth to ``images``: their mean and their worst, in equal parts."""
        rollouts = [self._rollouts[index] for index in images]

        def worth(mask: FittedMask, states: Sequence[State]) -> float:
            if self._request.target.kind is not TargetKind.QUALITY:
                return -drift(rollouts, states, self._steps)
            values = self._judged(mask, images, states)
            return min(values) + sum(values) / len(values)

        return Sample(rollouts, worth)

    def _judged(
        self, mask: FittedMask, images: Sequence[int], states: Sequence[State]
    ) -> list[float]:
        """Return the target's metric of ``images``; more is better."""
        prompts = [self._request.prompts[index] for index in images]
        observed = [self._observed[index] for index in images]
        judged = self._judge.replayed(mask, prompts, observed, states)
        return [self._request.target.gain(item.value) for item in judged]

    def _best(self, paths: Sequence[Path], images: Sequence[int]) -> Path:
        """Return the path whose worst image is best by the target's metric.

        Latents do not show it all: noise that the last step would have taken away is small there.
        """
        if self._request.target.kind is not TargetKind.QUALITY or len(paths) == 1:
            return paths[0]

        def worst(path: Path) -> float:
            mask = FittedMask(path.runs, path.coefficients, HISTORY - 1)
            return min(self._judged(mask, images, path.states))

        return max(paths, key=worst)

    @cached_property
    def _by_hardness(self) -> list[int]:
        """Return the images, the hardest first: that is where every third step runs."""
        self._meter.begin("which images are hard")
        every_third = sorted(self._observed[0].begins.union(range(0, self._steps, 3)))
        _, states = fit_mask(self._rollouts, every_third, self._meter.spend)
        pairs = zip(self._rollouts, states, strict=True)
        missed = [drift([rollout], [state], self._steps) for rollout, state in pairs]
        return sorted(range(len(missed)), key=missed.__getitem__, reverse=True)


def _spread(by_hardness: Sequence[int]) -> list[int]:
    """Return ``SEARCHED_ON`` of the images, from the hardest to the easiest.

    Masks that are found on them suit other images by 1 to 3 dB more, on the demo's model, than
    those found on the first ones, or the hardest alone.
    """
    last = len(by_hardness) - 1
    places = [round(place * last / max(SEARCHED_ON - 1, 1)) for place in range(SEARCHED_ON)]
    return [by_hardness[place] for place in dict.fromkeys(places)]
