"""Compare the searches on the embedded model.

    python -m ditfastattn.tools.benchmark_search curve --out benchmarks/search

Each command writes a JSON file with the machine and its arguments, and a figure. What has been
measured is kept beside the JSON until the end, so that a killed run goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.plan.schema import Calibration, Plan, Strategy
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.calibrate import DEFAULT_TARGET, calibrate
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.measure.site_evaluator import legal_candidates
from ditfastattn.runtime.search.measure.steppers import PlanStepper
from ditfastattn.runtime.search.measure.timing import Timing, measure_turns
from ditfastattn.runtime.search.methods import (
    PROFILED,
    GlobalChooser,
    Method,
    PassChooser,
    make_global,
)
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator, relative_error
from ditfastattn.runtime.search.solve.problem import Row
from ditfastattn.tools.digits_pipeline import embedded_pipeline
from ditfastattn.tools.figures import curves
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

CALIBRATION_CLASSES = (0, 3, 5, 8)
FIRST_TEST_SEED = 1000  # the searches use seeds from 0 and 500
GREEDY_THRESHOLDS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)  # the paper's D1 to D6
PER_STEP_BUDGETS = (0.004, 0.01, 0.02, 0.04, 0.08, 0.15)

Out = Annotated[Path, typer.Option(help="Folder for the JSON and the figure.")]
Steps = Annotated[int, typer.Option(min=2, help="Sampler steps.")]
Images = Annotated[int, typer.Option(min=2, help="Images per point, the same seeds at each.")]
OUT = Path("benchmarks/search")
_REPETITIONS = 10
_LOWERING = Lowering.INDUCTOR


@dataclass(frozen=True)
class Point:
    """Hold one plan's quality over images drawn with the same seeds; PSNR in dB.

    The kept FLOPs are fractions of dense. ``matches`` names the point whose attention FLOPs were
    the bound of this plan's; ``measured_speedup`` is compiled, over the compiled dense model.
    """

    method: str
    strength: float
    attention_flops: float
    matrix_flops: float
    predicted_speedup: float
    variants: int
    ssim: float
    worst_ssim: float
    psnr: float
    images: int
    ssims: tuple[float, ...]
    matches: str = ""
    measured_speedup: Timing | None = None


@dataclass(frozen=True)
class Comparison:
    """Compare the global budget's plan with another's at equal attention FLOPs, seed by seed.

    ``difference`` is the mean of the paired differences of SSIM, ``error`` its standard error.
    """

    to: str
    attention_flops: float
    difference: float
    error: float
    better_on: int
    images: int


class _Bench:
    """Hold a session on the embedded model, and judge plans over the test images."""

    def __init__(self, session: Session, checkpoint: Checkpoint, images: int, steps: int) -> None:
        self.work = Work(session, checkpoint, 0.0)
        self.steps = steps
        test = [
            Prompt(_call([index % 10], steps), FIRST_TEST_SEED + index) for index in range(images)
        ]
        self.test = test
        self.calibration = split_prompts(_call(CALIBRATION_CLASSES, steps), 0)
        self.console = open_console()
        self.dense_flops = count_flops(session.captured.module.graph).times(steps)

    def make_global(self, objective: Objective, most: int = 0) -> GlobalChooser:
        return make_global(self.work, self.calibration, Target.min_ssim(0.9), objective, most)

    def point(
        self,
        method: str,
        strength: float,
        rows: list[Row],
        predicted: float,
        merge_variants: bool = False,
        matches: str = "",
    ) -> Point:
        """Judge a plan, or read what has been judged before."""

        def make() -> dict[str, Any]:
            pairs = [self._images(index, rows) for index in range(len(self.test))]
            ssims = [float(image_ssim(dense, planned)[0]) for dense, planned in pairs]
            psnrs = [float(image_psnr(dense, planned)[0]) for dense, planned in pairs]
            return {"ssims": ssims, "psnrs": [min(psnr, 99.0) for psnr in psnrs]}

        name = f"point-{method}-{strength:.9g}"
        data = self.work.checkpoint.data(name, make)
        kept, dense = self.work.variants.flops(rows, merge_variants), self.dense_flops
        ssims, psnrs = data["ssims"], data["psnrs"]
        point = Point(
            method=method,
            strength=strength,
            attention_flops=kept.attention / dense.attention,
            matrix_flops=kept.total / dense.total,
            predicted_speedup=predicted,
            variants=len(self.work.variants.programs(rows, merge_variants)[0].variants),
            ssim=sum(ssims) / len(ssims),
            worst_ssim=min(ssims),
            psnr=sum(psnrs) / len(psnrs),
            images=len(ssims),
            ssims=tuple(ssims),
            matches=matches,
        )
        self.console.print(
            f"{method} {strength:.4g}: attention {point.attention_flops:.1%}, "
            f"all {point.matrix_flops:.1%}, SSIM {point.ssim:.4f} (worst {point.worst_ssim:.4f})"
        )
        return point

    def _images(self, index: int, rows: list[Row]) -> tuple[Tensor, Tensor]:
        dense = self.work.dense("test", index, self.test[index])
        stepper = PlanStepper(self.work.variants, rows)
        return dense, self.work.run(stepper, self.test[index], float(self.steps))


@app.command()
def curve(out: Out = OUT, steps: Steps = 20, images: Images = 32) -> None:
    """SSIM against attention FLOPs: greedy, an integer program per step, one global budget."""
    began = time.monotonic()
    with (
        open_checkpoint(out / "curve.json") as checkpoint,
        open_session(embedded_pipeline_quietly(), _first(steps), attention_only=True) as session,
    ):
        bench = _Bench(session, checkpoint, images, steps)
        chooser = bench.make_global(Objective.ATTENTION_FLOPS)
        # All three see the same prompts.
        batch = Prompt(_call(CALIBRATION_CLASSES[:PROFILED], steps), 0)
        points: list[Point] = []
        for method, strengths in (
            (Method.GREEDY, GREEDY_THRESHOLDS),
            (Method.PER_STEP, PER_STEP_BUDGETS),
        ):
            passes = PassChooser(bench.work, batch, chooser.costs, method, 0.0)
            for strength in strengths:
                rows = passes.rows(strength)
                points.append(bench.point(method, strength, rows, chooser.problem.speedup(rows)))
        comparisons: list[Comparison] = []
        for other in tuple(points):
            rows, strength = _of_flops(bench, chooser, other.attention_flops)
            speedup, matches = chooser.problem.speedup(rows), f"{other.method} {other.strength:g}"
            points.append(bench.point(Method.GLOBAL, strength, rows, speedup, matches=matches))
            comparisons.append(_compared(points[-1], other))
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


def _compared(ours: Point, other: Point) -> Comparison:
    pairs = list(zip(ours.ssims, other.ssims, strict=True))
    differences = [one - another for one, another in pairs]
    return Comparison(
        to=ours.matches,
        attention_flops=other.attention_flops,
        difference=statistics.fmean(differences),
        error=statistics.stdev(differences) / math.sqrt(len(differences)),
        better_on=sum(difference > 0.0 for difference in differences),
        images=len(differences),
    )


def _of_flops(bench: _Bench, chooser: GlobalChooser, wanted: float) -> tuple[list[Row], float]:
    """Return the gentlest plan that keeps at most the ``wanted`` fraction of attention FLOPs."""
    low, high = 1e-4, 1e2
    best: list[Row] = chooser.rows(high)
    for _ in range(24):
        middle = (low * high) ** 0.5
        rows = chooser.rows(middle)
        if bench.work.variants.flops(rows).attention <= wanted * bench.dense_flops.attention:
            best, high = rows, middle
        else:
            low = middle
    return best, high


@app.command()
def variants(
    out: Out = OUT,
    steps: Steps = 20,
    images: Images = 16,
    strength: Annotated[float, typer.Option(help="Budget of drift of every plan.")] = 0.4,
) -> None:
    """Quality and latency, both measured, over the cap on distinct step variants."""
    began = time.monotonic()
    pipeline = embedded_pipeline_quietly()
    with (
        open_checkpoint(out / "variants.json") as checkpoint,
        open_session(pipeline, _first(steps)) as session,
    ):
        bench = _Bench(session, checkpoint, images, steps)
        problem = bench.make_global(Objective.LATENCY).problem
        points: list[Point] = []
        plans: list[Plan] = []
        record = Calibration(method="global", strength=strength)
        for most in (2, 3, 4, 6, 8, 12, 0):
            rows = GlobalChooser(problem, strength, most).rows(strength)
            capped = most > 0
            predicted = problem.speedup(rows, capped)
            label = f"at most {most}" if capped else "no cap"
            points.append(bench.point(label, strength, rows, predicted, capped))
            plans.append(session.plan(rows, bench.work.timesteps, record, capped))
        test = bench.test
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
    """Time whole searches for the default target: ours, and greedy, which plans attention alone.

    The greedy search's passes share what precedes a site. Each is run once more as Algorithm 1 is
    printed, with a whole evaluation of the model per candidate.
    """
    began = time.monotonic()
    call = _call(CALIBRATION_CLASSES, steps)
    pipeline = embedded_pipeline_quietly()
    ours = _timed_search(pipeline, call, Method.GLOBAL)
    everything = _timed_search(pipeline, call, Method.GLOBAL, attention_only=False)
    greedy = _timed_search(pipeline, call, Method.GREEDY)
    shared = [_greedy_pass(pipeline, call, s, GreedyCalibrator) for s in greedy["strengths"]]
    printed = [_greedy_pass(pipeline, call, s, AsPrinted) for s in greedy["strengths"]]
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


class AsPrinted(GreedyCalibrator):
    """Evaluate the whole model for each candidate, as Algorithm 1 is printed."""

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the next step."""
        self._args, self._row = args, list[Strategy]()
        return super().step(args)

    def _choose(self, index: int, environment: Any, reference: Tensor, began: float) -> Strategy:
        evaluator = self._evaluator
        chosen = Strategy.FULL
        for strategy in legal_candidates(self.sites[index], self.layout):
            anew = evaluator.begin(self._args)
            for earlier, decided in enumerate(self._row):
                evaluator.advance(anew, earlier)
                evaluator.put(anew, earlier, evaluator.attend(anew, earlier, decided))
            evaluator.advance(anew, index)
            attended = evaluator.attend(anew, index, strategy)
            evaluator.put(anew, index, attended)
            output = evaluator.finish(anew, index)[0]
            self.literal_forwards += 1
            if relative_error(reference, output) < (index + 1) / len(self.sites) * self.threshold:
                chosen = strategy
                break
        self._row.append(chosen)
        evaluator.put(environment, index, evaluator.attend(environment, index, chosen))
        return chosen


