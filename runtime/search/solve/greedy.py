"""Calibrate a plan by the paper's greedy search (DiTFastAttn, Algorithm 1), during a generation.

At each step the sites are visited in order. Candidates are tried from the cheapest on; the first
whose error at the *model's* output stays below ``(i / M) * threshold`` is taken, ``i`` counting the
sites from 1 to ``M``. Step 0 is full. The step then returns the output with all choices in force,
so that later steps are calibrated on the compressed trajectory.

What precedes a site is the same for all its candidates, so it is computed once: the search is exact
and costs about half of the forward passes of the algorithm as printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure.graph_runner import Environment
from ditfastattn.runtime.search.measure.site_evaluator import SiteEvaluator, greedy_candidates
from ditfastattn.runtime.search.solve.rows import Row

_ERROR_CLIP = 10.0
_EPSILON = 1e-6


@dataclass(frozen=True)
class Progress:
    """Report the search: model evaluations done, and at most how many there will be.

    ``seconds_left`` is an upper estimate from the pace so far; evaluations count whole forward
    passes, partial ones as fractions.
    """

    step: int
    steps: int
    done: float
    at_most: float
    seconds_left: float


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Return the paper's loss: ``mean(clip(|O-O'| / (max(|O|,|O'|) + 1e-6), 0, 10))``."""
    difference = (reference - candidate).abs().float()
    scale = torch.maximum(reference.abs(), candidate.abs()).float() + _EPSILON
    return float((difference / scale).clamp(0.0, _ERROR_CLIP).mean())


@dataclass
class GreedyCalibrator:
    """Choose strategies step by step while a generation runs.

    ``steps`` is the length of the generation where it is known (for the estimate), else 0.
    ``known`` holds the rows of an interrupted search over the same generation: those steps are
    followed, not searched.
    """

    captured: CapturedGraph
    sites: Sequence[Site]
    layout: CfgLayout
    threshold: float
    steps: int = 0
    on_progress: Callable[[Progress], None] | None = None
    known: Sequence[Row] = ()
    on_row: Callable[[Row], None] | None = None
    strategies: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Prepare the interpreter."""
        self._evaluator = SiteEvaluator(self.captured, self.sites, self.layout)

    @property
    def forwards(self) -> float:
        """Return how many whole evaluations of the model the search has run."""
        return self._evaluator.forwards

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the next step on flat inputs ``args``, choose its strategies, return its outputs."""
        began = time.monotonic()
        at = len(self.strategies)
        given = self.known[at] if at < len(self.known) else None
        environment = self._evaluator.begin(args)
        searched = at > 0 and given is None
        reference = self._evaluator.finish(dict(environment))[0] if searched else None
        row: list[Strategy] = []
        for index in range(len(self.sites)):
            self._evaluator.advance(environment, index)
            if reference is None:
                row.append(Strategy.FULL if given is None else given[index])
                self._put(environment, index, row[-1])
            else:
                row.append(self._choose(index, environment, reference, began))
            self._evaluator.remember(environment, index, row[-1])
        outputs = self._evaluator.finish(environment, len(self.sites) - 1)
        self._report(began)  # at step 0 this is the estimate, before any candidate is tried
        self.strategies.append(tuple(row))
        self.seconds += time.monotonic() - began
        if self.on_row is not None and given is None:
            self.on_row(self.strategies[-1])
        return outputs

    def _choose(
        self, index: int, environment: Environment, reference: Tensor, began: float
    ) -> Strategy:
        """Put the output of the chosen strategy into ``environment`` and return the strategy."""
        allowed = (index + 1) / len(self.sites) * self.threshold
        for strategy in greedy_candidates(self.sites[index], self.layout):
            attended = self._evaluator.attend(environment, index, strategy)
            output = self._evaluator.trial(environment, index, attended)[0]
            self._report(began)
            if relative_error(reference, output) < allowed:
                self._evaluator.put(environment, index, attended)
                return strategy
        self._put(environment, index, Strategy.FULL)
        return Strategy.FULL

    def _put(self, environment: Environment, index: int, strategy: Strategy) -> None:
        attended = self._evaluator.attend(environment, index, strategy)
        self._evaluator.put(environment, index, attended)

    def _report(self, began: float) -> None:
        if self.on_progress is None:
            return
        at_most = self.at_most()
        spent = self.seconds + time.monotonic() - began
        left = spent / self.forwards * max(0.0, at_most - self.forwards)
        step = len(self.strategies)
        self.on_progress(Progress(step, self.steps, self.forwards, at_most, left))

    def at_most(self) -> float:
        """Return how many forward passes the search takes if every candidate is refused."""
        suffixes = sum(
            len(greedy_candidates(site, self.layout)) * self._evaluator.left_after(index)
            for index, site in enumerate(self.sites)
        )
        steps = max(self.steps, len(self.strategies) + 1)
        return 1.0 + (steps - 1) * (2.0 + suffixes)
