"""Do a search's expensive work: each piece is counted, reported, and kept in the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images
from ditfastattn.runtime.search.judge.judgement import Judgement, judge_images
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.session import Session, Stepper
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.solve.rows import Row


@dataclass(frozen=True)
class SearchProgress:
    """Report the progress of a search: its phase, and its cost so far in dense forward passes.

    ``expected`` is what such a search usually takes, and never less than what is done;
    ``at_most`` counts every round. ``seconds_left`` is estimated from ``expected``; it is 0 as long
    as the pace is unknown.
    """

    phase: str
    done: float
    at_most: float
    seconds_left: float
    expected: float = 0.0


@dataclass
class Work:
    """Run generations for a search."""

    session: Session
    checkpoint: Checkpoint
    at_most: float
    on_progress: Callable[[SearchProgress], None] | None = None
    expected: float = 0.0
    forwards: float = 0.0
    phase: str = ""
    timesteps: tuple[float, ...] = ()
    _variants: Variants | None = None
    _began: float = field(default_factory=time.monotonic)
    _dense: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _forwards: dict[tuple[Row, ...], float] = field(default_factory=dict)

    @property
    def variants(self) -> Variants:
        """Return the rewritten step variants, shared by all plans that are tried."""
        if self._variants is None:
            self._variants = Variants(self.session)
        return self._variants

    def __post_init__(self) -> None:
        """Read the timesteps that an interrupted search has kept."""
        self.timesteps = tuple(self.checkpoint.peek("timesteps") or ())

    def begin(self, phase: str) -> None:
        """Begin a phase of the search, and report it."""
        self.phase = phase
        self.spend(0.0)

    def spend(self, forwards: float) -> None:
        """Count work as dense forward passes, and report."""
        self.forwards += forwards
        if self.on_progress is None:
            return
        expected = max(self.expected or self.at_most, self.forwards)
        spent = time.monotonic() - self._began
        pace = spent / self.forwards if self.forwards > 1.0 else self.session.forward_seconds
        left = (expected - self.forwards) * pace
        self.on_progress(SearchProgress(self.phase, self.forwards, self.at_most, left, expected))

    def run(self, stepper: Stepper, prompt: Prompt, forwards: float) -> Tensor:
        """Run a generation that costs about ``forwards`` dense forward passes."""
        images = as_images(self.session.run(stepper, prompt))
        self.note(self.session.timesteps)
        self.spend(forwards)
        return images

    def note(self, timesteps: Sequence[float]) -> None:
        """Keep the timesteps of a generation, for a search that is resumed without running one."""
        if not self.timesteps:
            self.timesteps = tuple(timesteps)
            self.checkpoint.put("timesteps", self.timesteps)

    def dense(self, group: str, index: int, prompt: Prompt) -> Tensor:
        """Return the dense images of prompt ``index`` of ``group``."""

        def make() -> dict[str, Tensor]:
            images = self.run(DenseStepper(self.session), prompt, self.session.steps)
            return {"images": images}

        key = (group, index)
        if key not in self._dense:
            self._dense[key] = self.checkpoint.tensors(f"dense-{group}-{index}", make)["images"]
        return self._dense[key]

    def keep_dense(self, group: str, index: int, images: Tensor) -> None:
        """Take dense images that another piece of work made."""
        self._dense[group, index] = images

    def judge(
        self, group: str, index: int, rows: Sequence[Row], prompt: Prompt, target: Target
    ) -> list[Judgement]:
        """Generate by the plan ``rows`` and compare with dense; return an entry per image."""
        dense = self.dense(group, index, prompt)
        stepper = PlanStepper(self.variants, rows)
        images = self.run(stepper, prompt, self._forwards_of(rows))
        return judge_images(target, dense, images, prompt.call)

    def _forwards_of(self, rows: Sequence[Row]) -> float:
        """Return the matrix products of a generation by ``rows``, in dense forward passes."""
        key = tuple(rows)
        if key not in self._forwards:
            step = count_flops(self.session.captured.module.graph)
            self._forwards[key] = self.variants.flops(rows).total / step.total
        return self._forwards[key]
