"""``ditfastattn verify``: compare a bundle with the torch model it was exported from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import TargetMissedError
from ditfastattn.runtime.bundle.manifest import read_manifest
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    BundleFolder,
    CallArguments,
    Classes,
    Guidance,
    Json,
    PipelineName,
    Prompts,
)
from ditfastattn.tools.terminal import open_console, print_json, spinner

DenseSteps = Annotated[
    int, typer.Option(min=1, help="Sampler steps for a dense bundle, which has no plan.")
]
Runtime = Annotated[
    str,
    typer.Option(
        help="onnx; aoti, for bundles of packages; or tensorrt: the engines built for this GPU."
    ),
]


def verify(
    bundle: BundleFolder,
    pipeline: PipelineName = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    steps: DenseSteps = 20,
    guidance: Guidance = None,
    call: CallArguments = "",
    runtime: Runtime = "onnx",
    as_json: Json = False,
) -> None:
    """Compare a bundle with its torch model, step by step. Exit with 1 if they differ."""
    manifest = read_manifest(bundle)
    planned = manifest.sampler.steps if manifest.plan_sha256 else steps
    opened = open_pipeline(pipeline, manifest.model.fingerprint.dtype)
    arguments = Generation(planned, guidance, call).arguments(opened, classes, prompts)
    verify_bundle(open_console(stderr=as_json), bundle, opened, arguments, runtime, as_json)


def verify_bundle(
    console: Console,
    folder: Path,
    pipeline: Any,
    call: Mapping[str, Any],
    runtime: str = "onnx",
    as_json: bool = False,
) -> None:
    """Compare a bundle with its model, and print the differences.

    Raises:
        TargetMissedError: they differ by more than rounding explains.
    """
    if runtime == "tensorrt" and torch.cuda.is_available():
        pipeline.to("cuda")
    with spinner(console, "comparing the bundle with its model, step by step"):
        found = ditfastattn.verify(folder, pipeline, call, runtime=runtime)
    console.print(_variant_errors(found.variant_errors))
    error, psnr = found.bounds
    console.print(f"a whole generation: PSNR {found.psnr:.1f} dB (at least {psnr:g})")
    if found.loop_error:
        console.print(
            f"the unrolled loop: largest error of the latents {found.loop_error:.1e}, relative "
            "to the largest latent"
        )
    if as_json:
        print_json({**asdict(found), "passed": found.passed})
    if not found.passed:
        raise TargetMissedError(
            "the bundle does not compute what its model does",
            where=str(folder),
            got=f"error {max(found.step_errors):.1e}, PSNR {found.psnr:.1f} dB",
            expected=f"at most {error:.0e}, at least {psnr:g} dB",
            remedy="export it again; report a bug if it still differs",
        )


def _variant_errors(errors: Mapping[str, float]) -> Table:
    table = Table(title="bundle against torch model, same inputs")
    table.add_column("step variant")
    table.add_column("largest error", justify="right")
    for file, error in errors.items():
        table.add_row(file, f"{error:.1e}")
    return table
