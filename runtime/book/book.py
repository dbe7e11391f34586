"""The plan book: a folder of plans, from which each generation gets the one that fits it.

The manifest is written last when a plan is added, and first when one is removed, so that it names
files that are there, whenever a process is killed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import make_folder, naming_faults, sweep, write_text_atomically
from ditfastattn.core.locks import sole_writer
from ditfastattn.core.strict_json import read_text
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.book.manifest import (
    MANIFEST,
    Entry,
    Figures,
    Manifest,
    Tier,
    read_manifest,
    write_manifest,
)
from ditfastattn.runtime.quality import LOSSLESS
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.record.planned_target import record_target

log = logging.getLogger(__name__)

MOST_COMPILED: Final = 8
_LOCK: Final = ".book.lock"


class Book:
    """A folder of plans. Make or open one with ``ditfastattn.book``."""

    def __init__(self, folder: Path, most_compiled: int) -> None:
        """Open the book in ``folder``; see ``book``."""
        if most_compiled < 1:
            raise ConfigError(
                "a book runs at least one plan",
                where="most_compiled",
                got=most_compiled,
                expected="1 or more",
            )
        self.folder, self.most_compiled = folder, most_compiled
        self.manifest, self._plans = _read(folder)

    @property
    def plans(self) -> tuple[tuple[Entry, Plan], ...]:
        """Return the plans with their entries, in the order of preference."""
        return tuple((entry, self._plans[entry.name]) for entry in self.manifest.plans)

    def add(self, plan: Plan, tier: str, figures: Figures | None = None) -> Entry:
        """Add ``plan`` to ``tier``; one of the same model, sampler and inputs makes way for it.

        Args:
            plan: the plan.
            tier: the tier, whose promise the plan must keep.
            figures: what a validation measured; by default what the calibration measured on its
                held-out prompts.

        Returns:
            The plan's entry in the book.

        Raises:
            ConfigError: there is no such tier, nothing was measured by its metric, or the plan
                does not keep its promise.
        """
        text = plan.model_dump_json(indent=1) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        name = digest[:16]
        with self._writing():
            wanted = self.manifest.tier(tier, "book.add(tier)")
            found = figures_of(plan) if figures is None else figures
            _check_promise(wanted, found)
            entry = Entry(name=name, tier=tier, sha256=digest, figures=found)
            kept = [
                other
                for other in self.manifest.plans
                if other.tier != tier or not _same_requests(self._plans[other.name], plan)
            ]
            for other in set(self.manifest.plans) - set(kept):
                log.warning("ditfastattn: plan %s makes way for %s", other.name, name)
            write_text_atomically(self.folder / entry.file, text)
            self._plans[name] = plan
            self._write((*kept, entry))
        return entry

    def record(self, found: Mapping[Entry, Figures]) -> None:
        """Replace the figures of plans by those ``found``, by entry."""
        with self._writing():
            self._write(
                tuple(
                    entry.model_copy(update={"figures": found.get(entry, entry.figures)})
                    for entry in self.manifest.plans
                )
            )

    def broken(self) -> tuple[Entry, ...]:
        """Return the plans whose figures do not keep the promise of their tier."""
        tiers = {tier.name: tier.promise for tier in self.manifest.tiers}
        return tuple(e for e in self.manifest.plans if not e.figures.keep(tiers[e.tier]))

    def prune(self) -> tuple[str, ...]:
        """Remove plans that break their promise, and files that are not a plan of the book.

        Returns:
            The names of the removed files.
        """
        with self._writing():
            broken = set(self.broken())
            self._write(tuple(entry for entry in self.manifest.plans if entry not in broken))
            kept = {entry.file for entry in self.manifest.plans}
            sweep(self.folder)
            left = sorted(path for path in self.folder.glob("plan-*.json") if path.name not in kept)
            for path in left:
                with naming_faults(path, "cannot remove the plan"):
                    path.unlink(missing_ok=True)
        return tuple(path.name for path in left)

    def _write(self, entries: tuple[Entry, ...]) -> None:
        changed = self.manifest.model_copy(update={"plans": entries})
        self.manifest = Manifest.model_validate(changed.model_dump())  # the copy is not checked
        write_manifest(self.folder, self.manifest)
        named = {entry.name for entry in entries}
        self._plans = {name: plan for name, plan in self._plans.items() if name in named}

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Let nobody else write meanwhile, and begin with what the folder holds now."""
        busy = "another process writes to the plan book"
        with sole_writer(self.folder / _LOCK, self.folder, busy, "run it again later"):
            self.manifest, self._plans = _read(self.folder)
            yield


