"""``ditfastattn bench``: compare our plans with caching libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Device,
    Dtype,
    Guidance,
    Json,
    MaxVariants,
    Prompts,
    Restart,
    Steps,
)
from ditfastattn.tools.terminal import open_console, print_json

Model = Annotated[str, typer.Option(help="digits, emoji, or one with random weights.")]
PipelineInstead = Annotated[
    str, typer.Option(help="A pipeline instead of the model: a folder or an id on the hub.")
]
PeerNames = Annotated[
    str, typer.Option(help="Methods to compare with, separated by commas; or all, or none.")
]
Repetitions = Annotated[
    int, typer.Option(min=10, help="Timed generations of each contender, each of another prompt.")
]
Seeds = Annotated[int, typer.Option(min=2, help="Images to compare, of each contender.")]
Speedups = Annotated[
    str, typer.Option(help="Plans of sites: the speedups predicted of them, separated by commas.")
]
Work = Annotated[
    str,
    typer.Option(help="Plans of whole steps: the shares of the steps that run, with commas."),
]
Fewer = Annotated[
    str, typer.Option(help="The same solver: its steps as shares of --steps, with commas.")
]
Rules = Annotated[
    str, typer.Option(help="Other methods' rules as plans: the shares of the steps that run.")
]
Out = Annotated[Path, typer.Option(help="Folder for the JSON and the figures.")]


def bench(
    model: Model = "digits",
    pipeline: PipelineInstead = "",
    classes: Classes = "0,3,5,8",
    prompts: Prompts = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    call: CallArguments = "",
    dtype: Dtype = "float32",
    device: Device = "",
    peers: PeerNames = "all",
    repetitions: Repetitions = 20,
    seeds: Seeds = 64,
    speedups: Speedups = "1.5,2,2.5,3,4,5",
    work: Work = "0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5",
    fewer: Fewer = "0.2,0.25,0.35,0.45,0.7",
    rules: Rules = "0.25,0.35,0.45",
    max_variants: MaxVariants = 0,
    out: Out = Path("benchmarks/bench"),
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Compare the speed and fidelity of our plans with those of caching libraries, in one run.

    Beside them stand the same solver with fewer steps, and other methods' rules as plans. Every
    speedup is over the compiled dense model, timed in turns. An interrupted run resumes.
    """
    from ditfastattn.tools.bench import models, setup  # these load diffusers and matplotlib
    from ditfastattn.tools.bench.peers import peers_named
    from ditfastattn.tools.bench.run import run_bench

    options = setup.BenchOptions(
        steps,
        peers_named(peers),
        _numbers(speedups, "--speedups"),
        _numbers(work, "--work"),
        _numbers(fewer, "--fewer"),
        _numbers(rules, "--rules"),
        repetitions=repetitions,
        seeds=seeds,
        max_variants=max_variants,
    )
    if pipeline:
        opened = open_pipeline(pipeline, dtype, device)
        arguments = Generation(None, guidance, call).arguments(opened, classes, prompts)
        chosen = models.pipeline_model(Path(pipeline).name, opened, arguments)
    else:
        chosen = models.model_named(model)
    with resumable("the methods that were measured are kept"):
        data = run_bench(open_console(stderr=as_json), chosen, options, out, restart)
    if as_json:
        print_json(data)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError as error:
        raise ConfigError(
            "not a list of numbers", where=option, got=text, expected="for example 0.2,0.4"
        ) from error
