"""Measure what only a GPU can show, the most valuable first, within a given time.

    python -m ditfastattn.tools.gpu_report --minutes 8 --out gpu-report

Each part runs in its own process, within a bound of its own, and writes what it has measured as it
goes. What a part could not do is recorded with the reason. Run again with the same folder, the
report goes on with the parts that are not finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import make_folder, write_text_atomically
from ditfastattn.tools.gpu_report.parts import PARTS, Part, Setting
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

REPORT = "report.json"
_LEAST = 20.0  # seconds: no part begins with less left
_LINES = 3  # of a part's last words

Out = Annotated[Path, typer.Option(help="Folder of the report; an unfinished one is continued.")]
Device = Annotated[str, typer.Option(help="cuda, or cpu to try the script without a GPU.")]
Tiny = Annotated[bool, typer.Option(help="Small models, to try the script.")]


@dataclass(frozen=True)
class Outcome:
    """What became of a part: done, or why not."""

    name: str
    done: bool
    seconds: float = 0.0
    reason: str = ""


@app.callback(invoke_without_command=True)
def report(
    context: typer.Context,
    minutes: Annotated[float, typer.Option(min=0.5, help="Minutes for all parts.")] = 8.0,
    out: Out = Path("gpu-report"),
    device: Device = "cuda",
    tiny: Tiny = False,
    only: Annotated[str, typer.Option(help="Parts, separated by commas; all by default.")] = "",
) -> None:
    """Run the parts that are not finished, in the order of their value."""
    if context.invoked_subcommand is not None:
        return
    chosen = _named(only)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no GPU",
            where="--device cuda",
            remedy="install torch for CUDA, or try the script with --device cpu --tiny",
        )
    make_folder(out)
    console = open_console()
    deadline = time.monotonic() + 60.0 * minutes
    outcomes: list[Outcome] = []
    for name, part in chosen.items():
        console.print(f"{name}: {part.summary}", soft_wrap=True)
        left = deadline - time.monotonic()
        outcomes.append(_run(name, min(left, part.seconds), out, Setting(device, tiny)))
        _write(out, outcomes)
    console.print(_table(outcomes))
    console.print(f"wrote {out}", soft_wrap=True)


def _named(only: str) -> dict[str, Part]:
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(
            "no such part", where="--only", got=", ".join(unknown), expected=", ".join(PARTS)
        )
    return {name: part for name, part in PARTS.items() if name in names}


def _run(name: str, seconds: float, out: Path, setting: Setting) -> Outcome:
    if _finished(out / f"{name}.json"):
        return Outcome(name, True, reason="measured before")
    if seconds < _LEAST:
        return Outcome(name, False, reason="no time was left")
    command = [sys.executable, "-m", "ditfastattn.tools.gpu_report", "part", name]
    command += ["--out", str(out), "--device", setting.device]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if setting.tiny else [])],
            timeout=seconds,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if setting.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, False, seconds, f"not finished within {seconds:.0f} s")
    took = time.monotonic() - began
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-_LINES:]
        return Outcome(name, False, took, " ".join(last) or f"exit code {done.returncode}")
    return Outcome(name, True, took)


def _finished(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found.get("finished"))


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    data = {
        "machine": machine(),
        "command": " ".join(["python -m ditfastattn.tools.gpu_report", *sys.argv[1:]]),
        "parts": [vars(outcome) for outcome in outcomes],
    }
    write_text_atomically(out / REPORT, json.dumps(data, indent=1) + "\n")


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("part", "done", "seconds", "why not")
    for each in outcomes:
        table.add_row(each.name, "yes" if each.done else "no", f"{each.seconds:.0f}", each.reason)
    return table


@app.command(name="part", hidden=True)
def run_part(name: str, out: Out, device: Device, tiny: Tiny = False) -> None:
    """Measure one part, and write it to its file after each measurement."""
    found: dict[str, Any] = {"machine": machine()}
    path = out / f"{name}.json"

    def keep(key: str, value: Any) -> None:
        found[key] = value
        write_text_atomically(path, json.dumps(found, indent=1) + "\n")

    PARTS[name].measure(Setting(device, tiny), out, keep)
    keep("finished", True)
