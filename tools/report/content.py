"""What a report holds; each command makes one of what it has found."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from ditfastattn.passes.analysis.sites import SiteReport
from ditfastattn.passes.plan.legality import declined_strategies
from ditfastattn.passes.plan.nesting import idle_steps
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.reports import summary
from ditfastattn.tools.savings import Errors, Prices, Saving, saved_entries, savings

MOST_PICTURES = 12
_AMPLIFICATION = 4.0

Rows = Sequence[tuple[str, ...]]
Points = Mapping[str, Sequence[tuple[float, float, str]]]  # series: (speedup, quality, label)


@dataclass(frozen=True)
class Picture:
    """One image dense and planned, and their amplified difference, each as a data URL."""

    label: str
    dense: str
    planned: str
    difference: str


@dataclass(frozen=True)
class Declined:
    """What is not rewritten, or not by some strategies, and why."""

    name: str
    what: str
    reason: str


@dataclass(frozen=True)
class PlanSection:
    """What a report shows of one plan.

    Attributes:
        name: its heading.
        plan: the plan.
        facts: what was measured, as pairs.
        prices: of each strategy at each site, in operations and in seconds; None if unknown.
        errors: how much each entry changes its site's output, ``[step][site]``; empty if unknown.
        caches: the cache slots; empty if unknown.
        declined: what was left alone, with reasons.
        pictures: dense and planned.
    """

    name: str
    plan: Plan
    facts: tuple[tuple[str, str], ...] = ()
    prices: tuple[Prices, Prices] | None = None
    errors: Errors = ()
    caches: tuple[CacheSlot, ...] = ()
    declined: tuple[Declined, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def saved(self) -> list[tuple[Saving, Saving]]:
        """Return what each kind of shortcut saves, of operations and of seconds."""
        if self.prices is None:
            return []
        flops, seconds = (savings(self.plan, prices) for prices in self.prices)
        return list(zip(flops, seconds, strict=True))

    @property
    def held_bytes(self) -> list[int]:
        """Return the bytes of caches that are held after each step."""
        return [
            sum(
                each.bytes
                for each in self.caches
                if any(written <= step < read for written, read in each.lives)
            )
            for step in range(self.plan.sampler.steps)
        ]


@dataclass(frozen=True)
class Report:
    """One page: a heading, facts, sections of plans, a frontier, tables, the environment."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[PlanSection, ...]
    frontier: Points
    quality: str
    environment: Mapping[str, str]
    tables: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """An entry of a plan's map: what hovering over it tells."""

    strategy: Strategy
    details: str


def cells(section: PlanSection) -> list[tuple[str, list[Cell]]]:
    """Return a row per site: its name, and a cell per step."""
    plan = section.plan
    amounts = [saved_entries(plan, prices) for prices in section.prices or ()]
    idle = idle_steps(plan.sites, plan.strategies)
    found: list[tuple[str, list[Cell]]] = []
    for index, site in enumerate(plan.sites):
        line: list[Cell] = []
        for step, row in enumerate(plan.strategies):
            strategy = row[index]
            parts = [f"step {step}, {site.name} ({site.kind})", strategy.label]
            if step in idle[index]:
                why = "idle: a range of blocks that holds it, or the whole step, is skipped"
                line.append(Cell(strategy, f"{parts[0]}; {why}"))
                continue
            error = section.errors[step][index] if section.errors else None
            if error:
                parts.append(f"changes the site's output by {error:.1%}")
            if amounts:
                flops, seconds = (of[step][index] for of in amounts)
                whole = [prices.step for prices in section.prices or ()]
                parts.append(
                    f"saves {flops / whole[0]:.1%} of the step's FLOPs, "
                    f"{seconds / whole[1]:.1%} of its time"
                )
            line.append(Cell(strategy, "; ".join(parts)))
        found.append((site.name, line))
    return found


def declined_of(report: SiteReport, plan: Plan) -> tuple[Declined, ...]:
    """Return what ``report`` says was declined: attentions, and strategies of sites."""
    found = [Declined(each.name, "not a site", each.reason) for each in report.declined]
    for site in report.sites:
        for strategy, reason in declined_strategies(site, plan.sampler.cfg_layout).items():
            found.append(Declined(site.name, f"no {strategy}", reason))
    return merged(found)


def merged(found: Sequence[Declined]) -> tuple[Declined, ...]:
    """Return one entry for all sites that are declined alike."""
    alike: dict[tuple[str, str], list[str]] = {}
    for each in found:
        alike.setdefault((each.what, each.reason), []).append(each.name)
    return tuple(
        Declined(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", *key)
        for key, names in alike.items()
    )


def pictures(dense: Tensor, planned: Tensor, labels: Sequence[str] = ()) -> tuple[Picture, ...]:
    """Return the first images of ``dense`` and ``planned``, ``[B, 1 or 3, H, W]`` in [0, 1]."""
    found: list[Picture] = []
    for index, (one, other) in enumerate(zip(dense, planned, strict=True)):
        if index == MOST_PICTURES:
            break
        difference = ((one - other).abs().mean(0, keepdim=True) * _AMPLIFICATION).clamp(0.0, 1.0)
        label = labels[index] if index < len(labels) else f"image {index + 1}"
        found.append(Picture(label, *map(data_url, (one, other, difference))))
    return tuple(found)


def data_url(image: Tensor) -> str:
    """Return an image ``[1 or 3, H, W]`` in [0, 1] as a PNG in a URL."""
    pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().byte().cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0).squeeze()))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def plan_facts(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return what a plan is for and how it was found, as pairs."""
    found, sampler = plan.calibration, plan.sampler
    rows = [
        ("plan", summary(plan)),
        ("sampler", f"{sampler.scheduler or 'not recorded'}, {sampler.steps} steps"),
        ("guidance", f"{sampler.guidance_scale}, {sampler.cfg_layout}"),
        ("search", f"{found.method}, {found.rounds} rounds, {found.seconds:.0f} s"),
    ]
    if found.target is not None:
        sign = ">=" if found.target.at_least else "<="
        rows.append(("target, worst image", f"{found.target.name} {sign} {found.target.bound:g}"))
    for label, measured in (("calibration", found.calibrated), ("held out", found.held_out)):
        if measured is not None:
            worst = f"worst {measured.worst:.4g}, mean {measured.mean:.4g}"
            rows.append((f"{label}, {measured.prompts} prompts", worst))
    if found.predicted_speedup is not None:
        rows.append(("predicted speedup", f"{found.predicted_speedup:.2f}x"))
    rows += [(f"tried: {each.what}", each.outcome) for each in found.tried]
    if found.cache_bytes:
        rows.append(("caches, at most", f"{found.cache_bytes / 2**20:.1f} MiB"))
    return tuple(rows)
