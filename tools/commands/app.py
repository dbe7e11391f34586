"""Define the ``ditfastattn`` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

import ditfastattn
from ditfastattn.core.errors import ConfigError, EngineError, TargetMissedError
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.window_choice import WindowForm
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.tensorrt.engines import Layout
from ditfastattn.runtime.tensorrt.library import CURRENT
from ditfastattn.tools.commands.generation_options import (
    CallOption,
    Classes,
    Device,
    Dtype,
    Generation,
    Guidance,
    PipelineOption,
    Prompts,
    Steps,
    open_pipeline,
)
from ditfastattn.tools.commands.target_options import (
    LowerBound,
    MaxLatency,
    MaxLpips,
    MetricOption,
    MinClipScore,
    MinPsnr,
    MinSpeedup,
    MinSsim,
    Threshold,
    UpperBound,
    chosen_target,
)

app = typer.Typer(
    help="Make diffusion transformers fast by calibrated attention shortcuts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int, typer.Option(help="Seed of the calibration's generation.")]

Target = Annotated[
    str, typer.Option(help="Compute capability of the GPU, such as sm89; current: this machine's.")
]
LayoutOption = Annotated[
    Layout, typer.Option(help="Engine per step variant, one of all, or the whole loop.")
]


@app.callback()
def main(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log passes; twice: each reason.")
    ] = 0,
) -> None:
    """Set up logging."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logger = logging.getLogger("ditfastattn")
    logger.setLevel(level)
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=Console(stderr=True), show_path=False))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plan, pictures and figures.")] = Path(
        "ditfastattn-demo"
    ),
    steps: Steps = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    min_ssim: Annotated[
        float, typer.Option(help="SSIM to dense that the worst prompt must keep.")
    ] = 0.9,
    repetitions: Annotated[int, typer.Option(min=10, help="Timed generations of each.")] = 20,
    seed: Seed = 0,
) -> None:
    """Calibrate the embedded model, compile it dense and planned, and compare both."""
    from ditfastattn.tools.demo import run_demo

    run_demo(out, steps, guidance, min_ssim, repetitions, seed)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The plan's file.")] = Path("plan.json"),
    pipeline: PipelineOption = "",
    classes: Classes = "0,3,5,8",
    held_out: Annotated[str, typer.Option(help="Classes to validate the plan on.")] = "1,4,6,9",
    prompts: Prompts = None,
    held_out_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to validate the plan on; without it new seeds of --prompts."),
    ] = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    call: CallOption = "",
    dtype: Dtype = "float32",
    device: Device = "",
    min_ssim: MinSsim = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    min_clip_score: MinClipScore = None,
    min_speedup: MinSpeedup = None,
    max_latency: MaxLatency = None,
    threshold: Threshold = None,
    metric: MetricOption = "",
    at_least: LowerBound = None,
    at_most: UpperBound = None,
    method: Annotated[Method, typer.Option(help="How strategies are chosen.")] = Method.AUTO,
    objective: Annotated[Objective, typer.Option(help="What is saved.")] = Objective.LATENCY,
    max_variants: Annotated[
        int, typer.Option(min=0, help="Most distinct step variants; 0: no cap.")
    ] = 0,
    max_cache_mb: Annotated[
        float, typer.Option(min=0.0, help="Most MiB of caches for one image; 0: no cap.")
    ] = 0.0,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Keep caches in half precision, not in the model's.")
    ] = None,
    attention_only: Annotated[
        bool, typer.Option(help="Leave the feed-forward layers as they are.")
    ] = False,
    head_groups: Annotated[
        int, typer.Option(min=1, help="Groups of heads that choose apart; 1: all together.")
    ] = 1,
    windows: Annotated[
        WindowForm, typer.Option(help="A band of the sequence, tiles of the grid, or the better.")
    ] = WindowForm.AUTO,
    lowering: Annotated[
        Lowering, typer.Option(help="What runs the plan when a speed is measured.")
    ] = Lowering.INDUCTOR,
    seed: Seed = 0,
    restart: Annotated[bool, typer.Option(help="Forget an unfinished search.")] = False,
    retarget: Annotated[
        Path | None,
        typer.Option(help="Adapt this plan to the steps or resolution given, and validate it."),
    ] = None,
) -> None:
    """Search the fastest plan that meets a target, and write it as JSON.

    A search that was killed goes on where it was when it is started again.
    """
    from ditfastattn.runtime.search import calibrate as calibrate_pipeline
    from ditfastattn.tools.commands.calibrate import print_outcome, search_progress

    target = chosen_target(
        min_ssim,
        min_psnr,
        max_lpips,
        min_clip_score,
        min_speedup,
        max_latency,
        threshold,
        metric,
        at_least,
        at_most,
    )
    loaded = open_pipeline(pipeline, dtype, device)
    generation = Generation(steps, guidance, call)
    seen = generation.arguments(loaded, classes, prompts)
    again = prompts is not None and held_out_prompts is None
    unseen = None if again else generation.arguments(loaded, held_out, held_out_prompts)
    console = Console()
    with search_progress(console) as show:
        if retarget is None:
            plan = calibrate_pipeline.calibrate(
                loaded,
                seen,
                target=target or calibrate_pipeline.DEFAULT_TARGET,
                held_out=unseen,
                method=method,
                objective=objective,
                max_variants=max_variants,
                max_cache_mb=max_cache_mb,
                cache_dtype=cache_dtype,
                attention_only=attention_only,
                head_groups=head_groups,
                windows=windows,
                lowering=lowering,
                seed=seed,
                out=out,
                restart=restart,
                on_progress=show,
            )
        else:
            plan = ditfastattn.retarget(
                loaded,
                _source(retarget, out),
                seen,
                target=target,
                held_out=unseen,
                seed=seed,
                out=out,
                on_progress=show,
            )
    print_outcome(console, plan)
    console.print(f"wrote {out}")


