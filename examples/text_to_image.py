"""Accelerate a text-to-image pipeline: PixArt, Stable Diffusion 3, FLUX and others.

python examples/text_to_image.py --pipeline PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import ditfastattn

PROMPTS = ["a lighthouse in a storm", "a bowl of lemons", "a city at night", "a fox in the snow"]


def main(
    pipeline: str = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    steps: int = 20,
    min_ssim: float = 0.9,
    call: str = "{}",
    out: Path = Path("text-to-image"),
) -> None:
    """Find a plan on four prompts, accelerate, and draw them; ``call`` adds arguments, as JSON."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipe: Any = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=dtype)
    pipe.to("cuda" if on_gpu else "cpu")
    arguments = {"num_inference_steps": steps, **json.loads(call)}
    out.mkdir(parents=True, exist_ok=True)
    plan = ditfastattn.calibrate(
        pipe,
        {"prompt": PROMPTS, **arguments},
        target=ditfastattn.Target.min_ssim(min_ssim),
        out=out / "plan.json",
    )
    ditfastattn.accelerate(pipe, plan)
    for index, prompt in enumerate(PROMPTS):
        pipe(prompt=prompt, **arguments).images[0].save(out / f"{index}.png")


if __name__ == "__main__":
    typer.run(main)
