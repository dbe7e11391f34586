"""Report a benchmark: JSON, tables, and figures of fidelity against speedup."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ditfastattn.tools.bench.harness import Bench
from ditfastattn.tools.bench.setup import EAGER, OURS, Data, Group
from ditfastattn.tools.figures import curves
from ditfastattn.tools.measure import machine

SSIM_LEVELS = (0.85, 0.9, 0.95, 0.98, 0.99)
_LIBRARIES = ("ditfastattn", "torch", "diffusers", "cache-dit")


def versions() -> dict[str, str]:
    """Return the versions of the compared libraries; "absent" if one is not installed."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def records_of(groups: Sequence[Group]) -> list[Data]:
    """Return the records of all contenders; their name in the JSON is ``lanes``."""
    return [record for group in groups for record in group["lanes"]]


def failures_of(groups: Sequence[Group]) -> list[Data]:
    """Return the contenders that could not be measured, with reasons."""
    return [failure for group in groups for failure in group["failures"]]


def best_at(records: Sequence[Data], level: float) -> dict[str, Data | None]:
    """Return the fastest contender, ours and a peer's, with a mean SSIM of at least ``level``.

    Nothing is interpolated: None if no measured contender reaches the level.
    """
    good = [record for record in records if record["ssim"] >= level and record["method"] != EAGER]
    return {
        "ours": _fastest([record for record in good if record["method"] == OURS]),
        "peer": _fastest([record for record in good if record["method"] != OURS]),
    }


def _fastest(records: Sequence[Data]) -> Data | None:
    if not records:
        return None
    best = max(records, key=lambda record: float(record["speedup"]["median"]))
    kept = {key: best[key] for key in ("method", "setting", "form", "ssim", "worst_ssim", "psnr")}
    return {**kept, "speedup": best["speedup"]["median"]}


def as_json(bench: Bench, groups: Sequence[Group]) -> Data:
    """Return the record of a run as JSON data."""
    records, setup = records_of(groups), bench.setup
    return {
        "model": setup.model.name,
        "weights": "trained" if setup.model.trained else "random: fidelity means nothing",
        "steps": setup.options.steps,
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["ditfastattn", *sys.argv[1:]]),
        "repetitions": setup.options.repetitions,
        "seeds": [prompt.seed for prompt in setup.prompts],
        "seconds": sum(group["seconds"] for group in groups),
        "lowering": setup.options.lowering,
        "dense_compile_seconds": bench.dense_compile_seconds,
        "best": [{"min_ssim": level, **best_at(records, level)} for level in SSIM_LEVELS]
        if setup.model.trained
        else [],
        "lanes": records,
        "forms": {group["method"]: group["forms"] for group in groups if "forms" in group},
        "failures": failures_of(groups),
    }


def show(console: Console, data: Data) -> None:
    """Print the tables."""
    console.print(contender_table(data))
    for failure in data["failures"]:
        named = " ".join(part for part in (failure["method"], failure["setting"]) if part)
        console.print(f"not measured: {named}: {failure['reason']}", soft_wrap=True)
    if data["best"]:
        console.print(best_table(data))


def contender_table(data: Data) -> Table:
    """Return a row per contender."""
    table = Table(title=f"{data['model']}, {data['steps']} steps, against the compiled dense model")
    for heading in ("method", "setting", "form"):
        table.add_column(heading)
    for heading in ("speedup", "quartiles", "SSIM", "worst", "PSNR", "compile"):
        table.add_column(heading, justify="right")
    for record in data["lanes"]:
        speedup = record["speedup"]
        table.add_row(
            record["method"],
            record["setting"],
            record["form"],
            f"{speedup['median']:.2f}x",
            f"{speedup['lower_quartile']:.2f}-{speedup['upper_quartile']:.2f}",
            f"{record['ssim']:.4f}",
            f"{record['worst_ssim']:.4f}",
            f"{record['psnr']:.1f} dB",
            f"{record['compile_seconds']:.0f} s",
        )
    generations = f"medians of {data['repetitions']} generations, each of another prompt"
    table.caption = f"weights: {data['weights']}; {generations}"
    return table


def best_table(data: Data) -> Table:
    """Return the fastest of ours and of the peers at each SSIM level."""
    table = Table(title="fastest measured point at a mean SSIM")
    table.add_column("SSIM at least", justify="right")
    table.add_column("ditfastattn", justify="right")
    table.add_column("best peer", justify="right")
    table.add_column("which")
    for row in data["best"]:
        ours, peer = row["ours"], row["peer"]
        table.add_row(
            f"{row['min_ssim']:g}",
            f"{ours['speedup']:.2f}x" if ours else "none",
            f"{peer['speedup']:.2f}x" if peer else "none",
            f"{peer['method']}, {peer['setting']}" if peer else "",
        )
    return table


def draw(data: Data, ssim: Path, psnr: Path) -> None:
    """Draw fidelity against speedup, a line per method."""
    images = f"{data['repetitions']} images"
    for quality, path, label in (
        ("ssim", ssim, f"SSIM to dense, mean of {images}"),
        ("psnr", psnr, f"PSNR to dense in dB, mean of {images}"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for record in data["lanes"]:
            if record["method"] != EAGER:
                point = (float(record["speedup"]["median"]), float(record[quality]))
                lines.setdefault(record["method"], []).append(point)
        curves(lines, path, "speedup over the compiled dense model (median of pairs)", label)
