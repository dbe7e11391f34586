"""Inject faults into calibrate, export, build and load, and count what becomes of them.

    python -m ditfastattn.tools.faults.run --out benchmarks/faults.md

A fault is *survived* if what follows is right, or an error that says what is wrong (a
``ConfigError`` or ``EngineError``); *raw* if it ends in another exception; *wrong* if the result
is not what it should be, or something is left behind. Raw and wrong must be 0.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from ditfastattn.core.files import write_text_atomically
from ditfastattn.tools.faults.scene import Scene
from ditfastattn.tools.faults.scenes import scenes
from ditfastattn.tools.measure import machine

app = typer.Typer(pretty_exceptions_enable=False)
Counts = dict[str, Counter[str]]
_KINDS = ("survived", "raw", "wrong")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="File for the table.")] = Path("benchmarks/faults.md"),
    trials: Annotated[int, typer.Option(help="Trials of each random kind.")] = 200,
    only: Annotated[str, typer.Option(help="Parts of the names of kinds, ';' between.")] = "",
) -> None:
    """Run all kinds of faults, and write the table. Exit with 1 if some were raw or wrong.

    With ``--only``, the other rows of a table that is there stay.
    """
    torch.set_num_threads(1)  # processes are forked
    found = counted(trials, only, typer.echo)
    known = recorded(out.read_text(encoding="utf-8")) if only and out.exists() else {}
    write_text_atomically(out, as_markdown(known | found, trials))
    if any(counts["raw"] or counts["wrong"] for counts in found.values()):
        raise typer.Exit(1)


def counted(trials: int, only: str, tell: Callable[[str], object]) -> Counts:
    """Return how often each kind of fault ended how."""
    found: Counts = {}
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), random.Random(0), trials)
        for name, play in scenes().items():
            if any(part.strip() in name for part in only.split(";")):
                began = time.monotonic()
                found[name] = Counter(play(scene))
                tell(f"{name}: {dict(found[name])}, {time.monotonic() - began:.0f} s")
    return found


def recorded(table: str) -> Counts:
    """Return the counts that a table holds."""
    rows = re.findall(r"^\| (.+) \| \d+ \| (\d+) \| (\d+) \| (\d+) \|$", table, re.M)
    return {
        name: Counter(dict(zip(_KINDS, map(int, counts), strict=True))) for name, *counts in rows
    }


def as_markdown(found: Counts, trials: int) -> str:
    """Return the table."""
    rows = [
        f"| {' | '.join([name, str(counts.total()), *(str(counts[kind]) for kind in _KINDS)])} |"
        for name, counts in found.items()
    ]
    about = machine()
    return "\n".join(
        [
            "# Faults",
            "",
            f"`python -m ditfastattn.tools.faults.run --trials {trials}` on "
            f"{about['device']}, torch {about['torch']}. A fault is *survived* if what follows is "
            "right or a clear error, *raw* if it ends in another exception, *wrong* if the result "
            "is not what it should be, or something is left behind.",
            "",
            "| fault | trials | survived | raw | wrong |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    app()
