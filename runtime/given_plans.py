"""What ``accelerate`` is given to choose from: a plan, several, a plan book, or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.book.book import Book
from ditfastattn.runtime.plan_choice import Tiers

AnyPlan = Plan | str | os.PathLike[str]
AnyPlans = AnyPlan | Sequence[AnyPlan] | Book | None


@dataclass(frozen=True)
class GivenPlan:
    """A plan, with its name and tier in its book; None where the first generation calibrates."""

    plan: Plan | None
    name: str = ""
    tier: str = ""


@dataclass(frozen=True)
class GivenPlans:
    """The plans to choose from; the tiers of their book; how many to keep compiled, 0 for all."""

    plans: tuple[GivenPlan, ...]
    tiers: Tiers | None = None
    most_compiled: int = 0


def given_plans(given: AnyPlans) -> GivenPlans:
    """Return ``given`` as plans, read where they are paths.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    if isinstance(given, Book):
        manifest = given.manifest
        return GivenPlans(
            tuple(GivenPlan(plan, entry.name, entry.tier) for entry, plan in given.plans),
            Tiers(manifest.names, manifest.default),
            given.most_compiled,
        )
    if given is None:
        return GivenPlans((GivenPlan(None),))
    several = [given] if isinstance(given, (Plan, str, os.PathLike)) else given
    found = tuple(GivenPlan(one if isinstance(one, Plan) else Plan.load(one)) for one in several)
    if not found:
        raise ConfigError(
            "there is no plan",
            where="accelerate(plan)",
            got="an empty sequence",
            expected="a plan, several, or None to calibrate one in the first generation",
        )
    return GivenPlans(found)
