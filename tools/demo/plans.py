"""The plans that come with an embedded model, and what was measured when they were recorded.

``python -m ditfastattn.tools.demo.record`` searches them anew and writes the folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import read_json
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.book.book import Book, book
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.tools.embedded import EmbeddedModel
from ditfastattn.tools.savings import Errors, Prices

NAMES = ("strict", "middle", "loose")
RECORD = "recorded.json"
COMMAND = "python -m ditfastattn.tools.demo.record"


class Measurement(Record, frozen=True):
    """Hold what a validation measured of a plan, on prompts that its search had not seen.

    ``lowering`` is what ran the generations that were timed.
    """

    prompts: int
    lowering: Lowering
    ssim: float
    worst_ssim: float
    psnr: float
    speedup: float
    dense_seconds: float
    planned_seconds: float


class RecordedPlan(Record, frozen=True):
    """Hold a plan's place in the demo: its name, prices and errors, and what was measured of it."""

    name: str
    flops: Prices
    seconds: Prices
    measured: Measurement
    errors: Errors = ()


class Phases(Record, frozen=True):
    """Hold the seconds of the recorded demo.

    ``first_picture`` is dense, ``tracing`` traces and draws by the loosest plan, ``compiling`` is
    of all forms, ``turn`` is a warm generation of each.
    """

    first_picture: float
    tracing: float
    compiling: float
    turn: float


class RecordedPlans(Record, frozen=True):
    """Hold all that was recorded with the plans; ``weights`` is the hash of the model's files.

    ``phases`` are None until the demo has run with these plans.
    """

    weights: str
    machine: dict[str, str]
    plans: tuple[RecordedPlan, ...]
    phases: Phases | None = None


@dataclass(frozen=True)
class DemoPlan:
    """A plan of the demo, with the prices of its strategies in operations and in seconds.

    Of one that was searched just now there is no record, and no prices or errors until they are
    measured.
    """

    name: str
    plan: Plan
    record: RecordedPlan | None = None
    prices: tuple[Prices, Prices] | None = None
    errors: Errors = ()


def recorded_plans(model: EmbeddedModel) -> RecordedPlans | None:
    """Return what was recorded with the plans of ``model``; None before anything was.

    Raises:
        ConfigError: it is of other weights, or cannot be read.
    """
    path = model.plans / RECORD
    if not path.exists():
        return None
    command = f"{COMMAND} --model {model.key}"
    found = RecordedPlans.from_json(
        read_json(path, "the record of the embedded plans"), str(path), f"run {command}"
    )
    weights = hash_weights(model.folder)
    if found.weights != weights:
        raise ConfigError(
            "the embedded plans are of other weights than the embedded model's",
            where=str(path),
            got=found.weights,
            expected=weights,
            remedy=f"search new ones with `ditfastattn demo --model {model.key} --calibrate`, or "
            f"record: {command}",
        )
    return found


def shipped_plans(model: EmbeddedModel) -> list[DemoPlan]:
    """Return the plans that come with ``model``, the strictest first.

    Raises:
        ConfigError: one is missing, or they are of other weights.
    """
    recorded = recorded_plans(model)
    records = {} if recorded is None else {each.name: each for each in recorded.plans}
    found: list[DemoPlan] = []
    for name in NAMES:
        plan, record = Plan.load(model.plans / f"{name}.json"), records.get(name)
        prices = None if record is None else (record.flops, record.seconds)
        errors = () if record is None else record.errors
        found.append(DemoPlan(name, plan, record, prices, errors))
    return found


def shipped_book(model: EmbeddedModel, folder: Path) -> Book:
    """Make a book of the plans that come with ``model``, each a tier with its search's promise.

    Raises:
        ConfigError: there is a book of other tiers.
    """
    plans = {each.name: each.plan for each in shipped_plans(model)}
    promises = map(Target.min_ssim, model.least_ssim)
    made = book(folder, dict(zip(plans, promises, strict=True)))
    for name, plan in plans.items():
        made.add(plan, name)
    return made


def hash_weights(folder: Path) -> str:
    """Return a hash of the weights in ``folder``, by which a record names its model."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
