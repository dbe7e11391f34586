"""Which of a pipeline's plans runs a generation, or that it runs dense.

A choice is made as a generation begins, and holds until it ends: nothing is mixed within one.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.call_order import OtherCallsError
from ditfastattn.runtime.current_generation import PerGeneration
from ditfastattn.runtime.matching import mismatch
from ditfastattn.runtime.pipeline.denoiser import second_of
from ditfastattn.runtime.pipeline.guidance import current_guidance
from ditfastattn.runtime.pipeline.model_call import bound_arguments
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.quality import LOSSLESS, current_quality

log = logging.getLogger(__name__)

MOST_REASONS = 256  # that are told apart

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
        second: whether the transformer is the pipeline's second one.
    """

    pipeline: Any
    begins: bool
    second: bool = False

    @property
    def scheduler(self) -> Any:
        """Return the pipeline's scheduler; None if it has none."""
        return getattr(self.pipeline, "scheduler", None)


class Candidate:
    """A plan, and what makes what runs a call by it."""

    def __init__(
        self, plan: Plan | None, make_run: Callable[[], Run], name: str = "", tier: str = ""
    ) -> None:
        """Take the plan; None where the first generation calibrates one.

        ``make_run`` is called again if what it made was released. ``name`` and ``tier`` are those
        of a plan book.
        """
        self.plan, self.make_run, self.name, self.tier = plan, make_run, name, tier
        self._accepted: list[Any] = [None, None, None]  # compared last, by identity

    def check_sampler(self, at: Moment) -> None:
        """Raise ``ConfigError`` unless the sampler is the plan's.

        The guidance is compared where a generation begins: a pipeline may change it later. A
        scheduler that counts has no index before a generation's first step; a second transformer
        begins later.
        """
        if self.plan is None or at.scheduler is None:
            return
        if not at.second and getattr(at.scheduler, "step_index", None) is not None:
            return
        begins = at.begins or (not at.second and hasattr(at.scheduler, "step_index"))
        scale = current_guidance(at.pipeline, at.second) if begins else self._accepted[2]
        found = [at.scheduler, at.scheduler.config, scale]
        if any(one is not other for one, other in zip(found, self._accepted, strict=True)):
            check_sampler(self.plan, at.scheduler, scale)
            self._accepted[:] = found

    def misfits(self, at: Moment, arguments: Mapping[str, Any]) -> list[ConfigError]:
        """Return in what a generation that begins differs from the plan's, field by field."""
        if self.plan is None:
            return []
        found: list[ConfigError] = []
        try:
            self.check_sampler(at)
        except ConfigError as error:
            found.append(error)
        steps = getattr(at.pipeline, "num_timesteps", None) or len(at.scheduler.timesteps)
        # Of two transformers, each runs some of the steps only: its own clock compares them.
        if second_of(at.pipeline) is None and steps != self.plan.sampler.steps:
            found.append(mismatch("sampler.steps", steps, self.plan.sampler.steps, what="sampler"))
        for name, expected in self.plan.inputs.items():
            given = arguments.get(name)
            if isinstance(given, Tensor) and tuple(given.shape[1:]) != expected:
                found.append(mismatch(f"inputs.{name}", tuple(given.shape[1:]), expected))
        return found


@dataclass(frozen=True)
class Tiers:
    """The tiers of a plan book, and the one of generations that ask for none."""

    names: tuple[str, ...] = ()
    default: str = ""

    def chosen(self) -> str:
        """Return the tier that is asked for.

        Raises:
            ConfigError: there is no such tier.
        """
        tier = current_quality() or self.default
        if tier and tier != LOSSLESS and tier not in self.names:
            raise ConfigError(
                "there is no such tier of quality",
                where="ditfastattn.quality(tier)",
                got=tier,
                expected=", ".join(self.names) or f"{LOSSLESS}: the plans are of no book",
                remedy="accelerate(pipeline, book) with a book that has this tier",
            )
        return tier


@dataclass(frozen=True)
class Choice:
    """Say what runs a generation.

    Attributes:
        tier: the tier that was asked for; "" without a plan book.
        name: the name of the plan in its book; "" without one, and where it runs dense.
        plan: the plan; None where it runs dense.
        reason: why it runs dense, though another tier than lossless was asked for; or "".
    """

    tier: str = ""
    name: str = ""
    plan: Plan | None = None
    reason: str = ""


@dataclass
class _UnderWay:
    """What runs the generation under way; no ``run`` before the first one."""

    run: Run | None = None
    candidate: Candidate | None = None
    choice: Choice = field(default_factory=Choice)


