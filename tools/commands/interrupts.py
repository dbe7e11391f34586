"""Say after an interrupt (Ctrl-C) what is kept, and how to resume."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

INTERRUPTED = 130  # what shells report of a command that Ctrl-C has ended


@contextmanager
def resumable(kept: str) -> Generator[None]:
    """Where the work is interrupted, say that ``kept``, and by which command it resumes."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.secho(f"interrupted: {kept}; to resume, run: {_command_line()}", err=True, fg="red")
        raise SystemExit(INTERRUPTED) from error


def _command_line() -> str:
    """Return this command as it was typed, without ``--restart``, which would discard its work."""
    words = [word for word in sys.argv[1:] if word != "--restart"]
    return shlex.join([Path(sys.argv[0]).name, *words])
