"""Run the demo: pictures first, then the same seeds dense and by each plan, compiled and timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from torch import Tensor

import ditfastattn
from ditfastattn.core.files import make_folder, write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.reports import RunReport
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.contender import (
    Contender,
    dense_contender,
    planned_contender,
)
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.runtime.specializations import report_of
from ditfastattn.tools.commands.search_output import print_outcome, search_progress
from ditfastattn.tools.demo.compile_ahead import DENSE, compiling_ahead
from ditfastattn.tools.demo.plans import DemoPlan, Phases, recorded_plans, shipped_plans
from ditfastattn.tools.demo.result import (
    DemoResult,
    PlanOutcome,
    compare_images,
    demo_json,
    result_table,
    savings_table,
)
from ditfastattn.tools.embedded import EmbeddedModel, ModelName, embedded_model
from ditfastattn.tools.examine import examine_plan
from ditfastattn.tools.figures import MOST_SAMPLES, image_grid, plan_map
from ditfastattn.tools.report.content import Points
from ditfastattn.tools.report.of_demo import demo_report
from ditfastattn.tools.report.page import write_report
from ditfastattn.tools.terminal import duration, open_console, progress_bar, spinner

FIRST_TEST_SEED = 1000  # searches use seeds from 0 and 500: they have seen no test image


@dataclass(frozen=True)
class NewSearch:
    """Say which plan to search instead of taking those that come with the model.

    ``steps`` and ``guidance_scale`` None are the model's own.
    """

    min_ssim: float = 0.9
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


def run_demo(
    out: Path,
    repetitions: int,
    name: ModelName = ModelName.EMOJI,
    search: NewSearch | None = None,
    console: Console | None = None,
    peers: Points = MappingProxyType({}),
) -> DemoResult:
    """Run the demo, print its tables, and write pictures, plans and measurements to ``out``.

    ``name`` is the model to run. The report's chart shows the ``peers`` as well.
    """
    began = time.monotonic()
    console = console or open_console()
    make_folder(out)
    with spinner(console, "loading the model"):
        model = embedded_model(name)
        pipeline = model.open()
    if search is None:
        plans, call = shipped_plans(model), dict(model.call)
        console.print(
            f"{model.name} with the plans that come with it, searched and validated earlier "
            "(--calibrate searches a new one here)",
            soft_wrap=True,
        )
    else:
        given = {"num_inference_steps": search.steps, "guidance_scale": search.guidance_scale}
        call = {**model.call, **{key: item for key, item in given.items() if item is not None}}
        plans = [_searched(console, model, pipeline, search, call, out)]
    for each in plans:
        each.plan.save(out / f"{each.name}.json")
    paths = [DENSE, *(str(out / f"{each.name}.json") for each in plans)]
    conditions = model.conditions(repetitions)
    prompts = [
        Prompt({**call, **asked}, FIRST_TEST_SEED + number)
        for number, asked in enumerate(conditions)
    ]
    dense_picture, first_picture = _dense_picture(console, pipeline, prompts[0])
    with compiling_ahead(name, paths):
        tracing = _planned_picture(console, pipeline, plans[-1], prompts[0], dense_picture, out)
        console.print(f"wrote {out / 'first.png'} after {time.monotonic() - began:.0f} s")
        if search is None:
            _print_estimate(console, model, repetitions, first_picture, tracing)
        contenders = [
            dense_contender(pipeline, prompts, Lowering.INDUCTOR),
            *(planned_contender(pipeline, p.plan, prompts, Lowering.INDUCTOR) for p in plans),
        ]
        compile_seconds = _compile(console, contenders, [DENSE, *(p.name for p in plans)])
    turns = time.monotonic()
    timings = _time(console, contenders, repetitions)
    phases = Phases(
        first_picture=first_picture,
        tracing=tracing,
        compiling=sum(compile_seconds),
        turn=(time.monotonic() - turns) / repetitions,
    )
    dense = contenders[0].stacked()
    priced = _priced(console, pipeline, plans, prompts[0])
    outcomes = []
    for each, planned, timing, seconds in zip(
        priced, contenders[1:], timings, compile_seconds[1:], strict=True
    ):
        quality = compare_images(dense, planned.stacked())
        obeyed = model.share_obeyed(planned.stacked(), conditions)
        report = _report_of(each.plan)
        outcomes.append(
            PlanOutcome(each, report, timing, quality, obeyed, seconds, planned.stacked())
        )
    result = DemoResult(
        model=model.name,
        obeyed=model.obeyed,
        outcomes=tuple(outcomes),
        dense_images=dense,
        dense_obeyed=model.share_obeyed(dense, conditions),
        compile_seconds=compile_seconds[0],
        phases=phases,
        seconds=time.monotonic() - began,
    )
    _write(console, result, out, peers)
    return result


def _searched(
    console: Console,
    model: EmbeddedModel,
    pipeline: Any,
    search: NewSearch,
    call: Mapping[str, Any],
    out: Path,
) -> DemoPlan:
    with search_progress(console) as show:
        plan = ditfastattn.calibrate(
            pipeline,
            {**model.calibration, **call},
            target=Target.min_ssim(search.min_ssim),
            held_out={**model.held_out, **call},
            method=model.method,
            cache_dtype="float16",
            seed=search.seed,
            out=out / "calibrated.json",
            on_progress=show,
        )
    print_outcome(console, plan)
    return DemoPlan("calibrated", plan)


def _dense_picture(console: Console, pipeline: Any, prompt: Prompt) -> tuple[Tensor, float]:
    """Draw one picture dense, nothing compiled; return it and the seconds it took."""
    with progress_bar(console, "the first picture, nothing compiled yet", total=None):
        dense = dense_contender(pipeline, [prompt], Lowering.EAGER)
        began = time.perf_counter()
        dense.generate(0)
        return dense.stacked(), time.perf_counter() - began


def _planned_picture(
    console: Console, pipeline: Any, loosest: DemoPlan, prompt: Prompt, dense: Tensor, out: Path
) -> float:
    """Draw the same picture by the loosest plan, traced but not compiled, and write both.

    Return the seconds that the planned picture took.
    """
    began = time.perf_counter()
    with progress_bar(console, f"the same seed by the {loosest.name} plan", total=None):
        planned = planned_contender(pipeline, loosest.plan, [prompt], Lowering.EAGER)
        with many_compilations():
            planned.generate(0)
    seconds = time.perf_counter() - began
    image_grid(dense, planned.stacked(), out / "first.png")
    return seconds


def _print_estimate(
    console: Console,
    model: EmbeddedModel,
    repetitions: int,
    first_picture: float,
    tracing: float,
) -> None:
    """Print how long the rest takes, from the phases of the recorded demo.

    Compiling is one core's work beside a helper's, as tracing the loosest plan was; generations
    take all cores, as the first picture did.
    """
    recorded = recorded_plans(model)
    known = None if recorded is None else recorded.phases
    if known is None:
        return
    compiling = known.compiling * tracing / known.tracing
    timing = known.turn * repetitions * first_picture / known.first_picture
    console.print(
        f"compiling and timing take about {duration(compiling + timing)}, less if compiled before",
        soft_wrap=True,
    )


def _compile(
    console: Console, contenders: Sequence[Contender], names: Sequence[str]
) -> list[float]:
    """Compile each contender by a first generation; return the seconds of each."""
    found: list[float] = []
    with progress_bar(console, "compiling", total=float(len(names))) as advance:
        for done, (contender, name) in enumerate(zip(contenders, names, strict=True)):
            label = "the dense model" if name == DENSE else f"the {name} plan"
            advance(f"compiling {label}", float(done))
            began = time.perf_counter()
            with many_compilations():
                contender.generate(0)
            found.append(time.perf_counter() - began)
        advance("compiled", float(len(names)))
    return found


def _time(console: Console, contenders: Sequence[Contender], repetitions: int) -> Any:
    """Time the contenders in turns."""
    calls = float(repetitions * len(contenders))
    done = 0.0
    with progress_bar(console, "timing in turns", total=calls) as advance:

        def counted(generate: Callable[[int], None]) -> Callable[[int], None]:
            def call(number: int) -> None:
                nonlocal done
                generate(number)
                done += 1.0
                advance("timing in turns", done)

            return call

        dense, *planned = [counted(contender.generate) for contender in contenders]
        return measure_turns(dense, planned, repetitions)


def _priced(
    console: Console, pipeline: Any, plans: Sequence[DemoPlan], prompt: Prompt
) -> list[DemoPlan]:
    """Return ``plans`` with the price of each strategy, measured where no record holds it."""
    found: list[DemoPlan] = []
    for each in plans:
        if each.prices is None:
            with progress_bar(console, "pricing each strategy", total=None):
                examined = examine_plan(pipeline, each.plan, prompt)
                each = replace(each, prices=examined.prices, errors=examined.errors)
        found.append(each)
    return found


def _report_of(plan: Plan) -> RunReport:
    """Return the report of the compiled plan; that of the uncompiled one is of the same numbers."""
    report = report_of(plan)
    assert report is not None
    return report


def _write(console: Console, result: DemoResult, out: Path, peers: Points) -> None:
    first = result.outcomes[-1]
    shown = slice(0, MOST_SAMPLES)
    image_grid(result.dense_images[shown], first.images[shown], out / "images.png")
    for outcome in result.outcomes:
        plan_map(outcome.plan, out / f"{outcome.name}.png", outcome.attention_kept)
    write_text_atomically(out / "result.json", json.dumps(demo_json(result), indent=1) + "\n")
    write_report(demo_report(result, peers), out / "report.html")
    console.print(result_table(result))
    console.print(savings_table(result))
    console.print(
        f"wrote report.html, images.png, result.json, and each plan as JSON and PNG to {out}, in "
        f"{duration(result.seconds)} in all",
        soft_wrap=True,
    )
