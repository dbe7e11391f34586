"""Put `ditfastattn serve` under load, and watch its memory over many generations.

    python -m ditfastattn.tools.benchmark_serving load --out benchmarks/serving
    python -m ditfastattn.tools.benchmark_serving soak --out benchmarks/serving

The server runs in a process of its own; OpenAI's client asks it for images of all tiers, some in
pairs, each with a seed. Every image is compared with the same seed made alone in this process.
The plans are those that come with the emoji model, unless others are given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

import typer

from ditfastattn.core.strict_json import read_json
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.quality import LOSSLESS
from ditfastattn.tools.benchmarking.served_images import (
    Answers,
    Body,
    Twins,
    ask_all,
    make_twins,
)
from ditfastattn.tools.benchmarking.server_process import ServerProcess
from ditfastattn.tools.benchmarking.subject import open_subject
from ditfastattn.tools.commands.generation import integers
from ditfastattn.tools.embedded import ModelName
from ditfastattn.tools.measure import commit, machine, process_memory, slope_per_100, write_record
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
TIERS, DENSE, MIXED = "all tiers", "dense only", "short and long"  # what a server is asked for
MOST_SLOPE = 2**20  # bytes that the server may grow by in 100 generations
MOST_LEVELS = 1  # of 255, that an image of a batch may be from the same seed alone
_SAMPLED = 0.5  # seconds between two looks at the server's memory
_SETTLED = 0.2  # the share of a soak after which memory is held against the bar

Out = Annotated[Path, typer.Option(help="Folder for the JSON.")]
Pipeline = Annotated[str, typer.Option(help="emoji, digits or a folder.")]
BookFolder = Annotated[
    Path | None, typer.Option(help="A plan book. Default: the plans that come with the model.")
]
Prompts = Annotated[str, typer.Option(help="Prompts, ';' between. Default: the model's.")]
Minutes = Annotated[float, typer.Option(help="Send nothing more after so many minutes.")]
Lowered = Annotated[Lowering, typer.Option(help="Of torch.")]


@app.command()
def load(
    out: Out = Path("benchmarks/serving"),
    pipeline: Pipeline = ModelName.EMOJI,
    book: BookFolder = None,
    prompts: Prompts = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each row.")] = 42,
    concurrency: Annotated[str, typer.Option(help="Requests at a time, ',' between.")] = "1,8,32",
    batches: Annotated[str, typer.Option(help="Values of --batch, ',' between.")] = "1,4",
    turns: Annotated[str, typer.Option(help="Values of --turns, ',' between.")] = "1",
    long_steps: Annotated[
        int, typer.Option(min=0, help="Steps of a quarter of short and long requests. 0: no such.")
    ] = 0,
    queue: Annotated[int, typer.Option(min=4, help="Most images that wait.")] = 64,
    minutes: Minutes = 10.0,
    lowering: Lowered = Lowering.INDUCTOR,
) -> None:
    """Measure throughput and latency by tier, batches on and off, against dense only.

    With ``--long-steps`` a row has short requests, of the last tier, and long ones, dense.

    Rows are written as they are measured; another start with the same arguments continues. Exit
    with 1 if an image is not what it must be: equal to the same seed alone without batches, at
    most one level of 255 from it with them.
    """
    until, path = time.monotonic() + 60 * minutes, out / "load.json"
    at_a_time = integers(concurrency, "--concurrency")
    servers = list(product(integers(batches, "--batches"), integers(turns, "--turns")))
    mixes = (TIERS, DENSE, MIXED) if long_steps else (TIERS, DENSE)
    wanted = [(*server, *asked) for server in servers for asked in product(mixes, at_a_time)]
    with open_subject(pipeline, book, prompts, lowering) as subject:
        arguments = subject.arguments(requests=requests, queue=queue, long_steps=long_steps)
        rows = _kept(path, arguments)
        bodies = {TIERS: subject.bodies(requests), DENSE: subject.bodies(requests, (LOSSLESS,))}
        if long_steps:
            bodies[MIXED] = subject.mixed(requests, long_steps)
        twins = make_twins(subject.twins, [body for each in bodies.values() for body in each])
        for size, count in servers:
            missing = [
                key for key in wanted if key[:2] == (size, count) and key not in map(_key, rows)
            ]
            if not missing or time.monotonic() > until:
                continue
            options = {"--batch": size, "--turns": count, "--queue": queue}
            with subject.served(*map(str, chain(*options.items()))) as server:
                for *_, mix, many in missing:
                    answers = Answers()
                    ask_all(server.url, bodies[mix], many, twins, until, answers)
                    if time.monotonic() > until:
                        break  # a row is whole or not there
                    about = {"batch": size, "turns": count, "asked": mix, "concurrency": many}
                    rows.append({**about, **answers.summary()})
                    write_record(path, arguments, rows=rows, complete=len(rows) == len(wanted))
    open_console().print(table_text(rows), soft_wrap=True)
    if len(rows) < len(wanted):
        typer.echo(f"{len(rows)} of {len(wanted)} rows: run it again to continue", err=True)
    if any(row["failed"] or _wrong(row) for row in rows):
        raise typer.Exit(1)


@app.command()
def soak(
    out: Out = Path("benchmarks/serving"),
    pipeline: Pipeline = ModelName.EMOJI,
    book: BookFolder = None,
    prompts: Prompts = "",
    generations: Annotated[int, typer.Option(min=10, help="Images to ask for.")] = 1000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    minutes: Minutes = 8.0,
    lowering: Lowered = Lowering.INDUCTOR,
) -> None:
    """Sample the server's memory. Exit with 1 if it grows by 1 MiB or more per 100 generations.

    The slope is that of least squares over what follows the first fifth.
    """
    until = time.monotonic() + 60 * minutes
    with open_subject(pipeline, book, prompts, lowering) as subject:
        arguments = subject.arguments(generations=generations, concurrency=concurrency)
        bodies = [{**body, "n": 1} for body in subject.bodies(generations)]
        twins = make_twins(subject.twins, bodies)
        with subject.served() as server:
            answers, samples = _soaked(server, bodies, concurrency, twins, until)
    slope = slope_per_100([each for each in samples if each[0] >= _SETTLED * samples[-1][0]])
    result = {
        "resident_bytes": samples,  # by the number of images so far
        "slope_bytes_per_100": slope,
        "complete": len(answers.levels) == generations,
        **answers.summary(),
    }
    write_record(out / "soak.json", arguments, **result)
    open_console().print(
        f"{len(answers.levels)} images: {slope / 2**20:+.2f} MiB per 100, "
        f"{result['images_that_differ']} differ, {len(answers.failed)} failed",
        soft_wrap=True,
    )
    if slope >= MOST_SLOPE or answers.failed or result["images_that_differ"]:
        raise typer.Exit(1)


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of a load in Markdown."""
    lines = [
        "| batch | turns | asked for | at a time | images/s | p50 / p95 / p99 in s, by tier | "
        "refused | differ | levels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        latency = "; ".join(
            f"{tier} {' / '.join(f'{found[rank]:.2f}' for rank in ('p50', 'p95', 'p99'))}"
            for tier, found in sorted(row["latency_seconds"].items())
        )
        cells = (
            *(row[name] for name in ("batch", "turns", "asked", "concurrency")),
            f"{row['images_per_second']:.2f}",
            latency,
            *(row[name] for name in ("refused", "images_that_differ", "most_levels_apart")),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _soaked(
    server: ServerProcess, bodies: Sequence[Body], concurrency: int, twins: Twins, until: float
) -> tuple[Answers, list[tuple[int, int]]]:
    """Return the answers, and how many images there were at each size of the server."""
    answers, samples, ended = Answers(), list[tuple[int, int]](), threading.Event()

    def look() -> None:
        samples.append((len(answers.levels), process_memory(process=server.process.pid)))

    def watch() -> None:
        while not ended.wait(_SAMPLED):
            look()

    look()
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        ask_all(server.url, bodies, concurrency, twins, until, answers)
    finally:
        ended.set()
        watching.join()
    look()
    return answers, samples


def _kept(path: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that an interrupted load of the same arguments, code and machine has left."""
    if not path.exists():
        return []
    found = read_json(path, "the record of a load")
    same = {"machine": machine(), "commit": commit(), "arguments": arguments, "complete": False}
    kept: list[dict[str, Any]] = found["rows"] if same.items() <= found.items() else []
    return kept


def _key(row: dict[str, Any]) -> tuple[int, int, str, int]:
    return row["batch"], row["turns"], row["asked"], row["concurrency"]


def _wrong(row: dict[str, Any]) -> bool:
    allowed = 0 if row["batch"] == 1 else MOST_LEVELS
    return bool(row["most_levels_apart"] > allowed)


if __name__ == "__main__":
    app()
