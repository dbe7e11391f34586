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

OURS = "ditfastattn"
EAGER = "dense-eager"

Data = dict[str, Any]  # JSON
Group = Mapping[str, Any]  # a method's contenders, under the key "lanes", and its failures, as JSON


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        steps: sampler steps.
        peers: the methods to compare with.
        budgets: the strengths of our plans, as budgets of drift.
        repetitions: timed generations of each contender, each of another prompt.
        max_variants: the cap on distinct step variants of our plans; 0: no cap.
        lowering: the compiler; ``eager`` compiles nothing, for tests.
        fractions: further plans, by the most attention FLOPs that they keep.
    """

    steps: int
    peers: tuple[Peer, ...]
    budgets: tuple[float, ...]
    repetitions: int = 10
    max_variants: int = 0
    lowering: Lowering = Lowering.INDUCTOR
    fractions: tuple[float, ...] = ()

    @property
    def compiled(self) -> bool:
        """Tell whether anything is compiled."""
        return self.lowering is Lowering.INDUCTOR


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
    """Open the model and make its prompts."""
    prompts = model.test_prompts(options.repetitions, options.steps)
    return Setup(model, options, model.open(), prompts, checkpoint, tell)


def failure(method: str, setting: str, error: Exception) -> Data:
    """Return the record of a contender that could not be measured."""
    return {"method": method, "setting": setting, "reason": reason_of(error)}


def reason_of(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
