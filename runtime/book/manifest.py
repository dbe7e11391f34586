"""The manifest of a plan book: its tiers with what they promise, and its plans with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import parse_json, read_text
from ditfastattn.passes.plan.calibration import Measured, PlannedTarget
from ditfastattn.runtime.quality import AUTO, LOSSLESS

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "book.json"
MOST_BYTES: Final = 16 * 2**20
_MOST_PLANS: Final = 1000
_AGAIN: Final = "make the book again"

TierName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
PlanName = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]  # the first digits of the file's hash


class Tier(Record, frozen=True):
    """Name what a user may ask for, and what its plans promise on the worst held-out prompt."""

    name: TierName
    promise: PlannedTarget

    @property
    def described(self) -> str:
        """Return the promise in words."""
        sign = ">=" if self.promise.at_least else "<="
        return f"{self.promise.name} {sign} {self.promise.bound:g}"


class Figures(Record, frozen=True):
    """Record how good the images of a plan are, by the metric of its tier.

    Attributes:
        source: what measured them: the ``calibration`` on its held-out prompts, or a
            ``validation`` on new ones.
        metric: the metric's name.
        model: the model that measures a CLIP score; "" for other metrics.
        quality: the mean and the worst value, in the metric's unit.
        speedup: over the compiled dense model; None where nothing was timed.
    """

    source: Literal["calibration", "validation"]
    metric: str
    model: str = ""
    quality: Measured
    speedup: float | None = None

    def keep(self, promise: PlannedTarget) -> bool:
        """Return whether the worst image is as good as the ``promise`` says."""
        worst = self.quality.worst
        kept = worst >= promise.bound if promise.at_least else worst <= promise.bound
        return kept and (self.metric, self.model) == (promise.name, promise.model)


class Entry(Record, frozen=True):
    """Say which plan serves a tier. Its file is named by its content, within the book's folder."""

    name: PlanName
    tier: TierName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    figures: Figures

    @property
    def file(self) -> str:
        """Return the name of the plan's file."""
        return f"plan-{self.name}.json"


class Manifest(Record, frozen=True):
    """Hold the tiers, the best one first, and the plans, in the order of preference.

    The tier ``lossless`` needs no plan: it is dense, and every book has it. ``default`` is the
    tier of a request that names none.
    """

    schema_version: Literal[1] = 1
    tiers: tuple[Tier, ...]
    default: TierName
    plans: Annotated[tuple[Entry, ...], Field(max_length=_MOST_PLANS)] = ()

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names) or {LOSSLESS, AUTO} & set(names):
            listed = ", ".join(names)
            raise ValueError(f"tiers: a name twice, or {LOSSLESS!r} or {AUTO!r}: {listed}")
        if self.default not in self.names:
            raise ValueError(f"default: {self.default!r} is not a tier: {', '.join(self.names)}")
        for place, entry in enumerate(self.plans):
            if entry.tier not in names:
                raise ValueError(f"plans[{place}]: {entry.tier!r} is not a tier of plans")
            if entry.sha256[: len(entry.name)] != entry.name:
                raise ValueError(f"plans[{place}]: the name is not that of its content")
        if len({(entry.name, entry.tier) for entry in self.plans}) != len(self.plans):
            raise ValueError("plans: one occurs twice in a tier")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all tiers."""
        return (LOSSLESS, *(tier.name for tier in self.tiers))

    def tier(self, name: str, where: str) -> Tier:
        """Return the tier ``name``, which has plans.

        Raises:
            ConfigError: there is none.
        """
        found = next((tier for tier in self.tiers if tier.name == name), None)
        if found is None:
            raise ConfigError(
                "the book has no such tier of plans",
                where=where,
                got=name,
                expected=", ".join(tier.name for tier in self.tiers) or "none: it has no tiers",
                remedy="lossless runs dense and takes no plan" if name == LOSSLESS else "",
            )
        return found


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the book in ``folder``.

    Raises:
        ConfigError: there is no book, or its manifest is not valid.
    """
    path = folder / MANIFEST
    what, remedy = "the plan book", "make one with `ditfastattn book create`"
    text = read_text(path, what, remedy, most_bytes=MOST_BYTES)
    data = parse_json(text, str(path), what, _AGAIN)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            "the plan book has another schema version",
            where=f"{path}: schema_version",
            got=repr(version)[:80],
            expected=SCHEMA_VERSION,
            remedy="use the ditfastattn that wrote it, or " + _AGAIN,
        )
    return Manifest.from_json(data, str(path), "correct the field, or " + _AGAIN)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the book holds the old one or the whole new one."""
    write_text_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
