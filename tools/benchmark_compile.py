"""Measure what compiling a plan costs, and what running a step in regions costs.

    python -m ditfastattn.tools.benchmark_compile cost --out benchmarks/compile

The model is a deep, narrow DiT with random weights. Each measurement runs in a process of its own
with an empty folder for Inductor's caches, so that nothing is found ready.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.graph.ir import clone
from ditfastattn.passes.plan.schema import Calibration, Plan, Strategy
from ditfastattn.runtime.lowering import Lowering, OutlinedStep, compiled_regions, lower
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.search.measure.contender import Contender
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.measure.timing import measure_pairs, summarize
from ditfastattn.tools.bench.models import DEMO
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

# How often each strategy is drawn; the later steps of a plan share more than this.
WEIGHTS = {
    Strategy.FULL: 2,
    Strategy.WINDOW: 3,
    Strategy.SHARE_STEP: 4,
    Strategy.SHARE_CFG: 2,
    Strategy.WINDOW_SHARE_CFG: 3,
    Strategy.EXTRAPOLATE: 4,
}

Layers = Annotated[int, typer.Option(min=1, help="Layers of the model.")]
Steps = Annotated[int, typer.Option(min=2, help="Sampler steps.")]
Variants = Annotated[int, typer.Option(min=2, help="Distinct steps of the plan.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON.")]
OUT = Path("benchmarks/compile")
_RUN = OutlinedStep.__call__


class Backend(StrEnum):
    """Name what compiles the model."""

    STOCK = "stock"  # torch.compile, dense
    OUTLINED = "outlined"  # the plan, equal blocks once
    WHOLE = "whole"  # the plan, one graph per variant


def make_pipeline(layers: int) -> DigitsPipeline:
    """Return a pipeline of a DiT of 256 tokens and 4 heads of 32, the same one each time."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=10,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler: Any = DDIMScheduler(clip_sample=False)  # not the enumeration diffusers declares
    pipeline = DigitsPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def make_rows(sites: Sequence[Site], steps: int, variants: int) -> list[tuple[Strategy, ...]]:
    """Return a full first step, then ``variants - 1`` drawn rows in turns, each over some steps."""
    random_ = random.Random(0)
    rows = [(Strategy.FULL,) * len(sites)]
    computed = [1] * len(sites)

    def draw(index: int) -> Strategy:
        legal = [
            strategy
            for strategy in WEIGHTS
            if strategy not in sites[index].declined and computed[index] >= strategy.outputs_needed
        ]
        return random_.choices(legal, [WEIGHTS[strategy] for strategy in legal])[0]

    of_step = [step * (variants - 1) // (steps - 1) for step in range(steps - 1)]
    for _, alike in groupby(of_step):
        row = tuple(map(draw, range(len(sites))))
        for _ in alike:
            rows.append(row)
            computed = [n + s.computes for n, s in zip(computed, row, strict=True)]
    return rows


def make_plan(pipeline: DigitsPipeline, prompt: Prompt, variants: int) -> Plan:
    """Return a plan of ``variants`` distinct steps for ``pipeline``; nothing is compiled.

    Each layer has another of the windows that fit it, in turns.
    """
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        turns = [
            replace(site, window=site.windows[place % len(site.windows)]) if site.windows else site
            for place, site in enumerate(session.sites)
        ]
        session.take_sites(turns)
        rows = make_rows(session.sites, session.steps, variants)
        calibration = Calibration(method="manual")
        return session.plan(rows, session.timesteps, calibration, merge_variants=True)


@app.command()
def cost(
    out: Out = OUT,
    layers: Layers = 28,
    steps: Steps = 50,
    variants: Variants = 20,
    whole: Annotated[bool, typer.Option(help="Also without outlining: slow.")] = False,
) -> None:
    """Time compiling a whole plan against compiling the dense model by ``torch.compile``."""
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
    """Print what compiling took in this process: the first generation less a warm one."""
    _pay_once()
    pipeline, prompt = make_pipeline(layers), _prompt(steps)
    if backend is Backend.STOCK:
        model = torch.compile(pipeline.transformer, fullgraph=True, dynamic=False)
    else:
        plan = make_plan(pipeline, prompt, variants)
        torch._dynamo.reset()
        model = _ours(pipeline, plan=plan, outline=backend is Backend.OUTLINED)
    contender = Contender(pipeline, model, [prompt])
    before = _cpu_seconds()
    first = _seconds(lambda: contender.generate(0))
    between = _cpu_seconds()
    warm = _seconds(lambda: contender.generate(0))
    found = {
        "compile_seconds": first - warm,
        "compile_cpu_seconds": (between - before) - (_cpu_seconds() - between),
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
    """Time a dense step, compiled whole by ``torch.compile`` and by us in regions, in turns."""
    _write(
        out / "run.json",
        _alone("pairs", f"--layers={layers}", f"--repetitions={repetitions}"),
        layers=layers,
        repetitions=repetitions,
    )


@app.command()
def pairs(layers: Layers = 28, repetitions: int = 50) -> None:
    """Print the timing of dense steps, and of our dispatch with the regions left out."""
    pipeline, prompt = make_pipeline(layers), _prompt(2)
    with open_session(pipeline, prompt) as session, torch.no_grad():
        step = lower(clone(session.captured.module), session.example, Lowering.INDUCTOR, {})
        assert isinstance(step, OutlinedStep)
        dispatch = _dispatch_seconds(step, session.example)
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


def _dispatch_seconds(step: OutlinedStep, args: Sequence[Tensor]) -> float:
    """Return the median time of ``step`` with regions that return what they returned before."""
    empty = _emptied(step, args)
    return summarize([_seconds(lambda: empty(args)) for _ in range(1000)]).median


def _emptied(step: OutlinedStep, args: Sequence[Tensor]) -> OutlinedStep:
    """Run ``step`` once; return one whose regions do nothing but return what they returned."""
    results: list[Any] = []

    def recorded(region: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            results.append(region(*inputs))
            return results[-1]

        return run

    def ready(result: Any) -> Callable[..., Any]:
        return lambda *_: result

    _RUN(
        replace(step, calls=tuple(replace(call, run=recorded(call.run)) for call in step.calls)),
        args,
    )
    paired = zip(step.calls, results, strict=True)
    return replace(step, calls=tuple(replace(call, run=ready(result)) for call, result in paired))


@app.command()
def dispatch(
    out: Out = OUT,
    plan: Annotated[Path, typer.Option(help="A plan of the demo.")] = Path(
        "benchmarks/demo/plan.json"
    ),
    repetitions: Annotated[int, typer.Option(min=10, help="Timed pairs of generations.")] = 20,
) -> None:
    """Time the demo's calls of the model by a plan, and the same calls with empty regions.

    What is left then is guards, clock, caches and dispatch.
    """
    loaded, pipeline = Plan.load(plan), DEMO.open()
    prompt = Prompt({**DEMO.call(3), "num_inference_steps": loaded.sampler.steps}, 0)
    model = _ours(pipeline, plan=loaded)
    calls = _recorded_calls(pipeline, prompt)
    emptied: dict[int, OutlinedStep] = {}

    def generation(_: int) -> None:
        with torch.no_grad():
            for args, named in calls:
                model(*args, **named)

    def run_empty(step: OutlinedStep, args: Sequence[Tensor]) -> list[Any]:
        if id(step) not in emptied:
            emptied[id(step)] = _emptied(step, args)
        return _RUN(emptied[id(step)], args)

    def overhead(_: int) -> None:
        with patch.object(OutlinedStep, "__call__", run_empty):
            generation(0)

    for warm in (generation, generation, overhead, overhead):
        warm(0)
    timing = measure_pairs(generation, overhead, repetitions)
    results = {
        "generation_seconds": asdict(timing.baseline),
        "overhead_seconds": asdict(timing.candidate),
        "overhead_of_generation": timing.candidate.median / timing.baseline.median,
        "variants": len(emptied),
    }
    _write(out / "dispatch.json", results, steps=len(calls), repetitions=repetitions)


def _recorded_calls(pipeline: Any, prompt: Prompt) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of the model's calls in one dense generation."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(pipeline, prompt)
    finally:
        hook.remove()
    return calls


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


def _pay_once(size: int = 8) -> None:
    """Let Inductor import what it needs and find the compiler: not the cost of any model."""
    with torch.no_grad():
        torch.compile(torch.nn.Linear(size, size).eval())(torch.randn(size, size))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _cpu_seconds() -> float:
    """Return the processor time so far, of the C++ compiler too: other load does not count."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def _alone(*arguments: str) -> dict[str, Any]:
    """Run a command of this module in a process with empty compiler caches; return its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "ditfastattn.tools.benchmark_compile", *arguments],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _write(path: Path, results: dict[str, Any], **arguments: int) -> None:
    data = {"machine": machine(), "arguments": arguments, "results": results}
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=results)


if __name__ == "__main__":
    app()