class PlanChoice:
    """Choose among plans as each generation begins; the first one that fits runs it.

    A choice is of one generation, so generations of other threads and contexts have their own.
    """

    def __init__(
        self,
        module: nn.Module,
        candidates: Sequence[Candidate],
        dense: Run,
        on_mismatch: OnMismatch,
        tiers: Tiers | None = None,
        most_compiled: int = 0,
    ) -> None:
        """Take the plans in the order of preference, and what runs a call dense.

        Of those that have run, the ``most_compiled`` used last are kept compiled; 0 keeps all.
        """
        self._kind, self._candidates, self._dense = type(module), tuple(candidates), dense
        self._on_mismatch, self._tiers = on_mismatch, tiers or Tiers()
        self._most_compiled = most_compiled
        self._runs: OrderedDict[Candidate, Run] = OrderedDict()  # the one used last comes last
        self._lock = threading.Lock()
        self._under_way = PerGeneration(_UnderWay)
        self._only = None
        if len(candidates) == 1 and on_mismatch is OnMismatch.ERROR and tiers is None:
            self._only = candidates[0]
        self.dense_generations: Counter[str] = Counter()  # by reason

    @property
    def choice(self) -> Choice:
        """Return what runs the generation under way, or ran the last one of this context."""
        return self._under_way.current().choice

    def __call__(self, at: Moment, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one call.

        Raises:
            ConfigError: no plan is for this generation, and that is an error.
        """
        if self._only is not None and not current_quality():
            self._only.check_sampler(at)
            return self._run_of(self._only)(*args, **kwargs)
        now = self._under_way.current()
        if at.begins:
            self._choose(now, at, bound_arguments(self._kind, args, kwargs))
        elif now.candidate is not None:
            now.candidate.check_sampler(at)
        if now.run is None:
            raise ConfigError(
                "which plan is for this generation cannot be told, as its beginning is not known",
                where="a call of the transformer",
                got="no new timesteps in the scheduler of a pipeline that calls",
                remedy="accelerate(pipeline, plan) with one plan, and name no quality",
            )
        if now.candidate is None:
            return now.run(*args, **kwargs)
        try:
            return now.run(*args, **kwargs)
        except ConfigError as error:
            # Nothing has been computed yet: weights or guidance, say, are another model's. Where
            # guidance is switched at another step than the plan's, the rest is dense.
            early = at.begins or isinstance(error, OtherCallsError)
            if not early or self._on_mismatch is OnMismatch.ERROR:
                raise
            self._run_dense(now, now.choice.tier, [(now.candidate, [error])])
            return self._dense(*args, **kwargs)

    def _choose(self, now: _UnderWay, at: Moment, arguments: Mapping[str, Any]) -> None:
        """Take the first plan that fits, or none to run dense."""
        now.run = now.candidate = None
        tier = self._tiers.chosen()
        if tier == LOSSLESS:
            now.run, now.choice = self._dense, Choice(tier)
            return
        misfits: list[tuple[Candidate, list[ConfigError]]] = []
        for candidate in self._candidates:
            if candidate.tier != tier:
                continue
            found = candidate.misfits(at, arguments)
            if not found:
                now.run, now.candidate = self._run_of(candidate), candidate
                now.choice = Choice(tier, candidate.name, candidate.plan)
                return
            misfits.append((candidate, found))
        if self._on_mismatch is OnMismatch.ERROR:
            raise _none_fits(misfits, tier) from (misfits[0][1][0] if misfits else None)
        self._run_dense(now, tier, misfits)

    def _run_of(self, candidate: Candidate) -> Run:
        """Return what runs ``candidate``, made anew if it was released; release what is too much.

        A generation under way keeps what runs it until it ends.
        """
        with self._lock:
            run = self._runs.get(candidate)
            if run is None:
                run = self._runs[candidate] = candidate.make_run()
            self._runs.move_to_end(candidate)
            if self._most_compiled and len(self._runs) > self._most_compiled:
                released, _ = self._runs.popitem(last=False)
                log.info("released what was compiled of plan %s", released.name)
            return run

    def _run_dense(
        self, now: _UnderWay, tier: str, misfits: Sequence[tuple[Candidate, list[ConfigError]]]
    ) -> None:
        """Run a generation dense and count it; warn of each reason once."""
        reason = f"the tier {tier!r} has no plans"
        if misfits:
            nearest, errors = min(misfits, key=lambda each: len(each[1]))
            reason = "; ".join(dict.fromkeys(map(_short, errors)))
            if nearest.name:
                reason = f"the nearest plan, {nearest.name}: {reason}"
        with self._lock:
            # Reasons hold values of calls, which a server does not choose.
            if len(self.dense_generations) >= MOST_REASONS and reason not in self.dense_generations:
                reason = "other reasons"
            self.dense_generations[reason] += 1
            first = self.dense_generations[reason] == 1
        if first:
            log.warning("ditfastattn: a generation runs dense, as no plan is for it: %s", reason)
        now.run, now.candidate, now.choice = self._dense, None, Choice(tier, reason=reason)


def _none_fits(misfits: Sequence[tuple[Candidate, list[ConfigError]]], tier: str) -> ConfigError:
    lines = [
        f"plan {candidate.name or place}: {errors[0]}"
        for place, (candidate, errors) in enumerate(misfits, 1)
    ]
    of = f"of the tier {tier!r} " if tier else ""
    return ConfigError(
        f"none of the pipeline's plans {of}is for this generation\n" + "\n".join(lines),
        remedy="calibrate a plan for it, or accelerate(pipeline, plans, on_mismatch='dense')",
    )


def _short(error: ConfigError) -> str:
    """Return the message of ``error`` in one line, without the remedy."""
    lines = (line.strip() for line in str(error).splitlines())
    kept = [" ".join(line.split()) for line in lines if not line.startswith("remedy:")]
    return ", ".join(kept)
