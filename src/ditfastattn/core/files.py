"""Write files so that a path holds either the old content or all of the new, by one writer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ditfastattn.core.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary file beside ``path``, renamed into place unless the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def sole_writer(
    lock_file: Path, where: Path, what: str, remedy: str = "", *, remove: bool = False
) -> Generator[None]:
    """Hold ``lock_file`` while writing to ``where``, wait for nobody; then ``remove`` it or not.

    Raises:
        ConfigError: ``what``: another process holds it.
    """
    lock = FileLock(lock_file, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(what, where=str(where), remedy=remedy) from error
    try:
        yield
    finally:
        lock.release()
        if remove:
            lock_file.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
