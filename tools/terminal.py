"""Write to the terminal, and show text as it is.

Rich drops ``[onnx]`` from a string as a tag, raises an error at ``[/x]``, and replaces ``:smile:``
by a picture. Names, paths and messages may hold all of these, so consoles, progress bars and
spinners are made here and nowhere else, with those parsers off. For styled text, print a
``rich.text.Text``.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that parses neither markup nor emoji codes."""
    return Console(stderr=stderr, markup=False, emoji=False, log_path=False)


class Advance(Protocol):
    """Advance a progress bar, and set its ``total`` if one is given."""

    def __call__(self, description: str, done: float, total: float | None = None) -> None:
        """Show ``description`` beside the bar at ``done``."""


@contextmanager
def progress_bar(
    console: Console, description: str, total: float | None = 1.0, percentage_of: str = ""
) -> Generator[Advance]:
    """Show a progress bar, and yield a function that advances it, or raises a Ctrl-C that was lost.

    Args:
        console: where to show it.
        description: what is done first.
        total: where the bar ends; None if that is not yet known.
        percentage_of: what the bar measures, shown with a percentage; "" shows none.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    if percentage_of:
        shown = "{task.percentage:3.0f}% of {task.fields[whole]}"
        columns.append(TextColumn(shown, markup=False))
    progress = Progress(*columns, TimeElapsedColumn(), console=console)
    with _interrupts_noticed() as raise_lost, progress as bar:
        task = bar.add_task(description, total=total, whole=percentage_of)

        def advance(description: str, done: float, total: float | None = None) -> None:
            raise_lost()
            bar.update(task, description=description, completed=done, total=total)

        yield advance


@contextmanager
def _interrupts_noticed() -> Generator[Callable[[], None]]:
    """Yield a function that raises a Ctrl-C again that was lost.

    Python drops an exception that is raised in a finalizer, or in a callback from C code that looks
    at no errors. A Ctrl-C that comes at such a time would do nothing.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    def raise_lost() -> None:
        if pressed:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_lost
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield raise_lost
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def spinner(console: Console, text: str) -> Generator[Callable[[str], None]]:
    """Show a spinner, and yield a function that changes its text."""
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def duration(seconds: float) -> str:
    """Return ``seconds`` in words, in minutes from a minute and a half on."""
    return f"{seconds:.0f} s" if seconds < 90.0 else f"{seconds / 60.0:.1f} minutes"


def print_json(data: Any) -> None:
    """Print ``data`` as JSON on standard output; an infinite number is its name."""
    print(json.dumps(finite(data), indent=1, default=str))


def finite(data: Any) -> Any:
    """Return JSON data without infinite numbers, which JSON does not know, but their names."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, Mapping):
        return {key: finite(item) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(item) for item in data]
    return data
