"""Build TensorRT engines in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.tensorrt.engines import ENGINES_FOLDER, Layout

_MEGABYTE = 2**20


def run_build(
    console: Console,
    bundle: Path,
    target: str,
    layout: Layout = Layout.AUTO,
    images: str = "1,1,4",
    max_engine_mb: float = 2048.0,
    time_limit: float = 3600.0,
    library: str = "",
) -> None:
    """Build with a progress bar, and say what was built and what its logs tell."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("checking the bundle", total=1.0)

        def show(graph: str, phase: str, done: float) -> None:
            progress.update(task, description=f"{graph}: {phase}", completed=done)

        engines = ditfastattn.build(
            bundle,
            target=target,
            layout=layout.value,
            images=_three(images),
            max_engine_mb=max_engine_mb,
            time_limit=time_limit,
            library=library,
            on_progress=show,
        )
    table = Table(title=f"engines for {engines.target}, {engines.library} {engines.version}")
    for column in ("graph", "MiB", "attentions", "fused", "seconds"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for spec in engines.engines:
        table.add_row(
            spec.graph,
            f"{spec.content.bytes / _MEGABYTE:.1f}",
            str(spec.attentions),
            str(spec.fused),
            f"{spec.seconds:.0f}",
        )
    console.print(table)
    for spec in engines.engines:
        for line in spec.findings:
            console.print(f"{spec.graph}: {line}")
    console.print(f"layout {engines.layout.value}: {engines.reason}")
    console.print(f"wrote {bundle / ENGINES_FOLDER / engines.target}, each engine with its log")


def _three(text: str) -> tuple[int, int, int]:
    try:
        least, usual, most = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "three numbers are wanted", where="--images", got=text, expected="such as 1,1,4"
        ) from error
    return least, usual, most
