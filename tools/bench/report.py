"""Report a benchmark: JSON, tables, and figures of fidelity against speedup."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ditfastattn.tools.bench.fidelity import summary
from ditfastattn.tools.bench.harness import Bench
from ditfastattn.tools.bench.methods import EAGER, FEWER
from ditfastattn.tools.bench.plans import OURS
from ditfastattn.tools.bench.setup import Data, Group
from ditfastattn.tools.figures import curves
from ditfastattn.tools.measure import machine

LEVELS = {"ssim": (0.85, 0.9, 0.95, 0.98, 0.99, 0.995), "psnr": (30.0, 33.0, 36.0, 39.0)}
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


def best_at(records: Sequence[Data], metric: str, level: float) -> dict[str, Data | None]:
    """Return the fastest contenders whose mean ``metric`` is at least ``level``.

    They are ours, a peer's (another rule for whole steps counts as one), and the same solver with
    fewer steps. Nothing is interpolated: None where no measured contender reaches the level. Where
    there are both, ``ahead`` is how much better ours is, image by image: the mean and its standard
    error.
    """
    good = [record for record in records if record[metric] >= level and record["method"] != EAGER]
    ours = _fastest([record for record in good if is_ours(record)])
    fewer = _fastest([record for record in good if record["method"] == FEWER])
    peer = _fastest([r for r in good if not is_ours(r) and r["method"] != FEWER])
    ahead = _ahead(ours, peer, f"{metric}s") if ours and peer else None
    return {"ours": _short(ours), "peer": _short(peer), "fewer": _short(fewer), "ahead": ahead}


def is_ours(record: Data) -> bool:
    """Return whether a contender is a plan of ours."""
    return str(record["method"]).startswith(OURS)


def _fastest(records: Sequence[Data]) -> Data | None:
    return max(records, key=lambda record: float(record["speedup"]["median"]), default=None)


def _short(record: Data | None) -> Data | None:
    if record is None:
        return None
    names = ("method", "setting", "form", "ssim", "worst_ssim", "psnr", "worst_psnr")
    return {**{name: record[name] for name in names}, "speedup": record["speedup"]["median"]}


def _ahead(ours: Data, peer: Data, values: str) -> Data:
    pairs = zip(ours[values], peer[values], strict=True)
    mean, error, _ = summary([own - other for own, other in pairs])
    return {"mean": mean, "standard_error": error}


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
        "best": [
            {"metric": metric, "level": level, **best_at(records, metric, level)}
            for metric, levels in LEVELS.items()
            for level in levels
            if setup.model.trained
        ],
        "lanes": records,
        "forms": {group["method"]: group["forms"] for group in groups if group["forms"]},
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
    for heading in ("speedup", "quartiles", "SSIM", "worst", "PSNR", "+-", "worst", "compile"):
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
            f"{record['psnr_standard_error']:.1f}",
            f"{record['worst_psnr']:.1f}",
            f"{record['compile_seconds']:.0f} s",
        )
    generations = (
        f"images of {len(data['seeds'])} seeds; medians of {data['repetitions']} generations"
    )
    table.caption = f"weights: {data['weights']}; {generations}"
    return table


def best_table(data: Data) -> Table:
    """Return the fastest of ours, of the peers, and of fewer steps, at each level."""
    table = Table(title="fastest measured point at a mean fidelity")
    table.add_column("at least", justify="right")
    for heading in ("ditfastattn", "best peer", "fewer steps"):
        table.add_column(heading, justify="right")
    table.add_column("which of ours, which peer")
    for row in data["best"]:
        found = [row[name] for name in ("ours", "peer", "fewer")]
        names = (f"{item['method']}, {item['setting']}" for item in found[:2] if item)
        table.add_row(
            f"{row['metric'].upper()} {row['level']:g}",
            *(f"{item['speedup']:.2f}x" if item else "none" for item in found),
            "; ".join(names),
        )
    return table


def draw(data: Data, ssim: Path, psnr: Path) -> None:
    """Draw fidelity against speedup, a line per method."""
    images = f"{len(data['seeds'])} images"
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
