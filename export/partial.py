"""Manage the folder in which a bundle is written, so that an interrupted export can resume."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from ditfastattn.core.errors import ConfigError, FileError, VerifyError
from ditfastattn.core.files import (
    make_folder,
    naming_faults,
    replace_folder,
    standing,
)
from ditfastattn.core.locks import sole_writer
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import read_sealed, write_sealed
from ditfastattn.export.weights import Stored, Weights
from ditfastattn.runtime.bundle.manifest import MANIFEST, file_hash

log = logging.getLogger(__name__)

WEIGHTS_FILE: Final = "weights.bin"
_STATE: Final = "partial.json"


class _Done(Record, frozen=True):
    """Record a graph that is complete: the ``key`` of what it was made from, and its content."""

    key: str
    sha256: str


class _State(Record, frozen=True):
    """Record how far an export has come; ``request`` identifies what is exported."""

    request: str
    done: dict[Annotated[str, Field(pattern=r"^\w+\.(onnx|pt2|json)$")], _Done]
    weights: Stored


@dataclass
class PartialBundle:
    """Track which files are complete; ``request`` identifies what is exported."""

    folder: Path
    request: str
    done: dict[str, _Done] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take over what an interrupted export of the same request has written."""
        state = self._read()
        weights = self.folder / WEIGHTS_FILE
        if state is None or state.request != self.request or not state.weights.holds(weights):
            state = None
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder)
        self.done = dict(state.done) if state else {}
        self.weights = Weights.resumed(weights, WEIGHTS_FILE, state.weights if state else None)

    def _read(self) -> _State | None:
        path = self.folder / _STATE
        if not os.path.lexists(path):
            return None
        try:
            state = read_sealed(path, "the state of the export")
            return _State.from_json(state, str(path), "")
        except ConfigError as error:
            log.warning("ditfastattn: an interrupted export cannot resume: %s", error)
            return None

    def has(self, file: str, key: str) -> bool:
        """Return whether ``file`` is complete, for the graph of this ``key``."""
        done, path = self.done.get(file), self.folder / file
        if done is None or done.key != key or not path.is_file():
            return False
        return file_hash(path) == done.sha256

    def keep(self, file: str, key: str) -> None:
        """Record that ``file`` and its weights are complete."""
        self.weights.sync()
        self.done[file] = _Done(key=key, sha256=file_hash(self.folder / file))
        state = _State(request=self.request, done=self.done, weights=self.weights.stored())
        write_sealed(self.folder / _STATE, state.model_dump(mode="json"))

    def close(self) -> None:
        """End writing weights."""
        self.weights.sync()
        self.weights.close()

    def put_in_place(self, out: Path, files: Collection[str]) -> None:
        """Move the bundle, which consists of ``files``, to ``out``, and replace what is there."""
        with naming_faults(self.folder, "cannot clear the folder"):
            for path in self.folder.iterdir():
                if path.name not in files:
                    path.unlink()  # what killed exports left, and how far this one had come
        replace_folder(self.folder, out)


@contextmanager
def partial_folder(out: Path) -> Generator[Path]:
    """Yield the folder in which the bundle for ``out`` is written.

    It is kept if the export is interrupted, and removed if the export is refused.

    Raises:
        ConfigError: what is at ``out`` is not a bundle, or another export is writing.
    """
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (out / MANIFEST).is_file():
        raise ConfigError(
            "what is there is not a bundle",
            where=str(out),
            expected="a folder that is absent, empty or a bundle",
            remedy="choose another folder",
        )
    make_folder(out.parent)
    lock, folder = (out.parent / f".{out.name}.{kind}" for kind in ("lock", "partial"))
    what = "another export is writing this bundle"
    remedy = "wait for it, stop it, or export to another folder"
    with sole_writer(lock, out, what, remedy, remove=True):
        left = standing(out)
        if left != out:
            with naming_faults(out, "cannot put back the bundle"):
                os.replace(left, out)  # an export was interrupted between two renames
        try:
            yield folder
        except FileError:
            raise  # a full disk interrupts an export, which resumes
        except (ConfigError, VerifyError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
