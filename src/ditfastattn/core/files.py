"""Read regular files, and write files so that a path holds the old content or all of the new.

Every file of ours is written here: to a temporary name, to the disk, then to its place. What a
killed process has left under a temporary name is removed by the next writer in that folder.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from ditfastattn.core.errors import FileError

_SUFFIX: Final = ".ditfastattn"  # of temporary names: .plan.json.k2jx81d0.ditfastattn
_HERE: Final = -100  # AT_FDCWD
_EXCHANGE: Final = 2  # RENAME_EXCHANGE
_UNSUPPORTED: Final = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP)
_REMEDIES: Final = {
    errno.ENOSPC: "free space on the disk, then run it again",
    errno.EDQUOT: "free space within the disk quota, then run it again",
    errno.EACCES: "choose a place that this user may write to",
    errno.EPERM: "choose a place that this user may write to",
    errno.EROFS: "choose a place that can be written to",
}


@contextmanager
def naming_faults(path: Path, what: str = "cannot write the file") -> Generator[None]:
    """Turn an ``OSError`` within the block into a ``FileError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise FileError(what, where=str(path), got=error, remedy=remedy) from error


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary file beside ``path``, which takes its place unless the block fails.

    Raises:
        FileError: it cannot be written: the disk is full, the folder is read-only, and so on.
    """
    with temporary_beside(path) as temporary, naming_faults(path):
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # temporary files are private
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8."""
    write_bytes_atomically(path, text.encode())


@contextmanager
def temporary_beside(path: Path) -> Generator[Path]:
    """Yield an empty temporary file in the folder of ``path``, which is removed in the end.

    It is locked meanwhile: that tells it from what killed processes have left.
    """
    with naming_faults(path):
        make_folder(path.parent)
        sweep(path.parent)
        temporary, handle = _locked_temporary(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _locked_temporary(path: Path) -> tuple[Path, int]:
    while True:
        handle, name = tempfile.mkstemp(_SUFFIX, f".{path.name[:100]}.", path.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return Path(name), handle
        os.close(handle)  # swept before it was locked


def sweep(folder: Path) -> None:
    """Remove the temporary files in ``folder`` whose writers were killed."""
    for left in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is being written
            left.unlink()


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it where they are missing.

    Raises:
        FileError: it cannot be made.
    """
    with naming_faults(folder, "cannot make the folder"):
        folder.mkdir(parents=True, exist_ok=True)


def sync(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of ``path``, and remove what was there.

    Both names change by one rename, so that ``path`` always holds one of the two. Some file systems
    cannot do that; there ``path`` is absent for a moment, and ``standing`` returns the old one.

    Raises:
        FileError: it cannot be put there.
    """
    with naming_faults(path, "cannot replace the folder"):
        sync(new)
        old = _set_aside(path)
        if not path.exists():
            os.replace(new, path)
        elif exchange(new, path):
            old = new
        else:
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(new, path)
        sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names by one rename; return whether the file system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = _HERE, os.fsencode(first), _HERE, os.fsencode(second)
    if rename(*names, _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(second))
    return False


def standing(path: Path) -> Path:
    """Return ``path``, or where its folder stands if replacing it was interrupted."""
    old = _set_aside(path)
    return old if not os.path.lexists(path) and os.path.isdir(old) else path


def _set_aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def open_regular(path: Path, what: str, remedy: str = "") -> BinaryIO:
    """Open a file to read; ``what`` is said if that fails.

    Raises:
        FileError: it is missing or not a regular file, such as a pipe that nobody writes to.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a null byte
        raise FileError(what, where=repr_path(path), got=error, remedy=remedy) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(
            what,
            where=repr_path(path),
            got="a folder, a pipe or a device",
            expected="a regular file",
            remedy=remedy,
        )
    return os.fdopen(handle, "rb")


def repr_path(path: Path) -> str:
    """Return ``path`` as text that fits a message, whatever its name holds."""
    text = str(path)
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 300 else f"{shown[:150]}...{shown[-140:]}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
