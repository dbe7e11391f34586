"""Measure plans of whole steps on the demo's model, beside the same solver with fewer steps.

    python -m ditfastattn.tools.benchmark_whole_steps --out benchmarks/whole-steps

Quality is that of held-out seeds, image by image, against the dense images of the same seeds; work
is counted in runs of the model. Both are independent of the machine's load. Then some plans are
timed in turns with the compiled dense model. An interrupted run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

import ditfastattn
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.timing import PairedTiming, measure_turns
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.whole_steps.search import FITTED_ON
from ditfastattn.tools.bench.fidelity import summary
from ditfastattn.tools.bench.models import DEMO
from ditfastattn.tools.bench.plans import whole_step_search
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

CLASSES = 10
HELD_OUT = 5000  # the first seed; searches begin at 0


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plans.")],
    steps: Annotated[int, typer.Option(help="Steps of the dense generation.")] = 20,
    images: Annotated[int, typer.Option(help="Held-out seeds.")] = 64,
    runs: Annotated[str, typer.Option(help="Steps that run, plan by plan.")] = "5,6,7,8,9",
    fewer: Annotated[str, typer.Option(help="Steps of the same solver.")] = "5,7,9,14",
    timed: Annotated[str, typer.Option(help="Plans to time, by the steps that run.")] = "7,9",
    repetitions: Annotated[int, typer.Option(help="Of each timed generation.")] = 20,
) -> None:
    """Find the plans, measure their images, and time some of them."""
    console = open_console()
    prompts = [prompt(seed, steps) for seed in range(HELD_OUT, HELD_OUT + images)]
    with open_checkpoint(out / "whole-steps.json") as checkpoint:
        checkpoint.begin({"steps": steps, "images": images})
        plans = _plans(checkpoint, steps, _numbers(runs), out)
        measured: list[dict[str, Any]] = []
        pipeline = DEMO.open()
        dense = [_dense(checkpoint, pipeline, each) for each in prompts]
        for number, plan in plans.items():
            name = f"plan-{number}"
            measured.append({"plan": number, "work": number / steps, "mask": _mask(plan)})
            measured[-1] |= _quality(checkpoint, name, dense, _planned(plan, prompts))
            console.print_json(data=measured[-1])
        for number in _numbers(fewer):
            again = [prompt(each.seed, number) for each in prompts]
            measured.append({"fewer steps": number, "work": number / steps})
            measured[-1] |= _quality(checkpoint, f"fewer-{number}", dense, _plain(again))
            console.print_json(data=measured[-1])
        chosen = {number: plans[number] for number in _numbers(timed) if number in plans}
        timings = _timed(chosen, prompts, repetitions)
        found = {"machine": machine(), "steps": steps, "images": images}
        found |= {"quality": measured, "speed": timings}
        write_text_atomically(out / "whole-steps.json", json.dumps(found, indent=1) + "\n")
        checkpoint.discard()
    console.print_json(data=timings)


def prompt(seed: int, steps: int) -> Prompt:
    """Return the prompt of a seed: one digit."""
    return Prompt({**DEMO.call(seed % CLASSES), "num_inference_steps": steps}, seed)


def _plans(checkpoint: Checkpoint, steps: int, wanted: Sequence[int], out: Path) -> dict[int, Plan]:
    paths = {number: out / f"plan-{steps}-{number}.json" for number in wanted}
    if not all(path.exists() for path in paths.values()):
        pipeline = DEMO.open()
        first = [prompt(seed, steps) for seed in range(FITTED_ON)]
        search = whole_step_search(pipeline, first, Target.min_psnr(30.0), checkpoint)
        for number, plan in search.curve(wanted).items():
            plan.save(paths[number])
    return {number: Plan.load(path) for number, path in paths.items()}


def _mask(plan: Plan) -> str:
    return "".join("#" if row[0].computes else "." for row in plan.strategies)


def _dense(checkpoint: Checkpoint, pipeline: Any, at: Prompt) -> Tensor:
    def make() -> dict[str, Tensor]:
        return {"images": as_images(generate(pipeline, at))}

    return checkpoint.tensors(f"dense-{at.seed}", make)["images"]


def _planned(plan: Plan, prompts: Sequence[Prompt]) -> Callable[[int], Tensor]:
    pipeline = DEMO.open()
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    return lambda index: as_images(generate(pipeline, prompts[index]))


def _plain(prompts: Sequence[Prompt]) -> Callable[[int], Tensor]:
    pipeline = DEMO.open()
    return lambda index: as_images(generate(pipeline, prompts[index]))


def _quality(
    checkpoint: Checkpoint, name: str, dense: Sequence[Tensor], make: Callable[[int], Tensor]
) -> dict[str, float]:
    """Return the mean, its standard error and the worst of PSNR and SSIM."""

    def compare(index: int) -> list[float]:
        image = make(index)
        return [float(image_psnr(dense[index], image)), float(image_ssim(dense[index], image))]

    values: list[list[float]] = [
        checkpoint.data(f"{name}-{index}", partial(compare, index)) for index in range(len(dense))
    ]
    found: dict[str, float] = {}
    for metric, column in zip(("psnr", "ssim"), zip(*values, strict=True), strict=True):
        mean, error, worst = summary(column)
        found |= {metric: mean, f"{metric}_standard_error": error, f"{metric}_worst": worst}
    return found


def _timed(plans: dict[int, Plan], prompts: Sequence[Prompt], repetitions: int) -> dict[str, Any]:
    """Time the plans in turns with the dense model, all compiled."""
    pipeline = DEMO.open()
    dense = dense_contender(pipeline, prompts, Lowering.INDUCTOR)
    planned = [
        planned_contender(pipeline, plan, prompts, Lowering.INDUCTOR) for plan in plans.values()
    ]
    with many_compilations():
        compiled = [contender.warm_up() for contender in (dense, *planned)]
    found = measure_turns(dense.generate, [each.generate for each in planned], repetitions)
    rows = zip(plans.items(), found, compiled[1:], strict=True)
    return {
        f"plan-{number}": _row(timing, plan) | {"seconds_to_compile": seconds}
        for (number, plan), timing, seconds in rows
    } | {"dense_seconds_to_compile": compiled[0]}


def _row(timing: PairedTiming, plan: Plan) -> dict[str, Any]:
    return {
        "dense_seconds": timing.baseline.median,
        "seconds": timing.candidate.median,
        "quartiles": [timing.candidate.lower_quartile, timing.candidate.upper_quartile],
        "speedup": timing.speedup.median,
        "speedup_quartiles": [timing.speedup.lower_quartile, timing.speedup.upper_quartile],
        "predicted_speedup": plan.calibration.predicted_speedup,
        "cache_bytes": plan.calibration.cache_bytes,
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    app()
