"""``ditfastattn demo``: an embedded model, dense and by three plans, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import Json
from ditfastattn.tools.embedded import ModelName, embedded_model
from ditfastattn.tools.terminal import open_console, print_json, spinner

_SEARCH = "With --calibrate"

Model = Annotated[ModelName, typer.Option(help="The embedded model to run.")]
Out = Annotated[Path, typer.Option(help="Folder for the plans, pictures and measurements.")]
Repetitions = Annotated[
    int, typer.Option(min=3, help="Images to generate with each model, each of them timed.")
]
Calibrate = Annotated[
    bool, typer.Option(help="Search a plan here, instead of the plans that come with the model.")
]
Steps = Annotated[
    int | None,
    typer.Option(min=2, help="Sampler steps. Default: the model's.", rich_help_panel=_SEARCH),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="Guidance scale. Default: the model's.", rich_help_panel=_SEARCH),
]
WorstSsim = Annotated[
    float | None,
    typer.Option(help="Least SSIM to dense, worst prompt. Default: 0.9.", rich_help_panel=_SEARCH),
]
Seed = Annotated[
    int | None,
    typer.Option(help="First seed of the search's noise. Default: 0.", rich_help_panel=_SEARCH),
]

Peers = Annotated[
    Path | None,
    typer.Option(
        help="A record of `ditfastattn bench` on this model: the report's chart shows its "
        "contenders too.",
    ),
]


def demo(
    model: Model = ModelName.EMOJI,
    out: Out = Path("ditfastattn-demo"),
    repetitions: Repetitions = 5,
    calibrate: Calibrate = False,
    steps: Steps = None,
    guidance: GuidanceScale = None,
    min_ssim: WorstSsim = None,
    seed: Seed = None,
    peers: Peers = None,
    as_json: Json = False,
) -> None:
    """Generate the same images dense and by three plans, all compiled, and compare them."""
    options = {
        "--steps": steps,
        "--guidance": guidance,
        "--min-ssim": min_ssim,
        "--seed": seed,
    }
    given = [name for name, item in options.items() if item is not None]
    if given and not calibrate:
        raise ConfigError(
            "the plans that come with the model have their own steps, guidance and targets",
            where=given[0],
            remedy="add --calibrate, which searches a plan for these options",
        )
    console = open_console(stderr=as_json)
    with spinner(console, "loading diffusers and matplotlib"):
        from ditfastattn.tools.bench.methods import EAGER
        from ditfastattn.tools.demo.result import demo_json
        from ditfastattn.tools.demo.run import NewSearch, run_demo
        from ditfastattn.tools.report.of_bench import recorded_contenders

    search = NewSearch(0.9 if min_ssim is None else min_ssim, steps, guidance, seed or 0)
    shown = (
        recorded_contenders(
            peers, model, steps or embedded_model(model).call["num_inference_steps"], EAGER
        )
        if peers
        else {}
    )
    kept = "what was searched and compiled is kept"
    with resumable(kept):
        result = run_demo(out, repetitions, model, search if calibrate else None, console, shown)
    if as_json:
        print_json(demo_json(result))
