"""Take packages over from the bundle that an export replaces, where their graphs are the same.

A package holds no weights: a model of other weights, or another plan, may need equal ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ditfastattn.core.errors import ConfigError, FileError
from ditfastattn.core.files import open_regular, standing
from ditfastattn.runtime.bundle.manifest import read_manifest


@dataclass(frozen=True)
class EarlierPackage:
    """Hold where a package is, and the hash of its content."""

    path: Path
    sha256: str

    def content(self) -> bytes | None:
        """Return its content, None if the file is gone or was changed."""
        try:
            with open_regular(self.path, "an earlier package") as file:
                content = file.read()
        except FileError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self.sha256 else None


def earlier_packages(folder: Path) -> dict[str, EarlierPackage]:
    """Return the packages of the bundle in ``folder`` by the key of what each was compiled from."""
    root = standing(folder)
    try:
        manifest = read_manifest(root)
    except ConfigError:  # there is none, or it is damaged and will be replaced
        return {}
    packages = manifest.packages.files if manifest.packages else {}
    return {
        spec.key: EarlierPackage(root / file, manifest.files[file].sha256)
        for file, spec in packages.items()
        if spec.key
    }
