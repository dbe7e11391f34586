"""``ditfastattn verify``: compare a bundle with its torch model, or with its golden sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import TargetMissedError
from ditfastattn.runtime.bundle.manifest import Manifest, read_manifest
from ditfastattn.runtime.bundle.specs import public_config
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    BundleFolder,
    CallArguments,
    Classes,
    Guidance,
    PipelineName,
    Prompts,
)
from ditfastattn.tools.terminal import open_console

if TYPE_CHECKING:
    from ditfastattn.export.verify import Verification

DenseSteps = Annotated[
    int, typer.Option(min=1, help="Sampler steps for a dense bundle, which has no plan.")
]
Runtime = Annotated[
    str,
    typer.Option(
        help="onnx, openvino; aoti, for bundles of packages; or tensorrt: this GPU's engines."
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
) -> None:
    """Compare a bundle with its torch model, step by step. Exit with 1 if they differ.

    Without --pipeline, a bundle of another model than the embedded one is compared with the golden
    sample that it holds.
    """
    manifest = read_manifest(bundle)
    if not pipeline and not _is_embedded(manifest):
        verify_bundle(open_console(), bundle, None, {}, runtime)
        return
    planned = manifest.sampler.steps if manifest.plan_sha256 else steps
    opened = open_pipeline(pipeline, manifest.model.fingerprint.dtype)
    arguments = Generation(planned, guidance, call).arguments(opened, classes, prompts)
    verify_bundle(open_console(), bundle, opened, arguments, runtime)


def verify_bundle(
    console: Console, folder: Path, pipeline: Any, call: Mapping[str, Any], runtime: str = "onnx"
) -> None:
    """Compare a bundle with its model, and print the differences.

    Where ``pipeline`` is None it is compared with its golden sample.

    Raises:
        TargetMissedError: they differ by more than rounding explains.
    """
    if pipeline is not None and runtime == "tensorrt" and torch.cuda.is_available():
        pipeline.to("cuda")
    found = ditfastattn.verify(folder, pipeline, call, runtime=runtime)
    reference = "golden sample" if pipeline is None else "torch model"
    console.print(_variant_errors(found.variant_errors, reference))
    error, psnr = found.bounds
    if pipeline is not None:
        console.print(f"a whole generation: PSNR {found.psnr:.1f} dB (at least {psnr:g})")
    if found.latents_error:
        console.print(
            f"a whole generation: largest error of the latents {found.latents_error:.1e}, relative "
            "to the largest latent"
        )
    if found.loop_error:
        console.print(
            f"the unrolled loop: largest error of the latents {found.loop_error:.1e}, relative "
            "to the largest latent"
        )
    if not found.passed:
        raise TargetMissedError(
            "the bundle does not compute what its model does",
            where=str(folder),
            got=f"error {_largest(found):.1e}, PSNR {found.psnr:.1f} dB",
            expected=f"at most {error:.0e}, at least {psnr:g} dB",
            remedy="export it again; report a bug if it still differs",
        )


def _is_embedded(manifest: Manifest) -> bool:
    """Return whether a bundle is of the model that comes with this package."""
    return manifest.model.config == public_config(open_pipeline().transformer)


def _largest(found: Verification) -> float:
    return max(*found.step_errors, found.loop_error, found.latents_error)


def _variant_errors(errors: Mapping[str, float], reference: str) -> Table:
    table = Table(title=f"bundle against {reference}, same inputs")
    table.add_column("step variant")
    table.add_column("largest error", justify="right")
    for file, error in errors.items():
        table.add_row(file, f"{error:.1e}")
    return table