@app.command()
def inspect(plan: Annotated[Path, typer.Argument(help="The plan's file.")]) -> None:
    """Show what a plan is for and what it does at each step."""
    from ditfastattn.tools.commands.inspect import show_plan

    show_plan(Console(), Plan.load(plan), str(plan))


@app.command()
def validate(
    plan: Annotated[Path, typer.Argument(help="The plan's file.")],
    pipeline: PipelineOption = "",
    classes: Classes = "0,1,2,3,4,5,6,7,8,9",
    prompts: Prompts = None,
    call: CallOption = "",
    dtype: Dtype = "float32",
    device: Device = "",
    min_ssim: MinSsim = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    min_clip_score: MinClipScore = None,
    min_speedup: MinSpeedup = None,
    max_latency: MaxLatency = None,
    metric: MetricOption = "",
    at_least: LowerBound = None,
    at_most: UpperBound = None,
    speed: Annotated[bool, typer.Option(help="Compile, and time, generations too.")] = True,
    lowering: Annotated[
        Lowering, typer.Option(help="What runs the generations that are timed.")
    ] = Lowering.INDUCTOR,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed generations of each; at least one per class.")
    ] = 10,
    seed: Annotated[
        int, typer.Option(help="First seed of the noise; the default is none of a search's.")
    ] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write what was measured as JSON.")] = None,
) -> None:
    """Measure a plan's quality and speed on new prompts; exit with 1 where it misses its target.

    The target is the plan's own, unless one is given.
    """
    from ditfastattn.runtime.search.record.planned_target import metric_bound
    from ditfastattn.tools.commands.validate import validate_plan

    loaded_plan = Plan.load(plan)
    if metric and at_least is None and at_most is None:
        at_least, at_most = metric_bound(loaded_plan)
    target = chosen_target(
        min_ssim,
        min_psnr,
        max_lpips,
        min_clip_score,
        min_speedup,
        max_latency,
        None,
        metric,
        at_least,
        at_most,
    )
    opened = open_pipeline(pipeline, dtype, device)
    validate_plan(
        Console(),
        opened,
        loaded_plan,
        Generation(call=call).arguments(opened, classes, prompts),
        target=target,
        speed=speed,
        lowering=lowering,
        repetitions=repetitions,
        seed=seed,
        out=out,
    )


