"""Which of a pipeline's plans runs a generation, or that it runs dense.

A choice is made as a generation begins, and holds until it ends: nothing is mixed within one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.matching import mismatch
from ditfastattn.runtime.pipeline.guidance import current_guidance
from ditfastattn.runtime.pipeline.model_call import bound_arguments
from ditfastattn.runtime.pipeline.sampler import check_sampler

log = logging.getLogger(__name__)

Run = Callable[..., Any]  # a call of the transformer


class OnMismatch(StrEnum):
    """Say what becomes of a generation that no plan is for."""

    ERROR = "error"
    DENSE = "dense"


@dataclass(frozen=True)
class Moment:
    """A call of a transformer, and what is known of the generation that it belongs to.

    Attributes:
        pipeline: the one that calls; None if unknown.
        begins: whether this is known to be the first call of a generation.
    """

    pipeline: Any
    begins: bool

    @property
    def scheduler(self) -> Any:
        """Return the pipeline's scheduler; None if it has none."""
        return getattr(self.pipeline, "scheduler", None)


class Candidate:
    """A plan, and what runs a call by it."""

    def __init__(self, plan: Plan | None, run: Run) -> None:
        """Take the plan; None where the first generation calibrates one."""
        self.plan, self.run = plan, run
        self._accepted: list[Any] = [None, None, None]  # compared last, by identity

    def check_sampler(self, at: Moment) -> None:
        """Raise ``ConfigError`` unless the sampler is the plan's.

        The guidance is compared where a generation begins: a pipeline may change it later. A
        scheduler that counts has no index before a generation's first step.
        """
        if self.plan is None or at.scheduler is None:
            return
        if getattr(at.scheduler, "step_index", None) is not None:
            return
        begins = at.begins or hasattr(at.scheduler, "step_index")
        scale = current_guidance(at.pipeline) if begins else self._accepted[2]
        found = [at.scheduler, at.scheduler.config, scale]
        if any(one is not other for one, other in zip(found, self._accepted, strict=True)):
            check_sampler(self.plan, at.scheduler, scale)
            self._accepted[:] = found

    def check_call(self, at: Moment, arguments: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` unless the steps and the shapes of ``arguments`` are the plan's."""
        if self.plan is None:
            return
        steps = getattr(at.pipeline, "num_timesteps", None) or len(at.scheduler.timesteps)
        if steps != self.plan.sampler.steps:
            raise mismatch("sampler.steps", steps, self.plan.sampler.steps, what="sampler")
        for name, expected in self.plan.inputs.items():
            given = arguments.get(name)
            if isinstance(given, Tensor) and tuple(given.shape[1:]) != expected:
                raise mismatch(f"inputs.{name}", tuple(given.shape[1:]), expected)


class PlanChoice:
    """Choose among plans as each generation begins; the first one that fits runs it."""

    def __init__(
        self,
        module: nn.Module,
        candidates: Sequence[Candidate],
        dense: Run,
        on_mismatch: OnMismatch,
    ) -> None:
        """Take the plans in the order of preference, and what runs a call dense."""
        self._kind, self._candidates, self._dense = type(module), tuple(candidates), dense
        self._on_mismatch = on_mismatch
        self._chosen: Candidate | None = None
        self.dense_generations: Counter[str] = Counter()  # by reason

    def __call__(self, at: Moment, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one call.

        Raises:
            ConfigError: no plan is for this generation, and that is an error.
        """
        if len(self._candidates) == 1 and self._on_mismatch is OnMismatch.ERROR:
            (only,) = self._candidates
            only.check_sampler(at)
            return only.run(*args, **kwargs)
        if at.begins:
            self._chosen = self._choose(at, bound_arguments(self._kind, args, kwargs))
        elif self._chosen is not None:
            self._chosen.check_sampler(at)
        if self._chosen is None:
            return self._dense(*args, **kwargs)
        try:
            return self._chosen.run(*args, **kwargs)
        except ConfigError as error:
            # Nothing has been computed yet: weights or guidance, say, are another model's.
            if not at.begins or self._on_mismatch is OnMismatch.ERROR:
                raise
            self._note([error])
            self._chosen = None
            return self._dense(*args, **kwargs)

    def _choose(self, at: Moment, arguments: Mapping[str, Any]) -> Candidate | None:
        """Return the first plan that fits; None to run dense."""
        reasons: list[ConfigError] = []
        for candidate in self._candidates:
            try:
                candidate.check_sampler(at)
                candidate.check_call(at, arguments)
            except ConfigError as error:
                reasons.append(error)
            else:
                return candidate
        if self._on_mismatch is OnMismatch.ERROR:
            raise ConfigError(
                "none of the pipeline's plans is for this generation\n"
                + "\n".join(f"plan {place}: {error}" for place, error in enumerate(reasons, 1)),
                remedy="calibrate a plan for it, or accelerate(pipeline, plans, "
                "on_mismatch='dense')",
            ) from reasons[0]
        self._note(reasons)
        return None

    def _note(self, reasons: Sequence[ConfigError]) -> None:
        """Count a generation that runs dense; warn of each reason once."""
        reason = "; ".join(dict.fromkeys(_short(error) for error in reasons))
        if reason not in self.dense_generations:
            log.warning("ditfastattn: a generation runs dense, as no plan is for it: %s", reason)
        self.dense_generations[reason] += 1


def _short(error: ConfigError) -> str:
    """Return the message of ``error`` in one line, without the remedy."""
    lines = (line.strip() for line in str(error).splitlines())
    kept = [" ".join(line.split()) for line in lines if not line.startswith("remedy:")]
    return ", ".join(kept)
