"""Measure the speedup of the exact pass that hoists values.

    python -m ditfastattn.tools.benchmark_passes --out benchmarks/passes

Every step of the plan is full, so that the contenders differ in that pass alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from ditfastattn.core.env import DISABLE
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.hoist_invariants import HOIST_PER_GENERATION
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import (
    Contender,
    dense_contender,
    planned_contender,
)
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.bench.random_models import pixart, random_pipeline
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PASSES = (HOIST_PER_GENERATION,)


def _models() -> dict[str, tuple[Any, Any]]:
    """Return pipelines, and the arguments of a call."""
    text_to_image = pixart(32, 6, 6, 32, caption=4096, text=300)
    text_to_image = replace(text_to_image, shape=(4, 64, 64))  # 1024 tokens
    return {
        "digits": (DIGITS.open(), DIGITS.call(0)),
        "pixart, 6 layers, 300 text tokens": (random_pipeline(text_to_image), {"image": [0]}),
    }


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/passes"),
    steps: Annotated[int, typer.Option(min=2, help="Sampler steps.")] = 20,
    repetitions: Annotated[int, typer.Option(min=10)] = 10,
) -> None:
    """Time generations with the pass against those without it."""
    data: dict[str, Any] = {
        "machine": machine(),
        "arguments": {"steps": steps, "repetitions": repetitions},
        "models": {},
    }
    for name, (pipeline, call) in _models().items():
        data["models"][name] = _gains(pipeline, {**call, "num_inference_steps": steps}, repetitions)
    write_text_atomically(out / "passes.json", json.dumps(data, indent=1) + "\n")
    shown = {
        name: {contender: timing["speedup"]["median"] for contender, timing in gains.items()}
        for name, gains in data["models"].items()
    }
    open_console().print_json(data=shown)


def _gains(pipeline: Any, call: dict[str, Any], repetitions: int) -> dict[str, Any]:
    prompt = Prompt(call, 0)
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        rows = [(Strategy.FULL,) * len(session.sites)] * session.steps
        plan = record_plan(session, rows, session.timesteps, Calibration(method="manual"))
    left_out = {
        "neither": PASSES,
        HOIST_PER_GENERATION: (),
    }
    with many_compilations():
        contenders = {"dense": _warm(dense_contender(pipeline, [prompt], Lowering.INDUCTOR), ())}
        for name, disabled in left_out.items():
            contenders[name] = _warm(
                planned_contender(pipeline, plan, [prompt], Lowering.INDUCTOR), disabled
            )
    baseline = contenders.pop("neither")
    calls = [contender.generate for contender in contenders.values()]
    timings = measure_turns(baseline.generate, calls, repetitions)
    differences = {
        name: float((contender.images[0] - baseline.images[0]).abs().max())
        for name, contender in contenders.items()
    }
    return {
        name: {**asdict(timing), "largest_difference": differences[name]}
        for name, timing in zip(contenders, timings, strict=True)
    }


def _warm(contender: Contender, disabled: tuple[str, ...]) -> Contender:
    with patch.dict(os.environ, {DISABLE: ",".join(disabled)}):
        contender.warm_up()
    return contender


if __name__ == "__main__":
    app()
