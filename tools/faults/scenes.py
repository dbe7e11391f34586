"""The kinds of faults: each yields, trial by trial, what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ditfastattn.tools.faults.damage import (
    bad_manifest_fields,
    bad_plan_fields,
    damaged_bundle,
    damaged_engines,
    damaged_export,
    damaged_plan,
    damaged_search,
)
from ditfastattn.tools.faults.interruptions import (
    entries,
    interrupted_build,
    interrupted_export,
    interrupted_search,
    killed_builders,
    readers,
    two_exporters,
)
from ditfastattn.tools.faults.scene import Scene


def scenes() -> dict[str, Callable[[Scene], Iterator[str]]]:
    """Return the kinds of faults by their names."""
    found: dict[str, Callable[[Scene], Iterator[str]]] = {}
    for how, full in (("killed", False), ("disk full", True)):
        found[f"export, {how}, a bundle there"] = partial(interrupted_export, full=full, there=True)
        found[f"export, {how}, none there"] = partial(interrupted_export, full=full, there=False)
        found[f"build, {how}"] = partial(interrupted_build, full=full)
        if not full:
            found["build by TensorRT, it or its worker killed"] = killed_builders
        found[f"calibrate, {how}"] = partial(interrupted_search, full=full)
    found["three exporters in one folder"] = two_exporters
    found["entries by a lock that is removed"] = entries
    found["loads while a bundle is replaced"] = readers
    for how, cut in (("a bit changed", False), ("truncated", True)):
        found[f"file of a bundle, {how}"] = partial(damaged_bundle, cut=cut)
        found[f"plan, {how}"] = partial(damaged_plan, cut=cut)
        found[f"file of an interrupted export, {how}"] = partial(damaged_export, cut=cut)
        found[f"file of an interrupted search, {how}"] = partial(damaged_search, cut=cut)
        found[f"engine or list of engines, {how}"] = partial(damaged_engines, cut=cut)
    found["field of a plan replaced"] = bad_plan_fields
    found["field of a manifest replaced"] = partial(bad_manifest_fields, sealed=False)
    found["field of a manifest replaced and sealed"] = partial(bad_manifest_fields, sealed=True)
    return found
