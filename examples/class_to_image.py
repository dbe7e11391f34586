"""Accelerate a class-conditional pipeline: DiT.

python examples/class_to_image.py --pipeline facebook/DiT-XL-2-512 --classes 207,360
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

import ditfastattn


def main(
    pipeline: str = "facebook/DiT-XL-2-512",
    classes: str = "207,360,387,974",
    steps: int = 20,
    min_ssim: float = 0.9,
    out: Path = Path("class-to-image"),
) -> None:
    """Find a plan, accelerate, and draw one image per class."""
    labels = [int(label) for label in classes.split(",")]
    pipe = DiTPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    plan = ditfastattn.calibrate(
        pipe,
        {"class_labels": labels, "num_inference_steps": steps},
        target=ditfastattn.Target.min_ssim(min_ssim),
        out=out / "plan.json",
    )
    ditfastattn.accelerate(pipe, plan)
    images = pipe(class_labels=labels, num_inference_steps=steps).images
    for label, image in zip(labels, images, strict=True):
        image.save(out / f"{label}.png")


if __name__ == "__main__":
    typer.run(main)
