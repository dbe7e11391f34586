"""A whole model with random weights: dense, planned, and planned with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.runtime.specializations import report_of
from ditfastattn.tools.bench.random_models import Architecture, random_pipeline
from ditfastattn.tools.gpu_report.fixed_plans import FIXED, fixed_plan

_REPETITIONS = 10


def measure_model(
    architecture: Architecture,
    steps: int,
    device: str,
    lowering: Lowering,
    name: str,
    keep: Callable[[str, Any], None],
) -> None:
    """Time generations by each fixed plan in turns with the dense model, both by ``lowering``."""
    pipeline = random_pipeline(architecture)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    call = {"image": [0], "num_inference_steps": steps}
    prompts = [Prompt(call, 0)]
    with many_compilations():
        dense = dense_contender(pipeline, prompts, lowering)
        keep(f"{name}: dense, seconds to compile", dense.warm_up())
        for pattern, does in FIXED.items():
            plan = fixed_plan(pipeline, call, does)
            planned = {"planned": planned_contender(pipeline, plan, prompts, lowering)}
            if device == "cuda":
                planned["planned, CUDA graphs"] = planned_contender(
                    pipeline,
                    plan,
                    prompts,
                    lowering,
                    inductor={"triton.cudagraphs": True},
                )
            compiling = {each: contender.warm_up() for each, contender in planned.items()}
            calls = [contender.generate for contender in planned.values()]
            timings = measure_turns(dense.generate, calls, _REPETITIONS)
            report = report_of(plan)
            keep(
                f"{name}: {pattern}",
                {
                    "attention FLOPs": None if report is None else report.attention_kept,
                    "seconds to compile": compiling,
                    "timing": {
                        each: asdict(timing) for each, timing in zip(planned, timings, strict=True)
                    },
                },
            )
