"""Define the ``ditfastattn`` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ditfastattn.errors import ConfigError
from ditfastattn.passes.plan import Plan
from ditfastattn.runtime.options import DEFAULT_THRESHOLD

app = typer.Typer(
    help="Make diffusion transformers fast by calibrated attention shortcuts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Threshold = Annotated[
    float, typer.Option(help="Error allowed at the model's output; the paper uses 0.025 to 0.15.")
]
Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration's generation.")]


@app.callback()
def main(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log passes; twice: each reason.")
    ] = 0,
) -> None:
    """Set up logging."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.getLogger("ditfastattn").setLevel(level)
    logging.getLogger("ditfastattn").addHandler(handler)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plan, pictures and figures.")] = Path(
        "ditfastattn-demo"
    ),
    steps: Steps = 20,
    guidance: Guidance = 2.0,
    threshold: Threshold = DEFAULT_THRESHOLD,
    repetitions: Annotated[int, typer.Option(min=10, help="Timed generations of each.")] = 20,
    seed: Seed = 0,
) -> None:
    """Calibrate the embedded model, compile it dense and planned, and compare both."""
    from ditfastattn.tools.demo import run_demo

    run_demo(out, steps, guidance, threshold, repetitions, seed)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The plan's file.")] = Path("plan.json"),
    pipeline: Annotated[
        Path | None, typer.Option(help="A folder with a digits pipeline; default: the embedded.")
    ] = None,
    classes: Annotated[str, typer.Option(help="Classes to calibrate on, with commas.")] = "0,3,5,8",
    steps: Steps = 20,
    guidance: Guidance = 2.0,
    threshold: Threshold = DEFAULT_THRESHOLD,
    seed: Seed = 0,
) -> None:
    """Search a plan and write it as JSON."""
    from ditfastattn.tools.calibrate_command import calibrate_with_progress
    from ditfastattn.tools.digits_pipeline import embedded_pipeline, load_pipeline

    loaded = embedded_pipeline() if pipeline is None else load_pipeline(pipeline)
    loaded.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    call = {
        "class_labels": _integers(classes),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    plan = calibrate_with_progress(Console(), loaded, call, threshold, seed)
    plan.save(out)
    typer.echo(f"wrote {out}")


@app.command()
def inspect(plan: Annotated[Path, typer.Argument(help="The plan's file.")]) -> None:
    """Show what a plan is for and what it does at each step."""
    from ditfastattn.tools.inspect_command import show_plan

    show_plan(Console(), Plan.load(plan), str(plan))


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "classes are whole numbers", where="--classes", got=text, expected="for example 0,3,5"
        ) from error


def run() -> None:
    """Run the command; a user's error is printed without a traceback."""
    try:
        app()
    except ConfigError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(2) from error


if __name__ == "__main__":
    run()
