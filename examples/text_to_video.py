"""Accelerate a text-to-video pipeline: CogVideoX, LTX, Latte and others.

python examples/text_to_video.py --pipeline THUDM/CogVideoX-2b
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import ditfastattn

PROMPTS = ["waves break on a beach", "a train crosses a bridge"]


def main(
    pipeline: str = "THUDM/CogVideoX-2b",
    steps: int = 30,
    min_ssim: float = 0.9,
    call: str = "{}",
    out: Path = Path("text-to-video"),
) -> None:
    """Find a plan on two prompts, accelerate, and save frames; ``call`` adds arguments, as JSON."""
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
        frames = pipe(prompt=prompt, output_type="pil", **arguments).frames[0]
        for number, frame in enumerate(frames):
            frame.save(out / f"{index}-{number:03d}.png")


if __name__ == "__main__":
    typer.run(main)
