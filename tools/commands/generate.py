"""``ditfastattn generate``: images of many prompts as files, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.plan_choice import OnMismatch
from ditfastattn.runtime.quality import AUTO
from ditfastattn.serving.image_files import RECORD, write_images
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Wanted
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.request import ImageRequest, RequestError
from ditfastattn.tools.commands.generation import read_prompts
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import (
    CallArguments,
    Compiler,
    Device,
    Dtype,
    Guidance,
    Json,
    PipelineName,
)
from ditfastattn.tools.commands.serve import Served, open_server
from ditfastattn.tools.terminal import open_console, print_json, progress_bar


def generate(
    source: Annotated[
        Path, typer.Argument(metavar="BOOK_OR_BUNDLE", help="The folder of a plan book or bundle.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="A text file with one prompt, or one class, per line.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images and their record.")],
    pipeline: PipelineName = "",
    dtype: Dtype = "float32",
    device: Device = "",
    call: CallArguments = "",
    quality: Annotated[
        str, typer.Option(help="Tier of the book. auto: the book's default.")
    ] = AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; the k-th has k more.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Sampler steps. 0: the pipeline's own.")] = 0,
    guidance: Guidance = None,
    negative_prompt: Annotated[str, typer.Option(help="Of all images.")] = "",
    size: Annotated[str, typer.Option(help="Such as 1024x768. auto: the pipeline's own.")] = AUTO,
    batch: Annotated[
        int, typer.Option(min=1, help="Images generated at a time, with the plan's caches each.")
    ] = 1,
    part: Annotated[
        str, typer.Option(help="K/N: every N-th image from the K-th on, for one of N machines.")
    ] = "1/1",
    on_mismatch: Annotated[
        OnMismatch, typer.Option(help="What becomes of images that no plan fits.")
    ] = OnMismatch.ERROR,
    lowering: Compiler = Lowering.INDUCTOR,
    as_json: Json = False,
) -> None:
    """Make an image of each prompt in a file. Another start continues.

    Exit with 1 if images had NaN or infinities; they are not written, and tried again by another
    start.
    """
    texts = read_prompts(prompts)
    own = _part(part, len(texts))
    served = Served(
        source=source.absolute(),
        pipeline=pipeline,
        dtype=dtype,
        device=device,
        call=call,
        on_mismatch=on_mismatch,
        lowering=lowering,
    )
    server = open_server(served, Limits(batch=batch))
    wanted = [
        _wanted(
            server,
            f"{prompts}: prompt {index}",
            {
                "prompt": text,
                "quality": quality,
                "seed": seed + index,
                "num_inference_steps": steps or None,
                "guidance_scale": guidance,
                "negative_prompt": negative_prompt or None,
                "size": size,
            },
        )
        for index, text in enumerate(texts)
    ]
    console = open_console(stderr=True)
    with (
        resumable(f"the images in {out} are kept"),
        progress_bar(console, "generating", len(own)) as advance,
    ):
        broken = write_images(
            server, wanted, out, lambda done: advance(f"{done} of {len(own)}", done), own
        )
    made = len(own) - len(broken)
    if as_json:
        print_json({"folder": str(out), "record": RECORD, "images": made, "not_finite": broken})
    else:
        open_console().print(f"{out}: {made} images, recorded in {RECORD}", soft_wrap=True)
    if broken:
        typer.secho(f"error: {len(broken)} images were not finite: {broken}", err=True, fg="red")
        raise typer.Exit(1)


def _part(text: str, count: int) -> range:
    """Return the indices of the images of ``text``, K/N, out of ``count``.

    Raises:
        ConfigError: it is something else.
    """
    place, _, parts = text.partition("/")
    if not (place.isdecimal() and parts.isdecimal() and 1 <= int(place) <= int(parts)):
        raise ConfigError("not a part", where="--part", got=text, expected="K/N, such as 2/4")
    return range(int(place) - 1, count, int(parts))


def _wanted(server: ImageServer, where: str, body: dict[str, Any]) -> Wanted:
    """Return the image that ``body`` asks for, as a request to the server does.

    Raises:
        ConfigError: the pipeline does not take it.
    """
    try:
        (wanted,) = server.wanted(ImageRequest.model_validate(body))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(first["msg"], where=f"{where}: {field}", got=body.get(field)) from error
    except RequestError as error:
        got = body.get(error.param, "")
        raise ConfigError(error.message, where=f"{where}: {error.param}", got=got) from error
    return wanted
