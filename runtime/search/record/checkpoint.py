"""Keep what a search has measured, so that it resumes if interrupted.

A checkpoint is a folder of small files, each written whole or not at all: what the search is for
(``request.json``) and one file per finished piece of work. A search replays its steps in order; a
piece that is there is read, not measured again. One process at a time holds the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import make_folder
from ditfastattn.core.locks import sole_writer
from ditfastattn.core.strict_json import read_sealed, write_sealed
from ditfastattn.core.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)


class Checkpoint:
    """Remember finished pieces of work; in memory only where ``folder`` is None."""

    def __init__(self, folder: Path | None = None, prefix: str = "") -> None:
        """Use ``open_checkpoint`` for a folder; names in it begin with ``prefix``."""
        self._folder, self._prefix = folder, prefix

    def part(self, name: str) -> Checkpoint:
        """Return what keeps the pieces of a part of the work: they may be named as others are."""
        return Checkpoint(self._folder, f"{self._prefix}{name}-")

    def begin(self, request: Mapping[str, Any]) -> bool:
        """Record what the search is for; return whether there is an unfinished one to resume.

        Raises:
            ConfigError: the folder holds a different search.
        """
        if self._folder is None:
            return False
        path = self._folder / "request.json"
        wanted = json.loads(json.dumps(request, default=str))
        found = _read_json(path) if path.exists() else None
        if found is None:  # what lies there may be another search's
            shutil.rmtree(self._folder, ignore_errors=True)
            make_folder(self._folder)
            write_sealed(path, wanted)
            return False
        differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if differing:
            key = differing[0]
            raise ConfigError(
                "an unfinished search with other arguments is in the way",
                where=f"{path}: {key}",
                got=found.get(key),
                expected=wanted.get(key),
                remedy="finish it with its own arguments, write to another plan file, "
                "or discard it with --restart",
            )
        return True

    def data(self, name: str, make: Callable[[], Any]) -> Any:
        """Return JSON data: what ``name`` holds, or what ``make`` returns, kept."""
        known = self.peek(name)
        if known is not None:
            return known
        made = json.loads(json.dumps(make()))  # the same types, read or made
        self.put(name, made)
        return made

    def peek(self, name: str) -> Any:
        """Return the JSON data kept under ``name``, or None."""
        path = self._path(f"{name}.json")
        return _read_json(path) if path is not None and path.exists() else None

    def put(self, name: str, data: Any) -> None:
        """Keep JSON ``data`` under ``name``."""
        path = self._path(f"{name}.json")
        if path is not None:
            write_sealed(path, data)

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors: what ``name`` holds, or what ``make`` returns, kept."""
        path = self._path(f"{name}.safetensors")
        if path is not None and path.exists():
            try:
                return read_tensors(path)
            except ConfigError as error:
                _warn(error)
        made = make()
        if path is not None:
            write_tensors(path, made)
        return made

    def discard(self) -> None:
        """Remove everything: the search is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._prefix}{name}"


@contextmanager
def open_checkpoint(plan: Path, restart: bool = False) -> Generator[Checkpoint]:
    """Hold the checkpoint of the plan file ``plan``, the folder ``<plan>.search``.

    Raises:
        ConfigError: another process is writing this plan.
    """
    folder = plan.with_name(plan.name + ".search")
    make_folder(plan.parent)
    lock, what = plan.with_name(f".{plan.name}.lock"), "another search is writing this plan"
    with sole_writer(lock, plan, what, "wait for it, stop it, or write to another file"):
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        yield Checkpoint(folder)


def _read_json(path: Path) -> Any:
    try:
        return read_sealed(path, "the checkpoint")
    except ConfigError as error:
        _warn(error)
        return None


def _warn(error: ConfigError) -> None:
    log.warning("ditfastattn: a damaged checkpoint is measured again: %s", error)
