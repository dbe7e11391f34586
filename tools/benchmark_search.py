"""Compare the searches on the embedded model.

    python -m ditfastattn.tools.benchmark_search --out benchmarks/search

It writes a JSON file with the machine and its arguments, and a figure. A checkpoint beside the JSON
keeps the measurements until the end, so that an interrupted run resumes.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.global_chooser import PROFILED, GlobalChooser
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.pass_chooser import PassChooser
from ditfastattn.runtime.search.record.checkpoint import open_checkpoint
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.benchmarking.plan_points import (
    CALIBRATION_CLASSES,
    Comparison,
    PlanJudge,
    Point,
    call_of,
    compared,
    first_prompt,
    of_flops,
)
from ditfastattn.tools.figures import curves
from ditfastattn.tools.measure import write_record

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

GREEDY_THRESHOLDS = (0.05, 0.1, 0.15)  # the paper's D2, D4 and D6
PER_STEP_BUDGETS = (0.01, 0.04, 0.15)

Out = Annotated[Path, typer.Option(help="Folder for the JSON and the figure.")]
Steps = Annotated[int, typer.Option(min=2, help="Sampler steps.")]
Images = Annotated[int, typer.Option(min=2, help="Images per point, the same seeds at each.")]
OUT = Path("benchmarks/search")


@app.command()
def curve(out: Out = OUT, steps: Steps = 20, images: Images = 32) -> None:
    """Compare SSIM over attention FLOPs: greedy, an integer program per step, a global budget."""
    began, pipeline = time.monotonic(), DIGITS.open()
    with (
        open_checkpoint(out / "curve.json") as checkpoint,
        open_session(pipeline, first_prompt(steps), attention_only=True) as session,
    ):
        judge = PlanJudge(session, checkpoint, images, steps)
        chooser = judge.make_global(Objective.ATTENTION_FLOPS)
        points = _points_of_other_methods(judge, chooser, steps)
        comparisons: list[Comparison] = []
        for other in tuple(points):
            rows, strength = of_flops(judge, chooser, other.attention_flops)
            speedup, matches = chooser.problem.speedup(rows), f"{other.method} {other.strength:g}"
            points.append(judge.point(Method.GLOBAL, strength, rows, speedup, matches=matches))
            comparisons.append(compared(points[-1], other))
        write_record(
            out / "curve.json",
            {"steps": steps, "images": images},
            seconds=time.monotonic() - began,
            points=[asdict(point) for point in points],
            comparisons=[asdict(comparison) for comparison in comparisons],
        )
        checkpoint.discard()
    curves(
        {
            label: sorted((p.attention_flops, p.ssim) for p in points if p.method == method)
            for method, label in (
                (Method.GREEDY, "greedy (Algorithm 1)"),
                (Method.PER_STEP, "integer program per step"),
                (Method.GLOBAL, "one global budget (ours)"),
            )
        },
        out / "curve.png",
        "attention FLOPs kept",
        f"SSIM to dense, mean of {images} images",
    )


def _points_of_other_methods(judge: PlanJudge, chooser: GlobalChooser, steps: int) -> list[Point]:
    """Judge plans of the other methods, which see the same prompts as the global budget."""
    batch = Prompt(call_of(CALIBRATION_CLASSES[:PROFILED], steps), 0)
    points: list[Point] = []
    for method, strengths in (
        (Method.GREEDY, GREEDY_THRESHOLDS),
        (Method.PER_STEP, PER_STEP_BUDGETS),
    ):
        passes = PassChooser(judge.work, batch, chooser.costs, method, 0.0)
        for strength in strengths:
            rows = passes.rows(strength)
            points.append(judge.point(method, strength, rows, chooser.problem.speedup(rows)))
    return points


if __name__ == "__main__":
    app()
