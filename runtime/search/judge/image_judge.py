"""Judge the images of a search's plans against its target, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.bracket import AIM, LARGEST_MOVE
from ditfastattn.runtime.search.judge.judgement import Judgement, judge_images
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row, digest_of, takes_shortcuts

CALIBRATION = "calibration"  # the names of the groups of prompts
HELD_OUT = "held-out"


class ImageJudge:
    """Compare the images of plans with dense ones; each prompt is judged once per plan."""

    def __init__(self, work: Work, target: Target, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Take the prompts by the name of their group."""
        self.target = target
        self._work = work
        self._prompts = prompts
        self._judged: dict[tuple[str, str, int], list[Judgement]] = {}
        self._hardness: dict[tuple[str, int], float] = {}  # by the last plan

    def judge(self, group: str, rows: Sequence[Row]) -> list[Judgement]:
        """Compare the images of the plan ``rows``, up to the first prompt that misses the target.

        The hardest prompts come first: those that the last plan damaged most.
        """
        prompts = self._prompts[group]
        order = sorted(range(len(prompts)), key=lambda k: -self._hardness.get((group, k), 0.0))
        judged: list[Judgement] = []
        for index in order:
            found = self._judge_prompt(group, rows, index, prompts[index])
            met = self.meets_target(found)
            self._hardness[group, index] = damage_ratio(found, met)
            judged += found
            if not met:
                break
        return judged

    def meets_target(self, judged: Sequence[Judgement]) -> bool:
        """Return whether every image meets the target."""
        return all(self.target.met_by(item.value) for item in judged)

    def _judge_prompt(
        self, group: str, rows: Sequence[Row], index: int, prompt: Prompt
    ) -> list[Judgement]:
        """Judge one prompt's images; the checkpoint keeps the result."""
        work = self._work
        if not takes_shortcuts(rows):
            dense = work.dense(group, index, prompt)
            return judge_images(self.target, dense, dense, prompt.call)

        def make() -> list[tuple[float, float, float | None]]:
            judged = work.judge(group, index, rows, prompt, self.target)
            return [(item.value, item.damage, item.allowed) for item in judged]

        key = (group, digest_of(rows), index)
        if key not in self._judged:
            kept = work.checkpoint.data("-".join(map(str, key)), make)
            self._judged[key] = [Judgement(*item) for item in kept]
        return self._judged[key]


def damage_ratio(judged: Sequence[Judgement], met: bool) -> float:
    """Return the worst ratio of actual to allowed damage."""
    return max(_ratio_of(item, met) for item in judged)


def _ratio_of(item: Judgement, met: bool) -> float:
    if item.allowed is None:  # the distance is unknown: move far, then halve the bracket
        return AIM / LARGEST_MOVE if met else AIM * LARGEST_MOVE
    if item.allowed <= 0.0:
        return 0.0 if item.damage <= 0.0 else math.inf
    return max(item.damage, 0.0) / item.allowed