@app.command()
def export(
    plan: Annotated[
        Path | None, typer.Option(help="The plan; without one the dense model is exported.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("bundle"),
    pipeline: PipelineOption = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    guidance: Guidance = None,
    call: CallOption = "",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; without it the model's.")
    ] = "",
    fixed_batch: Annotated[bool, typer.Option(help="Take one batch size only.")] = False,
    loop: Annotated[bool, typer.Option(help="Also write a whole generation as one graph.")] = False,
    tensorrt: Annotated[bool, typer.Option(help="Then build TensorRT engines of it.")] = False,
    target: Target = CURRENT,
    layout: LayoutOption = Layout.AUTO,
) -> None:
    """Write the model, run by a plan, as a bundle of ONNX graphs with one file of weights."""
    from ditfastattn.tools.commands.build import run_build
    from ditfastattn.tools.commands.export import run_export

    if layout is not Layout.AUTO and not tensorrt:
        raise ConfigError(
            "engines are not asked for, and a layout is theirs",
            where="--layout",
            got=layout.value,
            remedy="add --tensorrt, or give the layout to `ditfastattn build`",
        )
    loop = loop or layout is Layout.LOOP
    loaded = None if plan is None else Plan.load(plan)
    opened = open_pipeline(pipeline, loaded.model.dtype if loaded else "float32")
    steps = 1 if loaded is None else loaded.sampler.steps
    arguments = Generation(steps, guidance, call).arguments(opened, classes, prompts)
    run_export(Console(), opened, arguments, loaded, out, dtype, not fixed_batch, loop)
    if tensorrt:
        run_build(Console(), out, target, layout)


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    target: Target = CURRENT,
    layout: LayoutOption = Layout.AUTO,
    images: Annotated[
        str, typer.Option(help="Least, usual and most images of a call, with commas.")
    ] = "1,1,4",
    max_engine_mb: Annotated[
        float, typer.Option(min=0.0, help="MiB that the engines of all variants may take.")
    ] = 2048.0,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds for each engine.")] = 3600.0,
    library: Annotated[
        str, typer.Option(help="tensorrt or tensorrt_rtx; without it, what suits this machine.")
    ] = "",
) -> None:
    """Build TensorRT engines from a bundle; those that are there already are kept."""
    from ditfastattn.tools.commands.build import run_build

    run_build(Console(), bundle, target, layout, images, max_engine_mb, time_limit, library)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    pipeline: PipelineOption = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of a dense bundle.")] = 20,
    guidance: Guidance = None,
    call: CallOption = "",
    runtime: Annotated[
        str, typer.Option(help="onnx, or tensorrt: the engines for this GPU.")
    ] = "onnx",
) -> None:
    """Compare a bundle with its torch model, step by step; exit 1 where they differ."""
    from ditfastattn.runtime.bundle.manifest import read_manifest
    from ditfastattn.tools.commands.export import run_verify

    manifest = read_manifest(bundle)
    planned = manifest.sampler.steps if manifest.plan_sha256 else steps
    opened = open_pipeline(pipeline, manifest.model.fingerprint.dtype)
    arguments = Generation(planned, guidance, call).arguments(opened, classes, prompts)
    run_verify(Console(), bundle, opened, arguments, runtime)


@app.command()
def doctor() -> None:
    """Say what is installed, what can run here, why not, and what to install."""
    from ditfastattn.tools.commands.doctor import run_doctor

    run_doctor(Console())


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="The demo, or a model of random weights.")] = "demo",
    pipeline: Annotated[
        str, typer.Option(help="A pipeline in place of the model: its folder, or id on the hub.")
    ] = "",
    classes: Classes = "0,3,5,8",
    prompts: Prompts = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    call: CallOption = "",
    dtype: Dtype = "float32",
    device: Device = "",
    peers: Annotated[
        str, typer.Option(help="Caching libraries to compare with, with commas; or all, none.")
    ] = "all",
    repetitions: Annotated[
        int, typer.Option(min=10, help="Timed generations of each, each of another prompt.")
    ] = 10,
    budgets: Annotated[
        str, typer.Option(help="Budgets of drift of our plans, with commas.")
    ] = "0.06,0.09,0.13,0.16,0.2,0.3,0.37,0.45,0.6",
    fractions: Annotated[
        str, typer.Option(help="Plans that keep so much of the attention's FLOPs, too.")
    ] = "",
    max_variants: Annotated[
        int, typer.Option(min=0, help="Most distinct step variants of our plans; 0: no cap.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the figures.")] = Path(
        "benchmarks/bench"
    ),
    restart: Annotated[bool, typer.Option(help="Forget an unfinished run.")] = False,
) -> None:
    """Compare our plans with caching libraries: speed and fidelity, everything in one run.

    Every speedup is over the compiled dense model, timed in turns. A run that was killed goes on.
    """
    from ditfastattn.tools.bench.harness import BenchOptions
    from ditfastattn.tools.bench.models import model_named, pipeline_model
    from ditfastattn.tools.bench.peers import peers_named
    from ditfastattn.tools.commands.bench import run_bench

    options = BenchOptions(
        steps,
        peers_named(peers),
        _numbers(budgets, "--budgets"),
        repetitions,
        max_variants,
        fractions=_numbers(fractions, "--fractions"),
    )
    if pipeline:
        opened = open_pipeline(pipeline, dtype, device)
        arguments = Generation(None, guidance, call).arguments(opened, classes, prompts)
        chosen = pipeline_model(Path(pipeline).name, opened, arguments)
    else:
        chosen = model_named(model)
    run_bench(Console(log_path=False), chosen, options, out, restart)


def _source(plan: Path, out: Path) -> Plan:
    if plan.resolve() == out.resolve():
        raise ConfigError(
            "the plan to adapt would be overwritten",
            where="--retarget and --out",
            got=plan,
            remedy="write the adapted plan to another file",
        )
    return Plan.load(plan)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError as error:
        raise ConfigError(
            "these are not numbers", where=option, got=text, expected="for example 0.2,0.4"
        ) from error


def run() -> None:
    """Run the command: a missed target or failed engine exits with 1, a user's error with 2."""
    try:
        app()
    except (ConfigError, EngineError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(1 if isinstance(error, (TargetMissedError, EngineError)) else 2) from error


if __name__ == "__main__":
    run()
