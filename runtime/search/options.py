"""What a search is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.methods import Method

DEFAULT_TARGET = Target.min_ssim(0.9)
MAX_ROUNDS = 6


@dataclass(frozen=True)
class SearchOptions:
    """Hold the options of a search; 0 for ``max_variants`` and ``max_cache_bytes`` means no cap."""

    target: Target
    method: Method = Method.GLOBAL
    objective: Objective = Objective.LATENCY
    max_variants: int = 0
    max_cache_bytes: int = 0
    max_rounds: int = MAX_ROUNDS
    lowering: Lowering = Lowering.INDUCTOR
    seed: int = 0
