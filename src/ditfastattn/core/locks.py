"""Let one process at a time write to a place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import naming_faults


@contextmanager
def sole_writer(
    lock_file: Path, where: Path, what: str, remedy: str = "", *, remove: bool = False
) -> Generator[int]:
    """Hold ``lock_file`` while writing to ``where``, wait for nobody; then ``remove`` it or not.

    Yields:
        The lock's descriptor. A child process that inherits it holds the lock as long as it lives,
        even if its parent is killed.

    Raises:
        ConfigError: ``what``: another process holds it.
        FileError: the lock cannot be made.
    """
    with naming_faults(lock_file, "cannot lock the file"):
        handle = _acquire(lock_file)
    if handle is None:
        raise ConfigError(what, where=str(where), remedy=remedy)
    try:
        yield handle
    finally:
        if remove:  # while it is held: who has opened it meanwhile finds that it lost its name
            lock_file.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # for processes forked from this one too
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """Return a descriptor that locks the file named ``path``, or None if another one does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it before it was locked here


def _is_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
