"""Run the benchmark against the peers, and write its record and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ditfastattn.core.files import write_text_atomically
from ditfastattn.runtime.search.record.checkpoint import open_checkpoint
from ditfastattn.tools.bench.harness import Bench
from ditfastattn.tools.bench.methods import EAGER
from ditfastattn.tools.bench.models import BenchModel
from ditfastattn.tools.bench.peers import PEERS
from ditfastattn.tools.bench.report import as_json, draw, show, versions
from ditfastattn.tools.bench.setup import BenchOptions, set_up
from ditfastattn.tools.measure import machine
from ditfastattn.tools.report.of_bench import bench_report
from ditfastattn.tools.report.page import write_report


def run_bench(
    console: Console, model: BenchModel, options: BenchOptions, out: Path, restart: bool
) -> dict[str, Any]:
    """Measure, print tables, and write JSON, a report and two figures to ``out``.

    An interrupted run resumes with the methods that are left.

    Raises:
        ConfigError: an unfinished run had other arguments.
    """
    name = f"{model.name}-{options.steps}"
    path = out / f"{name}.json"
    with open_checkpoint(path, restart) as checkpoint:
        checkpoint.begin(_request(model, options))
        bench = Bench(set_up(model, options, checkpoint, console.log))
        data = as_json(bench, bench.run())
        write_text_atomically(path, json.dumps(data, indent=1) + "\n")
        if model.trained:
            draw(data, out / f"{name}-ssim.png", out / f"{name}-psnr.png")
        report = out / f"{name}.html"
        write_report(bench_report(data, left_out=EAGER), report)
        checkpoint.discard()
    show(console, data)
    console.print(f"wrote {path} and {report}", soft_wrap=True)
    return data


def _request(model: BenchModel, options: BenchOptions) -> dict[str, Any]:
    """Return what a run must have in common with the one it resumes; its peers may differ."""
    return {
        "model": model.name,
        "steps": options.steps,
        "repetitions": options.repetitions,
        "seeds": options.seeds,
        "speedups": options.speedups,
        "work": options.work,
        "fewer": options.fewer,
        "rules": options.rules,
        "max_variants": options.max_variants,
        "lowering": options.lowering,
        "settings": {peer.name: [setting.label for setting in peer.settings] for peer in PEERS},
        "machine": machine(),
        "versions": versions(),
    }
