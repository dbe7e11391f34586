"""The report of a benchmark: fidelity and speed of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import read_json
from ditfastattn.tools.report.content import Points, Report, Rows


class _Speedup(Record, frozen=True, extra="ignore"):
    """What is read of a contender's speedup."""

    median: float


class _Contender(Record, frozen=True, extra="ignore"):
    """What is read of a contender in a benchmark's record."""

    method: str
    speedup: _Speedup
    ssim: float


class _Benchmark(Record, frozen=True, extra="ignore"):
    """What is read of a benchmark's record."""

    model: str
    steps: int
    machine: dict[str, str]
    lanes: tuple[_Contender, ...]


def recorded_contenders(path: Path, model: str, steps: int, left_out: str) -> Points:
    """Return the contenders of the benchmark's record in ``path``, a series for each method.

    Raises:
        ConfigError: it is not such a record, or one of another model or number of steps.
    """
    what, remedy = "the benchmark's record", "write one with `ditfastattn bench`"
    record = _Benchmark.from_json(read_json(path, what, remedy), str(path), remedy)
    if (record.model, record.steps) != (model, steps):
        raise ConfigError(
            f"{what} is of other generations",
            where=str(path),
            got=f"{record.model}, {record.steps} steps",
            expected=f"{model}, {steps} steps",
            remedy=f"run `ditfastattn bench --model {model} --steps {steps}`",
        )
    device = record.machine.get("device", "another machine")
    found: dict[str, list[tuple[float, float, str]]] = {}
    for each in record.lanes:
        if each.method != left_out:
            series = found.setdefault(f"{each.method} (recorded, {device})", [])
            series.append((each.speedup.median, each.ssim, ""))
    return found


def bench_report(data: Mapping[str, Any], left_out: str) -> Report:
    """Return the report of the record ``data``; the method ``left_out`` is not in the chart."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    rows = [("method", "setting", "speedup", "SSIM", "worst SSIM", "PSNR, dB", "compile, s")]
    for record in data["lanes"]:
        speedup = float(record["speedup"]["median"])
        if record["method"] != left_out:
            lines.setdefault(record["method"], []).append((speedup, float(record["ssim"]), ""))
        rows.append(
            (
                record["method"],
                record["setting"],
                f"{speedup:.2f}x",
                f"{record['ssim']:.4f}",
                f"{record['worst_ssim']:.4f}",
                f"{record['psnr']:.1f}",
                f"{record['compile_seconds']:.0f}",
            )
        )
    failures = [
        (failure["method"], failure["setting"], failure["reason"]) for failure in data["failures"]
    ]
    tables: dict[str, Rows] = {"Contenders, against the compiled dense model": rows}
    if failures:
        tables["Not measured"] = failures
    return Report(
        title=f"ditfastattn bench: {data['model']}, {data['steps']} steps",
        facts=(
            ("images", f"{len(data['seeds'])} seeds; weights {data['weights']}"),
            ("timing", f"medians of {data['repetitions']} pairs"),
            ("command", data["command"]),
        ),
        sections=(),
        frontier=lines,
        quality="mean SSIM to dense",
        environment={**data["machine"], **data["versions"]},
        tables=tables,
    )
