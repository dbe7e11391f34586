"""Search, validate and price the plans that come with an embedded model, and write them down.

``python -m ditfastattn.tools.demo.record --model emoji`` searches a strict, a middle and a loose
plan, measures each on prompts that its search has not seen, runs the demo with them, and writes the
plans with what was measured to the model's folder. An interrupted run resumes: plans that are there
are kept with ``--keep``, and a search resumes in any case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import ditfastattn
from ditfastattn.core.files import make_folder, write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import Validation
from ditfastattn.tools.commands.search_output import print_outcome, search_progress
from ditfastattn.tools.demo.plans import (
    NAMES,
    RECORD,
    Measurement,
    Phases,
    RecordedPlan,
    RecordedPlans,
    hash_weights,
)
from ditfastattn.tools.embedded import EmbeddedModel, ModelName, embedded_model
from ditfastattn.tools.examine import examine_plan
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console, spinner

_REPETITIONS = 10  # of the demo that is recorded
_COMMAND = "from ditfastattn.tools.commands.app import run; run()"

Name = Annotated[ModelName, typer.Option("--model", help="The embedded model.")]
Keep = Annotated[bool, typer.Option(help="Keep the plans that are there; measure them anew.")]
RunTheDemo = Annotated[bool, typer.Option(help="Run the demo, and record how long it takes.")]
Images = Annotated[int, typer.Option(min=1, help="Images to validate each plan on, and to time.")]
Compiler = Annotated[Lowering, typer.Option(help="What runs the generations that are timed.")]


def record(
    model_name: Name = ModelName.EMOJI,
    keep: Keep = False,
    images: Images = 20,
    demo: RunTheDemo = True,
    lowering: Compiler = Lowering.INDUCTOR,
) -> None:
    """Search, validate and price an embedded model's plans, and write them to its folder."""
    model, console = embedded_model(model_name), open_console()
    pipeline = model.open()
    make_folder(model.plans)
    found: list[RecordedPlan] = []
    for name, least_ssim in zip(NAMES, model.least_ssim, strict=True):
        path = model.plans / f"{name}.json"
        if keep and path.exists():
            plan = Plan.load(path)
        else:
            with search_progress(console) as show:
                plan = ditfastattn.calibrate(
                    pipeline,
                    {**model.calibration, **model.call},
                    target=Target.min_ssim(least_ssim),
                    held_out={**model.held_out, **model.call},
                    method=model.method,
                    cache_dtype="float16",
                    out=path,
                    on_progress=show,
                )
        print_outcome(console, plan)
        with spinner(console, f"validating the {name} plan") as show_phase:
            validated = ditfastattn.validate(
                pipeline,
                plan,
                {**_conditions(model, images), **model.call},
                lowering=lowering,
                repetitions=images,
                on_progress=show_phase,
            )
        found.append(_recorded(name, pipeline, plan, model, validated))
    _write(model, found, None)
    if demo:
        _write(model, found, phases_of_demo(model_name, min(images, _REPETITIONS)))
    console.print(f"wrote {model.plans}")


def phases_of_demo(model: ModelName, repetitions: int) -> Phases:
    """Return how long the demo takes where nothing was compiled before: a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        words = ["demo", "--model", model, "--out", str(out), "--repetitions", str(repetitions)]
        subprocess.run(
            [sys.executable, "-c", _COMMAND, *words],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled")},
            check=True,
        )
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return Phases.model_validate(result["phases"])


def _conditions(model: EmbeddedModel, images: int) -> dict[str, list[Any]]:
    """Return the conditions of ``images`` images, as one call takes them."""
    each = model.conditions(images)
    return {name: [item for one in each for item in one[name]] for name in each[0]}


def _recorded(
    name: str, pipeline: Any, plan: Plan, model: EmbeddedModel, validated: Validation
) -> RecordedPlan:
    prompt = Prompt({**model.conditions(1)[0], **model.call}, 0)
    examined = examine_plan(pipeline, plan, prompt)
    flops, seconds = examined.prices
    ssim, psnr = (
        next(each for each in validated.qualities if each.name == metric)
        for metric in ("ssim", "psnr")
    )
    assert validated.timing is not None
    return RecordedPlan(
        name=name,
        flops=flops,
        seconds=seconds,
        errors=examined.errors,
        measured=Measurement(
            prompts=len(validated.seeds),
            lowering=validated.lowering,
            ssim=ssim.mean,
            worst_ssim=ssim.worst,
            psnr=psnr.mean,
            speedup=validated.timing.speedup.median,
            dense_seconds=validated.timing.baseline.median,
            planned_seconds=validated.timing.candidate.median,
        ),
    )


def _write(model: EmbeddedModel, plans: list[RecordedPlan], phases: Phases | None) -> None:
    recorded = RecordedPlans(
        weights=hash_weights(model.folder),
        machine=machine(),
        plans=tuple(plans),
        phases=phases,
    )
    write_text_atomically(model.plans / RECORD, recorded.model_dump_json() + "\n")


if __name__ == "__main__":
    typer.run(record)
