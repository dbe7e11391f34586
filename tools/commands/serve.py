"""``ditfastattn serve``: serve images over HTTP, by OpenAI's API."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.runtime.book.book import MOST_COMPILED
from ditfastattn.runtime.book.manifest import MANIFEST as BOOK
from ditfastattn.runtime.bundle.manifest import MANIFEST as BUNDLE
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.plan_choice import OnMismatch
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.limits import Limits
from ditfastattn.tools.commands.generation import json_object, open_pipeline
from ditfastattn.tools.commands.options import CallArguments, Compiler, Device, Dtype, PipelineName
from ditfastattn.tools.terminal import open_console

if TYPE_CHECKING:
    from fastapi import FastAPI

_LIMITS = "Limits"
_REPLICAS = "Ray Serve"


class Host(StrEnum):
    """Name what hosts the server."""

    AUTO = "auto"
    UVICORN = "uvicorn"
    RAY = "ray"


class Served(Record, frozen=True):
    """What a replica opens; it is handed to each as it is."""

    source: Path
    pipeline: str = ""
    dtype: str = "float32"
    device: str = ""
    call: str = ""
    name: str = ""
    on_mismatch: OnMismatch = OnMismatch.DENSE
    lowering: Lowering = Lowering.INDUCTOR
    keys: Path | None = None
    warm_up: bool = True
    most_compiled: int = MOST_COMPILED
    guard: Annotated[int, Field(ge=0)] = 0
    fall_back: bool = False


def serve(
    source: Annotated[
        Path, typer.Argument(metavar="BOOK_OR_BUNDLE", help="The folder of a plan book or bundle.")
    ],
    pipeline: PipelineName = "",
    dtype: Dtype = "float32",
    device: Device = "",
    call: CallArguments = "",
    name: Annotated[str, typer.Option(help="The model's name in the API.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    on: Annotated[
        Host, typer.Option(help="What hosts the server. auto: Ray Serve if it is installed.")
    ] = Host.AUTO,
    on_mismatch: Annotated[
        OnMismatch, typer.Option(help="What becomes of a request that no plan fits.")
    ] = OnMismatch.DENSE,
    lowering: Compiler = Lowering.INDUCTOR,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line. Default: anyone may ask.")
    ] = None,
    warm_up: Annotated[bool, typer.Option(help="Compile each plan before serving.")] = True,
    most_compiled: Annotated[
        int, typer.Option(min=1, help="Most plans of the book that stay compiled.")
    ] = MOST_COMPILED,
    guard: Annotated[
        int,
        typer.Option(min=0, help="Make one image of so many again, dense, and compare. 0: none."),
    ] = 0,
    fall_back: Annotated[
        bool, typer.Option(help="Run dense what the guard found to break its tier's promise.")
    ] = False,
    queue: Annotated[
        int, typer.Option(min=1, help="Most images that wait.", rich_help_panel=_LIMITS)
    ] = 64,
    seconds: Annotated[
        float,
        typer.Option(help="Most seconds per request, waiting included.", rich_help_panel=_LIMITS),
    ] = 300.0,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Most images generated at a time; see docs.", rich_help_panel=_LIMITS
        ),
    ] = 1,
    turns: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most batches under way, which take turns step by step; see docs.",
            rich_help_panel=_LIMITS,
        ),
    ] = 1,
    max_images: Annotated[
        int, typer.Option(min=1, help="Most images of a request.", rich_help_panel=_LIMITS)
    ] = 4,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Most steps of a request.", rich_help_panel=_LIMITS)
    ] = 100,
    max_side: Annotated[
        int, typer.Option(min=8, help="Greatest height and width.", rich_help_panel=_LIMITS)
    ] = 2048,
    replicas: Annotated[
        int, typer.Option(min=1, help="Least replicas.", rich_help_panel=_REPLICAS)
    ] = 1,
    max_replicas: Annotated[
        int, typer.Option(min=0, help="Most replicas. 0: the least.", rich_help_panel=_REPLICAS)
    ] = 0,
    gpus: Annotated[
        float, typer.Option(min=0, help="GPUs of each replica.", rich_help_panel=_REPLICAS)
    ] = 0.0,
) -> None:
    """Serve images over HTTP, as OpenAI's `POST /v1/images/generations`.

    `quality` names a tier of the plan book; `GET /v1/models` says what each promises.
    """
    try:
        from ditfastattn.serving import host as hosting
    except ImportError as error:
        raise ConfigError(
            "the server is not installed", got=error, remedy="pip install 'ditfastattn[serve]'"
        ) from error
    limits = Limits(
        queue=queue,
        seconds=seconds,
        batch=batch,
        turns=turns,
        images=max_images,
        steps=max_steps,
        side=max_side,
    )
    served = Served(
        source=source.absolute(),
        pipeline=pipeline,
        dtype=dtype,
        device=device,
        call=call,
        name=name,
        on_mismatch=on_mismatch,
        lowering=lowering,
        keys=None if keys is None else keys.absolute(),
        warm_up=warm_up,
        most_compiled=most_compiled,
        guard=guard,
        fall_back=fall_back,
    )
    build = partial(build_app, served, limits)
    ray = on is Host.RAY or (on is Host.AUTO and hosting.has_ray())
    console = open_console(stderr=True)
    first = ", compiling its plans" if warm_up else ""
    host_name = "Ray Serve" if ray else "uvicorn"
    console.print(
        f"opening {source}{first}, for http://{host}:{port} on {host_name}", soft_wrap=True
    )
    if ray:
        count = hosting.Replicas(replicas, max(replicas, max_replicas), gpus)
        hosting.run_ray(build, host, port, limits, count)
    else:
        app = build()
        console.print(f"serving at http://{host}:{port}", soft_wrap=True)
        hosting.run_uvicorn(app, host, port, limits)


def ray_application(arguments: dict[str, Any]) -> Any:
    """Return the application for a config file of Ray Serve, whose ``args`` are ``arguments``.

    They are the fields of ``Served``, and ``limits`` and ``replicas`` as objects.
    """
    from ditfastattn.serving import host as hosting

    given = dict(arguments)
    try:
        limits = Limits(**given.pop("limits", {}))
        replicas = hosting.Replicas(**given.pop("replicas", {}))
    except TypeError as error:
        raise ConfigError(
            "unknown limits or replicas", where="args", got=error, expected="fields of Limits"
        ) from error
    served = Served.from_json(given, "args", "correct the config file")
    return hosting.ray_application(partial(build_app, served, limits), limits, replicas)


def build_app(served: Served, limits: Limits) -> FastAPI:
    """Open what is served, and return its application."""
    from ditfastattn.serving.app import create_app
    from ditfastattn.serving.host import log_as_json, read_keys, require_keys

    log_as_json()
    authenticate = None if served.keys is None else require_keys(read_keys(served.keys))
    server = open_server(served, limits)
    if served.warm_up:
        server.warm_up()
    return create_app(server, authenticate)


def open_server(served: Served, limits: Limits) -> ImageServer:
    """Open a book or a bundle, and the pipeline, and return what makes images by them.

    Raises:
        ConfigError: the source is neither, or the pipeline does not fit.
    """
    if not any((served.source / name).exists() for name in (BOOK, BUNDLE)):
        raise ConfigError(
            "there is neither a plan book nor a bundle",
            where=str(served.source),
            expected=f"a folder with {BOOK} or {BUNDLE}",
            remedy="make one: `ditfastattn book create`, `ditfastattn export`",
        )
    pipeline: Any = open_pipeline(served.pipeline, served.dtype, served.device)
    book, options = None, {}
    if (served.source / BOOK).exists():
        book = ditfastattn.book(served.source, most_compiled=served.most_compiled)
        options = {"lowering": served.lowering}
    else:
        pipeline.transformer = ditfastattn.load(served.source)
    return ImageServer(
        pipeline,
        book,
        name=served.name,
        limits=limits,
        on_mismatch=served.on_mismatch,
        call=json_object(served.call),
        guard=served.guard,
        fall_back=served.fall_back,
        **options,
    )
