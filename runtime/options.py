"""Read the options of ``torch.compile(model, backend="ditfastattn", options={...})``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch._inductor import list_mode_options

from ditfastattn.core.choices import choice_named
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import SAMPLES
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.solve.greedy import Progress

DEFAULT_THRESHOLD = 0.075


class WeightsCheck(StrEnum):
    """Say how much of the weights is compared with what it was, as each generation begins."""

    SAMPLED = "sampled"  # what a plan's fingerprint covers: milliseconds a generation
    FULL = "full"  # reads and hashes every byte of the model
    NEVER = "never"  # a plan is still compared with the model that first runs by it

    @property
    def samples(self) -> int:
        """Return how many elements of each tensor to look at."""
        return sys.maxsize if self is WeightsCheck.FULL else SAMPLES


@dataclass(frozen=True)
class BackendOptions:
    """Hold the backend's options.

    Attributes:
        plan: the plan to run; without one the first generation calibrates it.
        dense: run every step with full attention, through the same path.
        threshold: the target of a self-calibration (the paper's delta; D1 to D6 are 0.025 to 0.15).
        cfg_layout: the order of the guidance halves, for a self-calibration.
        steps: the length of the generation where known, for a self-calibration's estimate.
        timestep: the name of the model argument that holds the timestep.
        check_weights: how much of the weights is compared as each generation begins.
        lowering: the code generator.
        outline: compile equal blocks once for all step variants; ``False``, and CUDA graphs
            (``mode="reduce-overhead"``), compile each variant as one graph.
        inductor: Inductor's own options, handed on.
        on_progress: called during a self-calibration.
    """

    plan: Plan | None = None
    dense: bool = False
    threshold: float = DEFAULT_THRESHOLD
    cfg_layout: CfgLayout = CfgLayout.NONE
    steps: int = 0
    timestep: str = "timestep"
    check_weights: WeightsCheck = WeightsCheck.SAMPLED
    lowering: Lowering = Lowering.INDUCTOR
    outline: bool = True
    inductor: dict[str, Any] = field(default_factory=dict)
    on_progress: Callable[[Progress], None] | None = None


_PUBLIC = (
    "plan",
    "dense",
    "threshold",
    "cfg_layout",
    "timestep",
    "check_weights",
    "lowering",
    "outline",
    "inductor",
)


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
    """Check ``options`` and ``mode`` as ``torch.compile`` passes them.

    Raises:
        ConfigError: an option is unknown or has a value it cannot take.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(_PUBLIC))
    if unknown:
        raise ConfigError(
            "unknown option of the ditfastattn backend",
            where="torch.compile(options=...)",
            got=", ".join(unknown),
            expected=", ".join(_PUBLIC),
            remedy="put Inductor's own options under 'inductor'",
        )
    inductor = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    inductor |= given.get("inductor", {})
    plan = given.get("plan")
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise _bad_value("plan", plan, "a ditfastattn.Plan or the path of one")
    threshold = given.get("threshold", DEFAULT_THRESHOLD)
    if not isinstance(threshold, (int, float)) or threshold <= 0:
        raise _bad_value("threshold", threshold, "a number above 0")
    return BackendOptions(
        plan=plan,
        dense=bool(given.get("dense", False)),
        threshold=float(threshold),
        cfg_layout=choice_named(
            CfgLayout, given.get("cfg_layout", CfgLayout.NONE), _where("cfg_layout")
        ),
        timestep=str(given.get("timestep", "timestep")),
        check_weights=choice_named(
            WeightsCheck, given.get("check_weights", WeightsCheck.SAMPLED), _where("check_weights")
        ),
        lowering=choice_named(
            Lowering, given.get("lowering", Lowering.INDUCTOR), _where("lowering")
        ),
        outline=bool(given.get("outline", True)),
        inductor=inductor,
    )


def _where(name: str) -> str:
    return f"torch.compile(options={{{name!r}: ...}})"


def _bad_value(name: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        "the option has a value it cannot take", where=_where(name), got=got, expected=expected
    )
