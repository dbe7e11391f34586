"""Measure the cost of compiling a plan, and of running a step in regions.

    python -m ditfastattn.tools.benchmark_compile cost --out benchmarks/compile

The model is a deep, narrow DiT with random weights. Each measurement runs in its own process with
an empty folder for Inductor's caches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.fx import GraphModule

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.graph.ir import clone
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.current_generation import generation as in_context
from ditfastattn.runtime.lowering import Lowering, OutlinedStep, compiled_regions, lower
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.measure.contender import Contender
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.timing import measure_pairs, measure_turns
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.benchmarking.compiling import cpu_seconds, run_uncached, start_inductor
from ditfastattn.tools.benchmarking.dispatch import (
    EmptiedSteps,
    dispatch_seconds,
    recorded_calls,
    seconds,
)
from ditfastattn.tools.benchmarking.plans import make_pipeline, make_plan
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


Layers = Annotated[int, typer.Option(min=1, help="Layers of the model.")]
Steps = Annotated[int, typer.Option(min=2, help="Sampler steps.")]
Variants = Annotated[int, typer.Option(min=2, help="Distinct steps of the plan.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON.")]
OUT = Path("benchmarks/compile")


class Backend(StrEnum):
    """What compiles the model."""

    STOCK = "stock"  # torch.compile, dense
    OUTLINED = "outlined"  # the plan, equal blocks once
    WHOLE = "whole"  # the plan, one graph per variant


@app.command()
def cost(
    out: Out = OUT,
    layers: Layers = 28,
    steps: Steps = 50,
    variants: Variants = 20,
    whole: Annotated[bool, typer.Option(help="Also without outlining, which is slow.")] = False,
) -> None:
    """Time compiling a whole plan against ``torch.compile`` of the dense model."""
    backends = [Backend.STOCK, Backend.OUTLINED, *([Backend.WHOLE] if whole else [])]
    shape = [f"--layers={layers}", f"--steps={steps}", f"--variants={variants}"]
    results = {str(backend): _alone("once", str(backend), *shape) for backend in backends}
    stock = results[Backend.STOCK]
    for result in results.values():
        for measure in ("compile_seconds", "compile_cpu_seconds"):
            result[f"{measure}_of_stock"] = result[measure] / stock[measure]
    _write(out / "cost.json", results, layers=layers, steps=steps, variants=variants)


@app.command()
def once(backend: Backend, layers: Layers = 28, steps: Steps = 50, variants: Variants = 20) -> None:
    """Print the cost of compiling in this process: the first generation minus a warm one."""
    start_inductor()
    pipeline, prompt = make_pipeline(layers), _prompt(steps)
    if backend is Backend.STOCK:
        model = torch.compile(pipeline.transformer, fullgraph=True, dynamic=False)
    else:
        plan = make_plan(pipeline, prompt, variants)
        torch._dynamo.reset()
        model = _ours(pipeline, plan=plan, outline=backend is Backend.OUTLINED)
    contender = Contender(pipeline, model, [prompt])
    before = cpu_seconds()
    first = seconds(lambda: contender.generate(0))
    between = cpu_seconds()
    warm = seconds(lambda: contender.generate(0))
    found = {
        "compile_seconds": first - warm,
        "compile_cpu_seconds": (between - before) - (cpu_seconds() - between),
        "warm_generation_seconds": warm,
        "distinct_regions": compiled_regions(),
    }
    print(json.dumps(found))


@app.command()
def run(
    out: Out = OUT,
    layers: Layers = 28,
    repetitions: Annotated[int, typer.Option(min=10, help="Timed pairs of steps.")] = 50,
) -> None:
    """Time a dense step: compiled whole by ``torch.compile``, and in regions by us, in turns."""
    _write(
        out / "run.json",
        _alone("pairs", f"--layers={layers}", f"--repetitions={repetitions}"),
        layers=layers,
        repetitions=repetitions,
    )


@app.command()
def pairs(layers: Layers = 28, repetitions: int = 50) -> None:
    """Print the timing of dense steps, and of our dispatch without the regions."""
    pipeline, prompt = make_pipeline(layers), _prompt(2)
    with open_session(pipeline, prompt) as session, torch.no_grad():
        step = lower(clone(session.captured.module), session.example, Lowering.INDUCTOR, {})
        assert isinstance(step, OutlinedStep)
        dispatch = dispatch_seconds(step, session.example)
    torch._dynamo.reset()
    stock = torch.compile(pipeline.transformer, fullgraph=True, dynamic=False)
    ours = _ours(pipeline, dense=True)
    call = {
        "hidden_states": torch.randn(2, 1, 32, 32),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([3, 10]),
        "return_dict": False,
    }
    with torch.no_grad():
        difference = float((stock(**call)[0] - ours(**call)[0]).abs().max())
        timing = measure_pairs(lambda _: stock(**call), lambda _: ours(**call), repetitions)
    found = {
        "stock_seconds": asdict(timing.baseline),
        "outlined_seconds": asdict(timing.candidate),
        "speedup": asdict(timing.speedup),
        "largest_difference": difference,
        "regions": len(step.calls),
        "dispatch_seconds": dispatch,
        "dispatch_of_step": dispatch / timing.candidate.median,
    }
    print(json.dumps(found))


@app.command()
def dispatch(
    out: Out = OUT,
    plan: Annotated[Path, typer.Option(help="A plan of the demo.")] = Path(
        "benchmarks/demo/plan.json"
    ),
    repetitions: Annotated[int, typer.Option(min=10, help="Timed pairs of generations.")] = 20,
) -> None:
    """Time the demo's calls of the planned model, and the same calls with empty regions.

    The latter leave guards, clock, caches and dispatch, with all checks. In turns with them go the
    same without our checks (of weights, and of latents and conditions), and the guards of
    ``torch.compile`` alone.
    """
    loaded, pipeline = Plan.load(plan), DIGITS.open()
    prompt = Prompt({**DIGITS.call(3), "num_inference_steps": loaded.sampler.steps}, 0)
    checked, bare = _ours(pipeline, plan=loaded), _guards_alone(pipeline)
    unchecked = _ours(pipeline, plan=loaded, check_weights="never")
    calls = recorded_calls(pipeline, prompt)
    emptied = EmptiedSteps()

    def run_calls(model: Any) -> None:
        with torch.no_grad():
            for args, named in calls:
                model(*args, **named)

    def generation(_: int) -> None:
        run_calls(checked)

    def without_checks(_: int) -> None:
        with in_context():  # whose calls need not be told from those of others
            run_calls(unchecked)

    def overhead(_: int) -> None:
        emptied.run(generation)

    def overhead_without_checks(_: int) -> None:
        emptied.run(without_checks)

    def guards(_: int) -> None:
        run_calls(bare)

    candidates = [overhead, overhead_without_checks, guards]
    for warm in 2 * (generation, without_checks, *candidates):
        warm(0)
    timed = measure_turns(generation, candidates, repetitions)
    whole = timed[0].baseline.median
    results = {
        "generation_seconds": asdict(timed[0].baseline),
        "overhead_seconds": asdict(timed[0].candidate),
        "overhead_without_checks_seconds": asdict(timed[1].candidate),
        "guards_of_torch_seconds": asdict(timed[2].candidate),
        "overhead_of_generation": timed[0].candidate.median / whole,
        "checks_of_generation": (timed[0].candidate.median - timed[1].candidate.median) / whole,
        "guards_of_generation": timed[2].candidate.median / whole,
        "variants": len(emptied),
    }
    _write(out / "dispatch.json", results, steps=len(calls), repetitions=repetitions)


def _guards_alone(pipeline: DigitsPipeline) -> Any:
    """Return the dense model compiled by ``torch.compile`` to what returns a stored result."""

    def backend(module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        stored: list[Any] = []

        def run(*args: Any) -> Any:
            if not stored:
                stored.append(module(*args))
            return stored[0]

        return run

    return torch.compile(pipeline.transformer, backend=backend, fullgraph=True, dynamic=False)


def _ours(pipeline: DigitsPipeline, **options: Any) -> Any:
    return torch.compile(
        pipeline.transformer,
        backend="ditfastattn",
        fullgraph=True,
        dynamic=False,
        options=options,
    )


def _prompt(steps: int) -> Prompt:
    call = {"class_labels": [3], "num_inference_steps": steps, "guidance_scale": 2.0}
    return split_prompts(call, 0)[0]


def _alone(*arguments: str) -> dict[str, Any]:
    return run_uncached("benchmark_compile", *arguments)


def _write(path: Path, results: dict[str, Any], **arguments: int) -> None:
    data = {"machine": machine(), "arguments": arguments, "results": results}
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=results)


if __name__ == "__main__":
    app()
