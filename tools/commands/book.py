"""``ditfastattn book``: make, fill, list, measure and prune a plan book."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import ConfigError, TargetMissedError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.book.manifest import Figures
from ditfastattn.runtime.quality import LOSSLESS
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import DEFAULT_SEED
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Device,
    Dtype,
    PipelineName,
    Prompts,
)
from ditfastattn.tools.embedded import ModelName, embedded_model
from ditfastattn.tools.terminal import open_console, spinner

BookFolder = Annotated[Path, typer.Argument(help="The book's folder.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        help="A tier and its promise, the best one first: high=ssim:0.98. Metrics: ssim, psnr, "
        "lpips, clip-score.",
    ),
]
TierName = Annotated[str, typer.Option(help="The tier that the plan is for.")]
NoiseSeed = Annotated[int, typer.Option(help="First seed of the noise.")]

_METRICS = {
    "ssim": Target.min_ssim,
    "psnr": Target.min_psnr,
    "lpips": Target.max_lpips,
    "clip-score": Target.min_clip_score,
}

book = typer.Typer(
    help="Keep plans in a book: a plan for each resolution, number of steps and tier of quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@book.command()
def create(
    folder: BookFolder,
    tier: Tiers = None,
    default: Annotated[
        str, typer.Option(help="Tier of requests that name none. Default: the first.")
    ] = "",
    shipped: Annotated[
        ModelName | None,
        typer.Option(help="Instead of --tier: the plans that come with an embedded model."),
    ] = None,
) -> None:
    """Make a book of no plans. The tier `lossless`, which is dense, is in every book."""
    if (shipped is None) != bool(tier) or (shipped and default):
        raise ConfigError(
            "a book is made of tiers, or of the plans that come with a model",
            where="ditfastattn book create",
            expected="--tier, once or more, and --default; or --shipped alone",
        )
    if shipped is not None:
        from ditfastattn.tools.demo.plans import shipped_book

        names = shipped_book(embedded_model(shipped), folder).manifest.names
        open_console().print(f"{folder}: {', '.join(names)}", soft_wrap=True)
        return
    wanted = tier or []
    tiers = dict(map(_tier, wanted))
    if len(tiers) != len(wanted):
        raise ConfigError("a tier occurs twice", where="--tier", got=", ".join(wanted))
    ditfastattn.book(folder, tiers, default=default)
    open_console().print(f"{folder}: {LOSSLESS}, {', '.join(tiers)}", soft_wrap=True)


@book.command()
def add(
    folder: BookFolder,
    plan: Annotated[Path, typer.Argument(help="The plan's file.")],
    tier: TierName,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure it now, on new prompts, instead of taking its calibration's figures.",
        ),
    ] = False,
    pipeline: PipelineName = "",
    classes: Classes = "0,1,2,3,4,5,6,7,8,9",
    prompts: Prompts = None,
    call: CallArguments = "",
    dtype: Dtype = "float32",
    device: Device = "",
    seed: NoiseSeed = DEFAULT_SEED,
) -> None:
    """Add a plan to a tier whose promise it keeps."""
    opened, loaded = ditfastattn.book(folder), Plan.load(plan)
    promise = opened.manifest.tier(tier, "--tier").promise
    figures = None
    if measure:
        console = open_console()
        with spinner(console, "measuring the plan"):
            model = open_pipeline(pipeline, dtype, device)
            arguments = Generation(call=call).arguments(model, classes, prompts)
            figures = ditfastattn.measure_plan(model, loaded, arguments, promise, seed=seed)
    entry = opened.add(loaded, tier, figures)
    open_console().print(f"{tier}: {entry.name}, {_described(entry.figures)}", soft_wrap=True)


@book.command(name="list")
def list_(folder: BookFolder) -> None:
    """Show what a book promises, and its plans with what was measured."""
    opened = ditfastattn.book(folder)
    console, broken = open_console(), set(opened.broken())
    tiers = Table(title=f"tiers, {opened.manifest.default} by default")
    for heading in ("tier", "promise, worst prompt"):
        tiers.add_column(heading)
    tiers.add_row(LOSSLESS, "dense")
    for tier in opened.manifest.tiers:
        tiers.add_row(tier.name, tier.described)
    table = Table(title="plans")
    for heading in ("plan", "tier", "steps", "guidance", "inputs", "measured", ""):
        table.add_column(heading, overflow="fold")
    for entry, plan in opened.plans:
        inputs = ", ".join(f"{key} {list(size)}" for key, size in plan.inputs.items())
        table.add_row(
            entry.name,
            entry.tier,
            str(plan.sampler.steps),
            str(plan.sampler.guidance_scale),
            inputs,
            _described(entry.figures),
            "breaks its promise" if entry in broken else "",
        )
    console.print(tiers)
    console.print(table)


@book.command()
def validate(
    folder: BookFolder,
    plan: Annotated[
        list[str] | None, typer.Option(help="Names of the plans to measure. Default: all.")
    ] = None,
    pipeline: PipelineName = "",
    classes: Classes = "0,1,2,3,4,5,6,7,8,9",
    prompts: Prompts = None,
    call: CallArguments = "",
    dtype: Dtype = "float32",
    device: Device = "",
    speed: Annotated[bool, typer.Option(help="Also compile and time generations.")] = False,
    seed: NoiseSeed = DEFAULT_SEED,
) -> None:
    """Measure a book's plans on new prompts. Exit with 1 if one breaks its promise.

    Plans that the call does not fit, such as those of another resolution, keep their figures.
    """
    opened, console = ditfastattn.book(folder), open_console()
    model = open_pipeline(pipeline, dtype, device)
    arguments = Generation(call=call).arguments(model, classes, prompts)
    with spinner(console, "starting") as show:
        found = ditfastattn.validate_book(
            model,
            opened,
            arguments,
            plans=plan or (),
            speed=speed,
            seed=seed,
            on_progress=show,
        )
    for entry, result in found.items():
        if isinstance(result, Figures):
            console.print(f"{entry.tier}: {entry.name}, {_described(result)}", soft_wrap=True)
        elif len(found) == 1:
            raise result
        else:
            console.print(f"{entry.tier}: {entry.name}, not measured: {result}", soft_wrap=True)
    broken = opened.broken()
    if broken:
        raise TargetMissedError(
            "plans break the promise of their tier",
            where=str(folder),
            got=", ".join(f"{entry.tier}: {entry.name}" for entry in broken),
            remedy="remove them with `ditfastattn book prune`, and calibrate others",
        )


@book.command()
def prune(folder: BookFolder) -> None:
    """Remove plans that break their promise, and files that belong to no plan."""
    removed = ditfastattn.book(folder).prune()
    open_console().print(f"removed {', '.join(removed)}" if removed else "nothing to remove")


def _tier(text: str) -> tuple[str, Target]:
    name, _, promise = text.partition("=")
    metric, _, bound = promise.partition(":")
    try:
        return name, _METRICS[metric](float(bound))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "not a tier with a promise",
            where="--tier",
            got=text,
            expected=f"such as high=ssim:0.98, by one of {', '.join(_METRICS)}",
        ) from error


def _described(figures: Figures) -> str:
    found = figures.quality
    speed = "" if figures.speedup is None else f", {figures.speedup:.2f}x"
    return (
        f"{figures.metric} {found.worst:.4g} on the worst of {found.prompts} prompts, "
        f"mean {found.mean:.4g} ({figures.source}){speed}"
    )
