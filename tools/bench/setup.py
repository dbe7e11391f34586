"""What all contenders of a benchmark share: options, pipeline and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.tools.bench.models import BenchModel
from ditfastattn.tools.bench.peers.base import Peer

Data = dict[str, Any]  # JSON
Group = Mapping[str, Any]  # a method's contenders, under the key "lanes", and its failures, as JSON

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
WORK = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
FEWER = (0.2, 0.25, 0.35, 0.45, 0.7)
RULES = (0.25, 0.35, 0.45)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        steps: sampler steps.
        peers: the methods to compare with.
        speedups: the strengths of our plans of sites, as the speedups that their search predicts.
        work: the strengths of our plans of whole steps, as the share of the steps that run.
        fewer: the counts of the same solver's steps, as shares of ``steps``.
        rules: the same shares, for the plans that follow other methods' rules.
        repetitions: timed generations of each contender, each of another prompt.
        seeds: images that are compared, of each contender.
        max_variants: the cap on distinct step variants of our plans; 0: no cap.
        lowering: the compiler; ``eager`` compiles nothing, for tests.
    """

    steps: int
    peers: tuple[Peer, ...]
    speedups: tuple[float, ...] = SPEEDUPS
    work: tuple[float, ...] = WORK
    fewer: tuple[float, ...] = FEWER
    rules: tuple[float, ...] = RULES
    repetitions: int = 20
    seeds: int = 64
    max_variants: int = 0
    lowering: Lowering = Lowering.INDUCTOR

    @property
    def compiled(self) -> bool:
        """Tell whether anything is compiled."""
        return self.lowering is Lowering.INDUCTOR

    def counts(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Return ``shares`` of the steps as counts, without duplicates, none of all steps."""
        counts = {max(1, round(share * self.steps)) for share in shares}
        return tuple(sorted(count for count in counts if count < self.steps))


@dataclass(frozen=True)
class Setup:
    """What all contenders of a run share; ``tell`` is called with what is done next."""

    model: BenchModel
    options: BenchOptions
    pipeline: Any
    prompts: Sequence[Prompt]
    checkpoint: Checkpoint
    tell: Callable[[str], None]


def set_up(
    model: BenchModel,
    options: BenchOptions,
    checkpoint: Checkpoint,
    tell: Callable[[str], None] = lambda _: None,
) -> Setup:
    """Open the model and make its prompts; more than are timed where images mean something."""
    seeds = max(options.repetitions, options.seeds if model.trained else 0)
    prompts = model.test_prompts(seeds, options.steps)
    return Setup(model, options, model.open(), prompts, checkpoint, tell)


def failure(method: str, setting: str, error: Exception) -> Data:
    """Return the record of a contender that could not be measured."""
    return {"method": method, "setting": setting, "reason": reason_of(error)}


def reason_of(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