def book(
    folder: str | os.PathLike[str],
    tiers: Mapping[str, Target] | None = None,
    *,
    default: str = "",
    most_compiled: int = MOST_COMPILED,
) -> Book:
    """Open the plan book in ``folder``; with ``tiers``, make it where there is none.

    A book maps what a request asks for (resolution or frames, steps, guidance, and a tier of
    quality) to a plan: ``accelerate(pipeline, book)`` and ``with quality(tier)``. Each tier
    promises a quality on the worst prompt that was measured; the tier ``lossless`` is dense, and
    there in every book::

        book = ditfastattn.book("book", {"high": Target.min_ssim(0.98)})
        book.add(plan, "high")

    Args:
        folder: where the book is.
        tiers: what each tier promises, the best one first, for a book that is made.
        default: the tier of requests that name none; by default the first of ``tiers``.
        most_compiled: how many plans stay compiled at a time. Those that were used least recently
            are released, and compiled again when they are needed.

    Returns:
        The book.

    Raises:
        ConfigError: there is no book and no ``tiers``, or the book has others; it is not valid.
    """
    path = Path(folder)
    if tiers is not None:
        _make(path, tiers, default)
    return Book(path, most_compiled)


def figures_of(plan: Plan) -> Figures:
    """Return what the calibration of ``plan`` measured on held-out prompts.

    Raises:
        ConfigError: it did not measure any.
    """
    found = plan.calibration
    if found.target is None or found.held_out is None:
        raise ConfigError(
            "the plan was not measured on held-out prompts",
            where="plan.calibration.held_out",
            got="none",
            remedy="measure it: `ditfastattn book add --measure`, or book.add(figures=...)",
        )
    return Figures(
        source="calibration",
        metric=found.target.name,
        model=found.target.model,
        quality=found.held_out,
        speedup=found.measured_speedup,
    )


def _check_promise(tier: Tier, figures: Figures) -> None:
    if figures.keep(tier.promise):
        return
    other = (figures.metric, figures.model) != (tier.promise.name, tier.promise.model)
    raise ConfigError(
        "the plan was measured by another metric than its tier promises"
        if other
        else "the plan does not keep the promise of its tier",
        where=f"tier {tier.name!r}",
        got=f"{figures.metric} {figures.quality.worst:.4g} on the worst of "
        f"{figures.quality.prompts} prompts ({figures.source})",
        expected=tier.described,
        remedy="measure it by that metric: `ditfastattn book add --measure`"
        if other
        else "add it to a tier that promises less, or calibrate a plan for this promise",
    )


def _same_requests(one: Plan, other: Plan) -> bool:
    """Return whether both plans fit the same generations."""
    pairs = ((one.model, other.model), (one.inputs, other.inputs), (one.sampler, other.sampler))
    return all(first == second for first, second in pairs)


def _make(folder: Path, tiers: Mapping[str, Target], default: str) -> None:
    wanted = Manifest.from_json(
        {
            "tiers": [
                {"name": name, "promise": record_target(target).model_dump()}
                for name, target in tiers.items()
            ],
            "default": default or next(iter(tiers), LOSSLESS),
        },
        "book(tiers)",
        "name tiers in lower case, each once",
    )
    for name, target in tiers.items():
        if target.kind is not TargetKind.QUALITY:
            raise ConfigError(
                "a tier promises a quality",
                where=f"book(tiers): {name!r}",
                got=target.describe(),
                expected="such as Target.min_ssim(0.98)",
            )
    if not (folder / MANIFEST).exists():
        make_folder(folder)
        with sole_writer(folder / _LOCK, folder, "another process writes to the plan book"):
            if not (folder / MANIFEST).exists():
                write_manifest(folder, wanted)
                return
    found = read_manifest(folder)
    if (found.tiers, found.default) != (wanted.tiers, wanted.default):
        raise ConfigError(
            "the plan book has other tiers",
            where=str(folder),
            got=_listed(found),
            expected=_listed(wanted),
            remedy="open it without tiers, or make another book",
        )


def _listed(manifest: Manifest) -> str:
    tiers = ", ".join(f"{tier.name}: {tier.described}" for tier in manifest.tiers)
    return f"{tiers or 'no tiers'}; {manifest.default} by default"


def _read(folder: Path) -> tuple[Manifest, dict[str, Plan]]:
    """Return the manifest and the plans, by name; once more if they changed meanwhile."""
    manifest = read_manifest(folder)
    try:
        return manifest, _read_plans(folder, manifest.plans)
    except ConfigError:
        again = read_manifest(folder)
        if again == manifest:
            raise
        return again, _read_plans(folder, again.plans)


def _read_plans(folder: Path, entries: Sequence[Entry]) -> dict[str, Plan]:
    return {entry.name: _read_plan(folder / entry.file, entry) for entry in entries}


def _read_plan(path: Path, entry: Entry) -> Plan:
    remedy = "remove it from the book's manifest, or put the file back"
    text = read_text(path, "a plan of the book", remedy)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != entry.sha256:
        raise ConfigError(
            "the plan was changed since it was added to the book",
            where=str(path),
            got=digest,
            expected=entry.sha256,
            remedy="put the file back, or add the plan again",
        )
    return Plan.parse(text, str(path))
