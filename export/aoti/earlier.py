"""Take packages over from the bundle that an export replaces, where their graphs are the same.

A package holds no weights: a model of other weights, or another plan, may need equal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.manifest import MANIFEST, Format


@dataclass(frozen=True)
class EarlierPackages:
    """Hold the packages of a bundle by the key of what each was compiled from."""

    bundle: OpenBundle | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def content(self, key: str) -> bytes | None:
        """Return the package of this key, None if there is none."""
        file = self.files.get(key)
        return None if file is None or self.bundle is None else bytes(self.bundle.content(file))


def earlier_packages(folder: Path) -> EarlierPackages:
    """Return the packages of the bundle in ``folder``; none if there is no whole bundle of them."""
    if not (folder / MANIFEST).is_file():
        return EarlierPackages()
    try:
        bundle = open_bundle(folder, Format.PT2)
    except ConfigError:  # it is replaced: that it is damaged, or of another format, does not matter
        return EarlierPackages()
    packages = bundle.manifest.packages
    files = packages.files if packages else {}
    return EarlierPackages(bundle, {spec.key: file for file, spec in files.items() if spec.key})
