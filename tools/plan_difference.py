"""Where two plans differ: what they are for, and their strategies, site by site."""

from __future__ import annotations

from dataclasses import dataclass

from ditfastattn.passes.plan.schema import Plan

_FIELDS = ("schema_version", "model", "inputs", "sampler", "merge_variants")


@dataclass(frozen=True)
class Change:
    """One entry that differs; a strategy is "" where a plan has no such site or step."""

    step: int
    site: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """What differs between two plans: fields with both values, sites' fields, and entries."""

    fields: dict[str, tuple[str, str]]
    entries: tuple[Change, ...]
    compared: int

    @property
    def same(self) -> bool:
        """Return whether both plans do the same for the same model and sampler."""
        return not self.fields and not self.entries


def plan_difference(before: Plan, after: Plan) -> Difference:
    """Compare what plans do and what they are for; how they were found is not compared."""
    first, second = before.model_dump(mode="json"), after.model_dump(mode="json")
    fields = _leaves({name: first[name] for name in _FIELDS})
    others = _leaves({name: second[name] for name in _FIELDS})
    for plan, found in ((first, fields), (second, others)):
        for site in plan["sites"]:
            found |= _leaves(
                {k: item for k, item in site.items() if k != "name"}, f"site {site['name']}."
            )
    names = sorted({*fields, *others})
    pairs = {name: (fields.get(name, "absent"), others.get(name, "absent")) for name in names}
    ours, theirs = _entries(before), _entries(after)
    places = sorted({*ours, *theirs})
    changes = tuple(
        Change(*place, ours.get(place, ""), theirs.get(place, ""))
        for place in places
        if ours.get(place) != theirs.get(place)
    )
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return Difference(different, changes, len(places))


def _entries(plan: Plan) -> dict[tuple[int, str], str]:
    return {
        (step, site.name): strategy.name
        for step, row in enumerate(plan.strategies)
        for site, strategy in zip(plan.sites, row, strict=True)
    }


def _leaves(data: object, prefix: str = "") -> dict[str, str]:
    """Return what ``data`` holds, by path; a list is a leaf."""
    if isinstance(data, dict) and data:
        found: dict[str, str] = {}
        for name, item in data.items():
            found |= _leaves(item, f"{prefix}{name}.")
        return found
    return {prefix.rstrip("."): str(data)}
