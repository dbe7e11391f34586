"""``ditfastattn demo``: the main job on the embedded model, from calibration to comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditfastattn.tools.commands.options import Seed, Steps

Out = Annotated[Path, typer.Option(help="Folder for the plan, images and measurements.")]
GuidanceScale = Annotated[float, typer.Option(help="Guidance scale.")]
WorstSsim = Annotated[float, typer.Option(help="Least SSIM to dense, worst prompt.")]
Repetitions = Annotated[int, typer.Option(min=10, help="Timed generations of each model.")]


def demo(
    out: Out = Path("ditfastattn-demo"),
    steps: Steps = 20,
    guidance: GuidanceScale = 2.0,
    min_ssim: WorstSsim = 0.9,
    repetitions: Repetitions = 20,
    seed: Seed = 0,
) -> None:
    """Calibrate the embedded model, compile it dense and planned, and compare the two."""
    from ditfastattn.tools.demo import run_demo  # loads diffusers and matplotlib

    run_demo(out, steps, guidance, min_ssim, repetitions, seed)