def _timed_search(
    pipeline: Any, call: dict[str, Any], method: Method, attention_only: bool = True
) -> dict[str, Any]:
    """Search; return the record of the plan, and when each phase began."""
    began = time.monotonic()
    phases: dict[str, float] = {}

    def note(progress: SearchProgress) -> None:
        phases.setdefault(progress.phase, time.monotonic() - began)

    plan = calibrate(
        pipeline,
        call,
        target=DEFAULT_TARGET,
        method=method,
        held_out={**call, "class_labels": [1, 4, 6, 9]},
        attention_only=attention_only,
        on_progress=note,
    )
    seconds = time.monotonic() - began
    record = plan.calibration.model_dump(mode="json")
    strengths = [float(phase.split()[-1]) for phase in phases if "a greedy pass" in phase]
    return {**record, "seconds": seconds, "phases": phases, "strengths": strengths}


def _greedy_pass(
    pipeline: Any, call: dict[str, Any], threshold: float, algorithm: type[GreedyCalibrator]
) -> dict[str, Any]:
    """Time a pass over all calibration prompts as one batch."""
    prompt = Prompt(call, 0)
    with open_session(pipeline, prompt, attention_only=True) as session:
        started = time.monotonic()
        captured, sites = session.captured, session.sites
        greedy = algorithm(captured, sites, session.layout, threshold, session.steps)
        session.run(greedy, prompt)
        return {
            "threshold": threshold,
            "seconds": time.monotonic() - started,
            "forwards": greedy.forwards,
            "as_printed": greedy.literal_forwards + session.steps,
            "forward_seconds": session.forward_seconds,
            "rows": [list(row) for row in greedy.strategies],
        }


def embedded_pipeline_quietly() -> Any:
    """Return the embedded pipeline without its progress bar."""
    pipeline = embedded_pipeline()
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def _call(classes: Sequence[int], steps: int) -> dict[str, Any]:
    return {"class_labels": list(classes), "num_inference_steps": steps, "guidance_scale": 2.0}


def _first(steps: int) -> Prompt:
    return split_prompts(_call(CALIBRATION_CLASSES, steps), 0)[0]


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
