"""``ditfastattn build``: build TensorRT engines from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.tensorrt.engines import ENGINES_FOLDER, Engines, Layout
from ditfastattn.runtime.tensorrt.library import CURRENT
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import BundleFolder, EngineLayout, EngineTarget, Json
from ditfastattn.tools.terminal import open_console, print_json, progress_bar

_MEGABYTE = 2**20

Images = Annotated[
    str, typer.Option(help="Least, usual and most images of a call, separated by commas.")
]
MaxEngineMb = Annotated[
    float, typer.Option(min=0.0, help="Most MiB for the engines of all variants together.")
]
TimeLimit = Annotated[float, typer.Option(min=1.0, help="Seconds for each engine.")]
LibraryName = Annotated[
    str, typer.Option(help="tensorrt or tensorrt_rtx. Default: the one that suits this machine.")
]


def build(
    bundle: BundleFolder,
    target: EngineTarget = CURRENT,
    layout: EngineLayout = Layout.AUTO,
    images: Images = "1,1,4",
    max_engine_mb: MaxEngineMb = 2048.0,
    time_limit: TimeLimit = 3600.0,
    library: LibraryName = "",
    as_json: Json = False,
) -> None:
    """Build TensorRT engines from a bundle. Engines that exist already are kept."""
    console = open_console(stderr=as_json)
    with resumable("engines that were built are kept"):
        engines = build_engines(
            console, bundle, target, layout, images, max_engine_mb, time_limit, library
        )
    if as_json:
        print_json(engines.model_dump(mode="json"))


def build_engines(
    console: Console,
    bundle: Path,
    target: str,
    layout: Layout = Layout.AUTO,
    images: str = "1,1,4",
    max_engine_mb: float = 2048.0,
    time_limit: float = 3600.0,
    library: str = "",
) -> Engines:
    """Build with a progress bar, and print what was built and what the builder's logs say."""
    with progress_bar(console, "checking the bundle") as advance:
        engines = ditfastattn.build(
            bundle,
            target=target,
            layout=layout.value,
            images=_three(images),
            max_engine_mb=max_engine_mb,
            time_limit=time_limit,
            library=library,
            on_progress=lambda graph, phase, done: advance(f"{graph}: {phase}", done),
        )
    console.print(engine_table(engines))
    for spec in engines.engines:
        for line in spec.findings:
            console.print(f"{spec.graph}: {line}", soft_wrap=True)
    console.print(f"layout {engines.layout.value}: {engines.reason}", soft_wrap=True)
    written = bundle / ENGINES_FOLDER / engines.target
    console.print(f"wrote {written}, each engine with its log", soft_wrap=True)
    return engines


def engine_table(engines: Engines) -> Table:
    """Return a row per engine: its size, and how many of its attentions are one fused kernel."""
    table = Table(title=f"engines for {engines.target}, {engines.library} {engines.version}")
    table.add_column("graph")
    for column in ("MiB", "attentions", "fused", "seconds"):
        table.add_column(column, justify="right")
    for spec in engines.engines:
        table.add_row(
            spec.graph,
            f"{spec.content.bytes / _MEGABYTE:.1f}",
            str(spec.attentions),
            str(spec.fused),
            f"{spec.seconds:.0f}",
        )
    return table


def _three(text: str) -> tuple[int, int, int]:
    try:
        least, usual, most = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "three integers are needed", where="--images", got=text, expected="for example 1,1,4"
        ) from error
    return least, usual, most
