"""Open a bundle's files once, so that what runs is what was checked.

Another process may replace the bundle, or write to its files, at any time. Each file is opened, and
hashed through the same mapping that the runtime will read; no file is opened by its name again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import naming_faults, open_regular, repr_path, standing
from ditfastattn.runtime.bundle.manifest import (
    EXPORT_AGAIN,
    MANIFEST,
    Format,
    Manifest,
    parse_manifest,
    read_manifest_text,
)
from ditfastattn.runtime.bundle.specs import FileSpec

_COPY_AGAIN: Final = "copy the bundle again, or export it again"
_OTHER_RUNTIME: Final = {
    Format.ONNX: 'load it with runtime="onnx", or export it again (--format pt2)',
    Format.PT2: 'load it with runtime="aoti", or export it again (--format onnx)',
}
_TRIES: Final = 5  # a bundle may be replaced while it is read


@dataclass(frozen=True)
class _OpenFile:
    path: Path
    file: BinaryIO
    content: mmap.mmap | bytes
    written: tuple[int, int]

    @property
    def unchanged(self) -> bool:
        """Return whether nobody has written to the file since it was opened."""
        return _written(os.fstat(self.file.fileno())) == self.written

    @property
    def in_place(self) -> bool:
        """Return whether the file's name still stands for it."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False


class OpenBundle:
    """Hold a bundle's manifest and its files, open and checked."""

    def __init__(self, root: Path) -> None:
        """Open the bundle that stands in ``root``; see ``open_bundle``."""
        self.root = root
        text = read_manifest_text(root)
        self.manifest: Manifest = parse_manifest(text, repr_path(root / MANIFEST))
        self.manifest_sha256 = hashlib.sha256(text.encode()).hexdigest()
        inside = Path(os.path.realpath(root))
        files = self.manifest.files.items()
        # All are opened before the first is hashed, which takes its time.
        self._files = {name: _open(root / name, inside, spec) for name, spec in files}
        for name, spec in files:
            _check_hash(self._files[name], spec)

    def content(self, name: str) -> mmap.mmap | bytes:
        """Return the content of a file of the bundle, which was checked."""
        return self._files[name].content

    def opened(self, name: str) -> str:
        """Return a path that opens the file that was checked, whatever has its name by now.

        It serves for as long as this object holds the file.
        """
        return f"/proc/self/fd/{self._files[name].file.fileno()}"

    def path(self, name: str) -> Path:
        """Return where a file was found, for messages: it may be another file by now."""
        return self._files[name].path

    def check_unchanged(self) -> None:
        """Raise ``ConfigError`` if a file was written to since it was checked."""
        for opened in self._files.values():
            if not opened.unchanged:
                raise _changed(opened.path)

    def check_in_place(self) -> None:
        """Raise ``ConfigError`` if a file was written to, or another has taken its place."""
        self.check_unchanged()
        for opened in self._files.values():
            if not opened.in_place:
                raise _changed(opened.path)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all other files: they will not be read again."""
        self._files = {name: opened for name, opened in self._files.items() if name in names}


def open_bundle(folder: str | os.PathLike[str], wanted: Format = Format.ONNX) -> OpenBundle:
    """Open the bundle in ``folder``, and compare its files with its manifest.

    A bundle that is replaced meanwhile is opened again: its files are those of one bundle.

    Raises:
        ConfigError: there is none, or a file is absent, out of the bundle, truncated or changed; or
            its graphs are not written as ``wanted``.
    """
    opened = _open_standing(folder)
    found = opened.manifest.format
    if found is not wanted:
        raise ConfigError(
            f"this runtime runs bundles in the format {wanted}",
            where=repr_path(opened.root),
            got=found,
            expected=wanted,
            remedy=_OTHER_RUNTIME[found],
        )
    return opened


def _open_standing(folder: str | os.PathLike[str]) -> OpenBundle:
    for _ in range(_TRIES - 1):
        root = standing(Path(folder))
        before = _identity(root)
        try:
            return OpenBundle(root)
        except ConfigError:
            if before == _identity(standing(Path(folder))):
                raise
    return OpenBundle(standing(Path(folder)))


def _identity(root: Path) -> object:
    try:
        found = os.stat(root), os.stat(root / MANIFEST)
    except (OSError, ValueError):
        return None
    return root, [(stat.st_dev, stat.st_ino, stat.st_mtime_ns) for stat in found]


def _open(path: Path, inside: Path, spec: FileSpec) -> _OpenFile:
    found = Path(os.path.realpath(path))
    if inside not in found.parents:
        raise ConfigError(
            "the file lies outside the bundle", where=repr_path(path), got=found, expected=inside
        )
    if not os.path.lexists(path):
        raise ConfigError("the file is missing", where=repr_path(path), remedy=EXPORT_AGAIN)
    file = open_regular(path, "cannot read the file", EXPORT_AGAIN)
    stat = os.fstat(file.fileno())
    if stat.st_size != spec.bytes:
        raise ConfigError(
            "the file is incomplete",
            where=str(path),
            got=f"{stat.st_size} bytes",
            expected=f"{spec.bytes} bytes",
            remedy=_COPY_AGAIN,
        )
    with naming_faults(path, "cannot read the file"):
        # An empty file cannot be mapped.
        content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if spec.bytes else b""
    return _OpenFile(path, file, content, _written(stat))


def _check_hash(opened: _OpenFile, spec: FileSpec) -> None:
    found = hashlib.sha256(opened.content).hexdigest()
    if found != spec.sha256:
        raise ConfigError(
            "the file has changed since it was exported",
            where=str(opened.path),
            got=f"sha256 {found}",
            expected=f"sha256 {spec.sha256}",
            remedy=_COPY_AGAIN,
        )


def _written(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> ConfigError:
    return ConfigError(
        "the file was changed or replaced while the bundle was in use",
        where=str(path),
        expected="the file that was checked",
        remedy="run it again, and let only `ditfastattn export` replace a bundle that is in use",
    )
