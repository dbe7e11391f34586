"""Let a process fail at its n-th change of the disk: killed, or with no space left."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_RENAMES: Final = ("os.rename", "os.mkdir", "os.link", "os.truncate")
_REMOVALS: Final = ("os.remove", "os.rmdir")


class Disk:
    """Count the changes of files in a folder, and act at one of them."""

    def __init__(self) -> None:
        """Watch nothing yet; a process can be given only one of these."""
        self._inside = ""
        self._count = 0
        self._at = -1
        self._act: Callable[[], None] = _kill
        self._removals = True
        self._sync = os.fsync
        setattr(os, "fsync", self._synced)  # noqa: B010  # no function has its type
        sys.addaudithook(self._heard)

    @contextmanager
    def failing(self, folder: Path, at: int, full: bool) -> Generator[None]:
        """Fail at change number ``at``: no space left if ``full``, else the process is killed."""
        self._inside, self._count, self._at = str(folder), 0, at
        self._act, self._removals = (_full, False) if full else (_kill, True)
        try:
            yield
        finally:
            self._inside = ""

    def changes(self, folder: Path, full: bool, work: Callable[[], object]) -> int:
        """Return how many changes of ``folder`` undisturbed ``work`` makes."""
        with self.failing(folder, sys.maxsize, full):
            work()
        return self._count

    @property
    def reached(self) -> bool:
        """Return whether the last change to fail at has come."""
        return self._count > self._at

    def _synced(self, handle: Any) -> None:
        self._changed()
        self._sync(handle)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._inside:
            return
        changes = event in _RENAMES or (self._removals and event in _REMOVALS)
        if event == "open" and isinstance(args[2], int):
            changes = bool(args[2] & _WRITES)
        named = isinstance(args[0], (str, bytes, os.PathLike)) if args else False
        if changes and named and os.fsdecode(args[0]).startswith(self._inside):
            self._changed()

    def _changed(self) -> None:
        if not self._inside:
            return
        self._count += 1
        if self._count == self._at + 1:
            self._act()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a copy of this process; return its exit status, 9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def children_of(process: int) -> list[int]:
    """Return the processes that the main thread of ``process`` has started."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    except OSError:  # it has ended
        return []
    return [int(child) for child in listed.split()]


def flipped(content: bytes, bit: int) -> bytes:
    """Return ``content`` with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
