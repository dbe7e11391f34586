"""Define the plan: which strategy each site takes at each step, and what the plan is valid for.

A plan is data. It is written as JSON, read back strictly (an unknown field, an unknown version or
an impossible schedule is a ``ConfigError``), and refuses a model or sampler other than its own.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
from ditfastattn.core.html import facts_table
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import parse_json, read_text
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import first_fault
from ditfastattn.passes.plan.nesting import held_by, why_not_nested
from ditfastattn.passes.plan.phases import Phase, Span, spans_of, why_not_phases
from ditfastattn.passes.plan.plan_html import plan_map_html
from ditfastattn.passes.plan.planned_site import HeadGroup, PlannedSite
from ditfastattn.passes.plan.strategies import Strategy, fitted_terms
from ditfastattn.passes.plan.text import PaddedText

SCHEMA_VERSION = 4
_WITHOUT_PHASES = 3  # otherwise the same


class Sampler(Record, frozen=True):
    """Hold the sampler that a plan was calibrated on; unknown fields are empty, never guessed.

    Where guidance is on for some steps only, ``phases`` say which, and ``cfg_layout`` is how it
    reaches the model there; there are none where all steps call the model alike.
    """

    scheduler: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    steps: Annotated[int, Field(gt=0)]
    timesteps: tuple[FiniteFloat, ...]
    guidance_scale: FiniteFloat | None = None
    cfg_layout: CfgLayout
    phases: tuple[Phase, ...] = ()

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out absent phases."""
        fields: dict[str, Any] = write(self)
        return {name: item for name, item in fields.items() if name != "phases" or item}

    @model_validator(mode="after")
    def _check(self) -> Sampler:
        if reason := why_not_phases(self.steps, self.cfg_layout, self.phases):
            raise ValueError(f"phases: {reason}")
        return self

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return the phases: the steps of each, and how guidance reaches the model in them."""
        return spans_of(self.steps, self.cfg_layout, self.phases)

    @property
    def layouts(self) -> tuple[CfgLayout, ...]:
        """Return how guidance reaches the model at each step."""
        return tuple(layout for steps, layout in self.spans for _ in steps)


class Plan(Record, frozen=True):
    """Say, per step and site, which strategy runs: ``strategies[step][site]``.

    ``sites`` may be only some of the model's: the others run unchanged. ``inputs`` holds the
    shape of each tensor input of the model without its batch dimension; the latent is among them.
    The batch size itself is free. With ``merge_variants`` steps of the same strategies are one
    compiled variant, even where they differ in the caches they must store.

    Attributes:
        schema_version: of the JSON; others are refused.
        model: the fingerprint of the model that the plan is for.
        inputs: the shapes of its tensor inputs, without the batch.
        text: to what its text is padded first; None where it stays as the pipeline gives it.
        sampler: the scheduler, steps, timesteps and guidance that the plan is for.
        sites: what takes strategies, in the model's order.
        strategies: a row for each step, with an entry for each site.
        merge_variants: whether equal rows are one variant.
        calibration: how the plan was found, and what was measured of it.
    """

    schema_version: Literal[4] = 4
    model: Fingerprint
    inputs: dict[str, tuple[int, ...]]
    text: PaddedText | None = None
    sampler: Sampler
    sites: tuple[PlannedSite, ...]
    strategies: tuple[tuple[Strategy, ...], ...]
    merge_variants: bool = False
    calibration: Calibration

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out text that is not padded."""
        fields: dict[str, Any] = write(self)
        return {name: item for name, item in fields.items() if name != "text" or item}

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if len(self.strategies) != self.sampler.steps:
            raise ValueError(
                f"strategies: {len(self.strategies)} rows for {self.sampler.steps} steps"
            )
        if len(self.sampler.timesteps) != self.sampler.steps:
            raise ValueError(
                f"sampler.timesteps: {len(self.sampler.timesteps)} values "
                f"for {self.sampler.steps} steps"
            )
        for step, row in enumerate(self.strategies):
            if len(row) != len(self.sites):
                raise ValueError(
                    f"strategies[{step}]: {len(row)} entries for {len(self.sites)} sites"
                )
        counts = Counter(site.name for site in self.sites)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"sites: {repeated[0]!r} occurs {counts[repeated[0]]} times")
        for index, site in enumerate(self.sites):
            self._check_site(index, site)
        self._check_groups()
        self._check_idle_sites()
        return self

    def _check_idle_sites(self) -> None:
        """Check that sites do nothing where one that holds them is reused."""
        if reason := why_not_nested(self.sites):
            raise ValueError(f"sites: {reason}")
        for holder, inside in enumerate(held_by(self.sites)):
            for step, row in enumerate(self.strategies):
                others = {row[place] for place in inside}
                if not row[holder].computes and others - {Strategy.SHARE_STEP}:
                    raise ValueError(
                        f"strategies[{step}]: {self.sites[holder].name} is {row[holder]}, so "
                        f"nothing within runs: expected {Strategy.SHARE_STEP} at every site there"
                    )

    def _check_groups(self) -> None:
        """Check that the groups of an attention are in order, and are all of its heads."""
        for name, members in self._groups().items():
            after = 0
            for site, group in members:
                if group.first != after or group.of != members[0][1].of:
                    raise ValueError(f"sites ({site.name}): group: expected to begin at {after}")
                after += site.heads
            if after != members[0][1].of:
                raise ValueError(f"sites: the groups of {name} hold {after} of its heads")

    def _groups(self) -> dict[str, list[tuple[PlannedSite, HeadGroup]]]:
        found: dict[str, list[tuple[PlannedSite, HeadGroup]]] = {}
        for site in self.sites:
            if site.group is not None:
                found.setdefault(site.group.site, []).append((site, site.group))
        return found

    @property
    def head_groups(self) -> dict[str, tuple[int, ...]]:
        """Return how many heads each group has, by the attention that is split."""
        return {
            name: tuple(site.heads for site, _ in members)
            for name, members in self._groups().items()
        }

    def _check_site(self, index: int, site: PlannedSite) -> None:
        column = [row[index] for row in self.strategies]
        self._check_coefficients(column, site)
        for steps, layout in self.sampler.spans:
            fault = first_fault(column[steps.start : steps.stop], site, layout)
            if fault is None:
                continue
            step, reason = steps.start + fault[0], fault[1]
            if steps.start:
                reason += f", since the phase began at step {steps.start}"
            raise ValueError(f"strategies[{step}][{index}] ({site.name}): {column[step]}: {reason}")

    def _check_coefficients(self, column: list[Strategy], site: PlannedSite) -> None:
        layouts = self.sampler.layouts
        rows = site.coefficients or ((),) * len(column)
        if len(rows) != len(column):
            raise ValueError(f"sites ({site.name}): coefficients: {len(rows)} steps")
        for step, (strategy, given) in enumerate(zip(column, rows, strict=True)):
            layout = layouts[step]
            wanted = (
                [fitted_terms(strategy.outputs_read, layout.batched)] * layout.branches
                if strategy.fitted
                else []
            )
            if list(map(len, given)) != wanted:
                raise ValueError(
                    f"sites ({site.name}): coefficients[{step}]: {list(map(len, given))} numbers, "
                    f"expected {wanted} for {strategy}"
                )

    @property
    def changed(self) -> int:
        """Count the entries that take a shortcut."""
        return sum(strategy != Strategy.FULL for row in self.strategies for strategy in row)

    def _repr_html_(self) -> str:
        """Return the plan as a notebook shows it: what it is for, and its map."""
        sampler, target = self.sampler, self.calibration.target
        rows = [
            ("sampler", f"{sampler.scheduler or 'not recorded'}, {sampler.steps} steps"),
            ("guidance", f"{sampler.guidance_scale}, {sampler.cfg_layout}"),
            ("shortcuts", f"{self.changed} of {len(self.sites) * sampler.steps} entries"),
        ]
        if target is not None:
            sign = ">=" if target.at_least else "<="
            rows.append(("target", f"{target.name} {sign} {target.bound:g}"))
        if self.calibration.predicted_speedup is not None:
            rows.append(("predicted speedup", f"{self.calibration.predicted_speedup:.2f}x"))
        names = [site.name for site in self.sites]
        return facts_table(rows) + plan_map_html(names, self.strategies)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; ``path`` holds the old file or the whole new one.

        Raises:
            ConfigError: the file cannot be written.
        """
        write_text_atomically(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read the plan in the file ``path``.

        Raises:
            ConfigError: the file is absent, not JSON, of another version, or not a valid plan.
        """
        text = read_text(Path(path), "the plan", "run `ditfastattn calibrate`")
        return cls.parse(text, os.fspath(path))

    @classmethod
    def parse(cls, text: str, where: str = "plan") -> Plan:
        """Read a plan from JSON ``text``; messages call it ``where``.

        Raises:
            ConfigError: it is not JSON, of another version, or not a valid plan.
        """
        data = parse_json(text, where, "the plan", "calibrate it again")
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version == _WITHOUT_PHASES:
            data["schema_version"] = version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise ConfigError(
                "the plan has another schema version",
                where=f"{where}: schema_version",
                got=repr(version)[:80],
                expected=SCHEMA_VERSION,
                remedy="calibrate it again, or use the ditfastattn that wrote it",
            )
        return cls.from_json(data, where, "correct the field or calibrate again")
