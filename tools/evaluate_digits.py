"""Judge a digits pipeline: the fraction of its images classified as the requested digit.

    python -m ditfastattn.tools.evaluate_digits --out digits.json

The classifier's own accuracy on held-out real digits is reported for comparison.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
from ditfastattn.tools.digits_data import NUM_CLASSES, classify, digit_classifier, digit_images
from ditfastattn.tools.digits_pipeline import EMBEDDED_FOLDER, DigitsPipeline, load_pipeline
from ditfastattn.tools.terminal import open_console, spinner

_SPLIT_SEED = 0
_HELD_OUT = 450  # a quarter of the 1797 real digits


@dataclass(frozen=True)
class EvaluationResult:
    """The fraction of images classified as requested, and what it was measured with.

    ``class_accuracy[digit]`` is the accuracy over the images of one digit;
    ``classifier_accuracy`` is the classifier's own on real digits it was not fitted on.
    """

    accuracy: float
    class_accuracy: tuple[float, ...]
    classifier_accuracy: float
    images: int
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    seconds: float


def classifier_accuracy() -> float:
    """Return the accuracy of the classifier on 450 real digits, fitted on the other 1347."""
    images, labels = digit_images(8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    pixels = ((images + 1.0) / 2.0 * 16.0).flatten(1)[order].numpy()
    shuffled = labels[order].numpy()
    classifier = copy.deepcopy(digit_classifier())
    classifier.fit(pixels[_HELD_OUT:], shuffled[_HELD_OUT:])
    return float(classifier.score(pixels[:_HELD_OUT], shuffled[:_HELD_OUT]))


def draw_digits(
    pipeline: DigitsPipeline, images_per_class: int, seed: int, steps: int, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``[B, 1, H, W]`` images in [0, 1] and their labels; each call draws 0 to 9 once."""
    generator = torch.Generator().manual_seed(seed)
    digits = list(range(NUM_CLASSES))
    batches = [
        pipeline(
            digits,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
            return_dict=False,
        )[0].float()
        for _ in range(images_per_class)
    ]
    return torch.cat(batches), torch.tensor(digits * images_per_class)


def evaluate(
    pipeline: DigitsPipeline,
    images_per_class: int = 10,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 2.0,
) -> EvaluationResult:
    """Draw ``images_per_class`` images of each digit and classify them.

    Raises:
        ConfigError: ``images_per_class`` is below 1, or an argument does not suit the pipeline.
    """
    if images_per_class < 1:
        raise ConfigError(
            "there are no images to judge",
            where="images_per_class",
            got=images_per_class,
            expected="1 or more",
            remedy="10 images per class resolve the accuracy to one percent",
        )
    began = time.perf_counter()
    images, labels = draw_digits(pipeline, images_per_class, seed, steps, guidance_scale)
    seconds = time.perf_counter() - began
    right = torch.from_numpy(classify(images * 2.0 - 1.0)) == labels
    return EvaluationResult(
        accuracy=float(right.float().mean()),
        class_accuracy=tuple(
            float(right[labels == digit].float().mean()) for digit in range(NUM_CLASSES)
        ),
        classifier_accuracy=classifier_accuracy(),
        images=len(images),
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=type(pipeline.scheduler).__name__,
        seconds=seconds,
    )


def result_table(result: EvaluationResult) -> Table:
    """Return the result as a table for the terminal."""
    table = Table(title=f"{result.images} images, {result.steps} steps of {result.scheduler}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("classified as the requested digit", f"{result.accuracy:.1%}")
    for digit, accuracy in enumerate(result.class_accuracy):
        table.add_row(f"  digit {digit}", f"{accuracy:.1%}")
    table.add_row("classifier on held-out real digits", f"{result.classifier_accuracy:.1%}")
    table.add_row("guidance scale, seed", f"{result.guidance_scale:g}, {result.seed}")
    table.add_row("seconds per image", f"{result.seconds / result.images:.2f}")
    return table


def run(
    model: Annotated[
        Path, typer.Option(help="Folder of a pipeline. Default: the embedded one.")
    ] = EMBEDDED_FOLDER,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    images_per_class: Annotated[int, typer.Option(help="Images of each digit.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale; 1.0: no guidance.")] = 2.0,
) -> None:
    """Judge the digits that a pipeline draws."""
    console = open_console()
    try:
        pipeline = load_pipeline(model)
        pipeline.set_progress_bar_config(  # type: ignore[no-untyped-call]  # not annotated
            disable=True
        )
        with spinner(console, "drawing digits"):
            result = evaluate(pipeline, images_per_class, seed, steps, guidance_scale)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    console.print(result_table(result))
    if out is not None:
        write_text_atomically(out, json.dumps(asdict(result), indent=1) + "\n")


def main() -> None:
    """Run the command line."""
    typer.run(run)


if __name__ == "__main__":
    main()
