"""The report of a benchmark: fidelity and speed of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditfastattn.tools.report.content import Report, Rows


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
