"""Compare the searches on the embedded model.

    python -m ditfastattn.tools.benchmark_search curve --out benchmarks/search

Each command writes a JSON file with the machine and its arguments, and a figure. A checkpoint
beside the JSON keeps the measurements until the end, so that an interrupted run resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.schema import Calibration, Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.global_chooser import PROFILED, GlobalChooser
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.pass_chooser import PassChooser
from ditfastattn.runtime.search.record.checkpoint import open_checkpoint
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator
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
from ditfastattn.tools.benchmarking.search_cost import AsPrinted, greedy_pass, timed_search
from ditfastattn.tools.figures import curves
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

GREEDY_THRESHOLDS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)  # the paper's D1 to D6
PER_STEP_BUDGETS = (0.004, 0.01, 0.02, 0.04, 0.08, 0.15)

Out = Annotated[Path, typer.Option(help="Folder for the JSON and the figure.")]
Steps = Annotated[int, typer.Option(min=2, help="Sampler steps.")]
Images = Annotated[int, typer.Option(min=2, help="Images per point, the same seeds at each.")]
OUT = Path("benchmarks/search")
_REPETITIONS = 10
_LOWERING = Lowering.INDUCTOR


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
        arguments = {"steps": steps, "images": images}
        _write(out / "curve.json", points, began, arguments, comparisons=comparisons)
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


@app.command()
def variants(
    out: Out = OUT,
    steps: Steps = 20,
    images: Images = 16,
    strength: Annotated[float, typer.Option(help="Drift budget of each plan.")] = 0.4,
) -> None:
    """Measure quality and latency over the cap on distinct step variants."""
    began = time.monotonic()
    pipeline = DIGITS.open()
    with (
        open_checkpoint(out / "variants.json") as checkpoint,
        open_session(pipeline, first_prompt(steps)) as session,
    ):
        judge = PlanJudge(session, checkpoint, images, steps)
        problem = judge.make_global(Objective.LATENCY).problem
        points: list[Point] = []
        plans: list[Plan] = []
        record = Calibration(method="global", strength=strength)
        for most in (2, 3, 4, 6, 8, 12, 0):
            rows = GlobalChooser(problem, strength, most).rows(strength)
            capped = most > 0
            predicted = problem.speedup(rows, capped)
            label = f"at most {most}" if capped else "no cap"
            points.append(judge.point(label, strength, rows, predicted, capped))
            plans.append(record_plan(session, rows, judge.work.timesteps, record, capped))
        test = judge.test
        session.release()
        points = _timed(pipeline, plans, points, test)
        session.hold()
        _write(out / "variants.json", points, began, {"steps": steps, "images": images})
        checkpoint.discard()
    counted = [(float(point.variants), point) for point in points]
    curves(
        {
            "SSIM, mean": [(count, point.ssim) for count, point in counted],
            "SSIM, worst": [(count, point.worst_ssim) for count, point in counted],
        },
        out / "variants.png",
        "distinct step variants",
        "SSIM to dense",
    )


def _timed(
    pipeline: Any, plans: Sequence[Plan], points: Sequence[Point], prompts: Sequence[Prompt]
) -> list[Point]:
    """Time the plans in turns with the dense model, all compiled."""
    contenders = [planned_contender(pipeline, plan, prompts, _LOWERING) for plan in plans]
    dense = dense_contender(pipeline, prompts, _LOWERING)
    with many_compilations():
        for contender in (dense, *contenders):
            contender.warm_up()
    turns = measure_turns(
        dense.generate, [contender.generate for contender in contenders], _REPETITIONS
    )
    pairs = zip(points, turns, strict=True)
    return [replace(point, measured_speedup=timing.speedup) for point, timing in pairs]


@app.command()
def cost(out: Out = OUT, steps: Steps = 20) -> None:
    """Time whole searches for the default target: ours, and greedy, which plans attention only.

    Passes of the greedy search reuse the work before each site. Each pass is run again as Algorithm
    1 is printed, with a whole evaluation of the model per candidate.
    """
    began = time.monotonic()
    call = call_of(CALIBRATION_CLASSES, steps)
    pipeline = DIGITS.open()
    ours = timed_search(pipeline, call, Method.GLOBAL)
    everything = timed_search(pipeline, call, Method.GLOBAL, attention_only=False)
    greedy = timed_search(pipeline, call, Method.GREEDY)
    shared = [greedy_pass(pipeline, call, s, GreedyCalibrator) for s in greedy["strengths"]]
    printed = [greedy_pass(pipeline, call, s, AsPrinted) for s in greedy["strengths"]]
    longer = sum(p["seconds"] - s["seconds"] for p, s in zip(printed, shared, strict=True))
    entry = {
        "global": ours,
        "global_with_feed_forwards": everything,
        "greedy": greedy,
        "greedy_passes": shared,
        "passes_as_printed": printed,
        "of_greedy": ours["seconds"] / greedy["seconds"],
        "of_greedy_as_printed": ours["seconds"] / (greedy["seconds"] + longer),
    }
    _write(out / "cost.json", [entry], began, {"steps": steps})
    open_console().print_json(data=entry)


def _write(
    path: Path,
    points: Sequence[Any],
    began: float,
    arguments: dict[str, int],
    comparisons: Sequence[Comparison] = (),
) -> None:
    data = {
        "machine": machine(),
        "arguments": arguments,
        "seconds": time.monotonic() - began,
        "points": [point if isinstance(point, dict) else asdict(point) for point in points],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    app()
