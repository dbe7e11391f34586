"""Manage the folder in which a bundle is written, so that an interrupted export can resume."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ditfastattn.core.errors import ConfigError, VerifyError
from ditfastattn.core.files import sole_writer, write_text_atomically
from ditfastattn.export.weights import Weights
from ditfastattn.runtime.bundle.manifest import MANIFEST

WEIGHTS_FILE: Final = "weights.bin"
_STATE: Final = "partial.json"


@dataclass
class PartialBundle:
    """Track which files are complete; ``request`` identifies what is exported."""

    folder: Path
    request: str
    done: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take over what an interrupted export of the same request has written."""
        state = self._read()
        if state.get("request") != self.request:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            state = {}
        self.done = dict(state.get("done", {}))
        self.weights = Weights.resumed(
            self.folder / WEIGHTS_FILE, WEIGHTS_FILE, state.get("weights", {})
        )

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.folder / _STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        whole = (self.folder / WEIGHTS_FILE).is_file()
        size = (self.folder / WEIGHTS_FILE).stat().st_size if whole else -1
        return state if size >= state["weights"]["size"] else {}

    def has(self, file: str, key: str) -> bool:
        """Return whether ``file`` is complete, for the graph of this ``key``."""
        return self.done.get(file) == key and (self.folder / file).is_file()

    def keep(self, file: str, key: str) -> None:
        """Record that ``file`` and its weights are complete."""
        self.weights.flush()
        self.done[file] = key
        state = {"request": self.request, "done": self.done, "weights": self.weights.state()}
        write_text_atomically(self.folder / _STATE, json.dumps(state))

    def close(self) -> None:
        """End writing; only the bundle's own files remain."""
        self.weights.close()
        (self.folder / _STATE).unlink(missing_ok=True)

    def put_in_place(self, out: Path) -> None:
        """Move the bundle to ``out``, in place of a bundle that is there."""
        if not out.exists():
            os.replace(self.folder, out)
            return
        old = _old(out)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(self.folder, out)
        shutil.rmtree(old)


def _old(out: Path) -> Path:
    """Return where the bundle at ``out`` stays while another takes its place."""
    return out.parent / f".{out.name}.old"


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
    out.parent.mkdir(parents=True, exist_ok=True)
    lock, folder = (out.parent / f".{out.name}.{kind}" for kind in ("lock", "partial"))
    what = "another export is writing this bundle"
    remedy = "wait for it, stop it, or export to another folder"
    with sole_writer(lock, out, what, remedy, remove=True):
        if not out.exists() and _old(out).exists():
            os.replace(_old(out), out)  # an export was interrupted between two renames
        try:
            yield folder
        except (ConfigError, VerifyError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
