"""Files are written whole or not at all; what a killed writer leaves is swept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ditfastattn.core import files
from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import (
    exchange,
    open_regular,
    replace_folder,
    replacing,
    standing,
    write_text_atomically,
)
from ditfastattn.core.locks import sole_writer

ROOT = Path(__file__).parents[2]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_text_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"plan\.json: cannot write(.|\n)*No space(.|\n)*free sp"):
        write_text_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["plan.json"]


def test_a_place_that_is_not_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot make the folder"):
        write_text_atomically(tmp_path / "file" / "plan.json", "new")


def test_content_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        seen.append("sync")
        sync(handle)

    def renamed(old: Path, new: Path) -> None:
        seen.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text_atomically(tmp_path / "plan.json", "new")
    assert seen == ["sync", "rename", "sync"]  # the file; its folder


KILLED = """
import os, signal, sys
from pathlib import Path
from ditfastattn.core.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(left_in(tmp_path)) == 1
    (tmp_path / ".hidden").write_text("mine")
    with replacing(tmp_path / "plan.json") as temporary:
        temporary.write_text("first")
        write_text_atomically(tmp_path / "other.json", "{}")
        assert temporary.read_text() == "first"
    assert (tmp_path / "plan.json").read_text() == "first"
    assert left_in(tmp_path) == [".hidden", "other.json", "plan.json"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced(swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    for number in ("1", "2"):
        new = tmp_path / ".out.partial"
        new.mkdir()
        (new / "content").write_text(number)
        replace_folder(new, tmp_path / "out")
        assert (tmp_path / "out" / "content").read_text() == number
        assert left_in(tmp_path) == ["out"]


def test_a_folder_is_there_at_every_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one rename or two: a reader always finds the old folder or the new one."""
    rename = os.replace
    missing: list[Path] = []

    def watched(*names: Path) -> None:
        rename(*names)
        if not (standing(out) / "content").exists():
            missing.append(names[0])

    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", watched)
    swaps: list[Callable[..., bool]] = [exchange, lambda *_: False]
    for index, swap in enumerate([*swaps, *swaps]):
        monkeypatch.setattr(files, "exchange", swap)
        new = tmp_path / "new"
        new.mkdir()
        (new / "content").write_text(str(index))
        replace_folder(new, out)
    assert missing == []


def test_a_pipe_a_loop_and_a_name_too_long_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "x" * 300, "a\0b", "absent", "."):
        with pytest.raises(ConfigError, match="cannot read it"):
            open_regular(tmp_path / name, "cannot read it")


def lock(path: Path) -> ExitStack:
    """Enter, and stay inside until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(sole_writer(path, path, "taken", remove=True))
    return stack


def test_nobody_enters_by_a_lock_that_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are never inside: who comes while the holder leaves, and who comes after."""
    path, inside = tmp_path / ".lock", list[ExitStack]()
    unlink = Path.unlink

    def entering(self: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        with suppress(ConfigError):
            inside.append(lock(path))
        unlink(self, missing_ok)

    holder = lock(path)
    monkeypatch.setattr(Path, "unlink", entering)
    holder.close()
    with suppress(ConfigError):
        inside.append(lock(path))
    assert len(inside) == 1
    inside[0].close()
    assert left_in(tmp_path) == []


def test_who_waits_for_a_lock_that_is_removed_takes_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    holder, opened = lock(path), os.open

    def leaving(name: str, *args: int) -> int:
        handle = opened(name, *args)
        monkeypatch.setattr(os, "open", opened)
        holder.close()  # between its opening the file and its locking it
        return handle

    monkeypatch.setattr(os, "open", leaving)
    with lock(path), pytest.raises(ConfigError, match="taken"):
        lock(path)


HOLDING = """
import subprocess, sys
from pathlib import Path
from ditfastattn.core.locks import sole_writer
path = Path(sys.argv[1])
with sole_writer(path, path, "taken") as handle:
    child = subprocess.Popen(["sleep", "60"], pass_fds=(handle,))
    print(child.pid, flush=True)
    child.wait()
"""


def test_a_worker_whose_parent_was_killed_still_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDING, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            with pytest.raises(ConfigError, match="taken"):
                lock(path)
        finally:
            os.kill(worker, signal.SIGKILL)
