"""Measure the plans of a book again, on prompts that their searches have not seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.calibration import Measured, PlannedTarget
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.book.book import Book
from ditfastattn.runtime.book.manifest import Entry, Figures
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import DEFAULT_SEED, Validation, validate
from ditfastattn.runtime.search.record.planned_target import target_for

log = logging.getLogger(__name__)


def measure_plan(
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    promise: PlannedTarget,
    *,
    target: Target | None = None,
    speed: bool = False,
    seed: int = DEFAULT_SEED,
) -> Figures:
    """Measure ``plan`` on the prompts of ``call`` by the metric that a tier promises.

    Args:
        pipeline: the diffusers pipeline that the plan is for, not accelerated.
        plan: the plan.
        call: the keyword arguments of a generation, with a list entry per image. Steps and
            guidance are the plan's.
        promise: what a tier promises.
        target: how to measure a promise by a metric of the user's own; its bound is not used.
        speed: also compile and time generations.
        seed: seeds the prompts' noise: ``seed``, ``seed + 1``, ...

    Returns:
        What was measured, for ``Book.add``.

    Raises:
        ConfigError: the plan does not match the model, sampler or call, or the metric cannot be
            measured.
    """
    wanted = target_for(promise) if target is None else replace(target, bound=promise.bound)
    return _figures(validate(pipeline, plan, call, target=wanted, speed=speed, seed=seed), promise)


def validate_book(
    pipeline: Any,
    book: Book,
    call: Mapping[str, Any],
    *,
    plans: Collection[str] = (),
    speed: bool = False,
    seed: int = DEFAULT_SEED,
    on_progress: Callable[[str], None] = log.info,
) -> dict[Entry, Figures | ConfigError]:
    """Measure the plans of ``book`` on the prompts of ``call``, and keep the figures in the book.

    A plan that ``call`` does not fit (it is for another resolution, say) keeps its figures; the
    reason is returned instead. A plan that breaks its promise stays until ``book.prune()``.

    Args:
        pipeline: the diffusers pipeline that the plans are for, not accelerated.
        book: the book.
        call: the keyword arguments of a generation. Steps and guidance are those of each plan.
        plans: the names of the plans to measure; all where there is none.
        speed: also compile and time generations.
        seed: seeds the prompts' noise.
        on_progress: called with what is done next.

    Returns:
        The figures of each plan that was measured, or the reason why it was not.

    Raises:
        ConfigError: there is no plan of such a name.
    """
    tiers = {tier.name: tier.promise for tier in book.manifest.tiers}
    known = {entry.name for entry, _ in book.plans}
    if unknown := sorted(set(plans) - known):
        raise ConfigError(
            "the book has no such plan",
            where=str(book.folder),
            got=", ".join(unknown),
            expected=", ".join(sorted(known)),
        )
    found: dict[Entry, Figures | ConfigError] = {}
    for entry, plan in book.plans:
        if plans and entry.name not in plans:
            continue
        on_progress(f"measuring plan {entry.name} ({entry.tier}, {plan.sampler.steps} steps)")
        try:
            promise = tiers[entry.tier]
            found[entry] = measure_plan(pipeline, plan, call, promise, speed=speed, seed=seed)
        except ConfigError as error:
            log.warning("ditfastattn: plan %s was not measured: %s", entry.name, error)
            found[entry] = error
    book.record({entry: each for entry, each in found.items() if isinstance(each, Figures)})
    return found


def _figures(validation: Validation, promise: PlannedTarget) -> Figures:
    quality = validation.qualities[0]
    return Figures(
        source="validation",
        metric=promise.name,
        model=promise.model,
        quality=Measured(prompts=len(quality.values), mean=quality.mean, worst=quality.worst),
        speedup=None if validation.timing is None else validation.timing.speedup.median,
    )
