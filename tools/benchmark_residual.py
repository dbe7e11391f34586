"""Measure what it is worth that steps which share guidance refresh the residual.

python -m ditfastattn.tools.benchmark_residual --out benchmarks/search

Patterns of steps are run twice over the same seeds: with ``share-cfg``, as the paper says, and with
``share-cfg+refresh``, as the authors' code does. Every attention takes the pattern, feed-forwards
are full. Images are compared with the dense ones of the same seeds; gains are paired by seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.metrics import image_psnr
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from ditfastattn.tools.bench.models import FIRST_TEST_SEED
from ditfastattn.tools.commands.generation import open_pipeline
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(pretty_exceptions_enable=False)
F, W, C, X = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_CFG, Strategy.WINDOW_SHARE_CFG
PATTERNS = {  # of the steps after the first, which is full; repeated
    "guidance shared, then two windows of one branch": (C, X, X),
    "guidance shared, then a window": (C, W),
}
Rows = list[tuple[Strategy, ...]]


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/search"),
    pipeline: Annotated[str, typer.Option(help="A folder; default: the embedded model.")] = "",
    steps: Annotated[int, typer.Option(min=4, help="Of a generation.")] = 10,
    seeds: Annotated[int, typer.Option(min=2, help="How many images.")] = 16,
) -> None:
    """Run each pattern with and without refreshing, on the same seeds."""
    opened = open_pipeline(pipeline)
    prompts = [
        Prompt(
            {"class_labels": [k % 10], "num_inference_steps": steps, "guidance_scale": 2.0},
            FIRST_TEST_SEED + k,
        )
        for k in range(seeds)
    ]
    with open_session(opened, prompts[0], attention_only=True) as session:
        found = _measured(session, prompts, steps)
    data = {
        "machine": machine(),
        "arguments": {"pipeline": pipeline, "steps": steps, "seeds": seeds},
        "patterns": found,
    }
    write_text_atomically(out / "residual.json", json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=found)


def _measured(session: Session, prompts: Sequence[Prompt], steps: int) -> dict[str, Any]:
    variants = Variants(session)
    dense = [session.run(DenseStepper(session), prompt) for prompt in prompts]
    full = variants.flops([(F,) * len(session.sites)] * steps).attention
    found: dict[str, Any] = {}
    for name, pattern in PATTERNS.items():
        old = _rows(session, pattern, steps)
        new = [tuple(Strategy.SHARE_CFG_REFRESH if e is C else e for e in row) for row in old]
        scores: list[list[float]] = []
        for rows in (old, new):
            images = [session.run(PlanStepper(variants, rows), prompt) for prompt in prompts]
            pairs = zip(dense, images, strict=True)
            scores.append([float(image_psnr(*pair)[0]) for pair in pairs])
        gains = [after - before for before, after in zip(*scores, strict=True)]
        found[name] = {
            "steps": [str(row[0]) for row in new],
            "share-cfg": _summary(scores[0], variants.flops(old).attention / full),
            "share-cfg+refresh": _summary(scores[1], variants.flops(new).attention / full),
            "gain": _summary(gains),
        }
    return found


def _rows(session: Session, pattern: Sequence[Strategy], steps: int) -> Rows:
    column = [F, *(pattern[step % len(pattern)] for step in range(steps - 1))]
    sites = session.sites
    return [
        tuple(F if strategy.needs_window and site.no_window else strategy for site in sites)
        for strategy in column
    ]


def _summary(values: Sequence[float], attention: float | None = None) -> dict[str, float]:
    """Return the mean in dB with its standard error, the worst, and the share of attention."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    found = {"mean": statistics.fmean(values), "standard_error": error, "worst": min(values)}
    return found if attention is None else {**found, "attention_flops": attention}


if __name__ == "__main__":
    with torch.no_grad():
        app()
