"""Which sites lie within others, and are idle where a range of blocks or the output is reused.

Sites that hold no others come first, in the order of the graph; a range of blocks holds those from
one of its ends to the other, and the ranges among them. The whole output holds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ditfastattn.passes.analysis.site import SiteKind, range_name
from ditfastattn.passes.plan.strategies import Strategy


class Nested(Protocol):
    """What is read of a site here."""

    @property
    def name(self) -> str:
        """Return the name of the site."""
        ...

    @property
    def kind(self) -> SiteKind:
        """Return the kind of the site."""
        ...

    @property
    def ends(self) -> tuple[str, ...]:
        """Return the first and the last site of a range of blocks."""
        ...


def held_by(sites: Sequence[Nested]) -> list[frozenset[int]]:
    """Return, of each site, the places in ``sites`` of those that lie within.

    Raises:
        ValueError: an end of a range is not among ``sites``, or comes too late.
    """
    places = {site.name: place for place, site in enumerate(sites)}
    spans = {
        place: _span(site, places, sites)
        for place, site in enumerate(sites)
        if site.kind is SiteKind.BLOCKS
    }
    found: list[frozenset[int]] = []
    for place, site in enumerate(sites):
        inside: set[int] = set()
        if site.kind is SiteKind.OUTPUT:
            inside = set(range(len(sites))) - {place}
        elif place in spans:
            span = spans[place]
            inside = set(span)
            inside |= {other for other, own in spans.items() if set(own) < set(span)}
        found.append(frozenset(inside))
    return found


def _span(site: Nested, places: dict[str, int], sites: Sequence[Nested]) -> range:
    if len(site.ends) != 2 or site.name != range_name(*site.ends):
        raise ValueError(f"{site.name}: ends: expected the first and the last site, and their name")
    for end in site.ends:
        if end not in places or sites[places[end]].kind.holds_others:
            raise ValueError(f"{site.name}: ends: {end} is not an attention or feed-forward listed")
    first, last = (places[end] for end in site.ends)
    if first > last:
        raise ValueError(f"{site.name}: ends: {site.ends[0]} comes after {site.ends[1]}")
    return range(first, last + 1)


def why_not_nested(sites: Sequence[Nested]) -> str:
    """Return why ``sites`` cannot be in one plan, as ranges overlap or come too early; or ""."""
    ranks = [
        (SiteKind.BLOCKS, SiteKind.OUTPUT).index(site.kind) + 1 if site.kind.holds_others else 0
        for site in sites
    ]
    for site in sites:
        if site.ends and site.kind is not SiteKind.BLOCKS:
            return f"{site.name}: ends: only a range of blocks has them"
    if ranks != sorted(ranks):
        return "expected ranges of blocks after the sites they hold, and the whole output last"
    try:
        held = held_by(sites)
    except ValueError as error:
        return str(error)
    ranges = [place for place, site in enumerate(sites) if site.kind is SiteKind.BLOCKS]
    for one in ranges:
        for other in ranges:
            within = held[one] - set(ranges), held[other] - set(ranges)
            common = within[0] & within[1]
            if one < other and within[0] == within[1]:
                return f"{sites[one].name} is listed twice"
            if one < other and common and common not in within:
                names = f"{sites[one].name} and {sites[other].name}"
                return f"{names} overlap, and neither holds the other"
    return ""


def idle_steps(sites: Sequence[Nested], rows: Sequence[Sequence[Strategy]]) -> list[frozenset[int]]:
    """Return, of each site, the steps at which one that holds it is reused, so that it is idle."""
    idle: list[set[int]] = [set() for _ in sites]
    for holder, inside in enumerate(held_by(sites)):
        steps = (
            {step for step, row in enumerate(rows) if not row[holder].computes} if inside else ()
        )
        for place in inside:
            idle[place].update(steps)
    return [frozenset(steps) for steps in idle]
