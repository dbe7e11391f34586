"""Export a bundle in the terminal, and verify one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ditfastattn
from ditfastattn.core.errors import TargetMissedError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.manifest import Manifest

_MEGABYTE = 2**20


def run_export(
    console: Console,
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | None,
    out: Path,
    dtype: str,
    dynamic_batch: bool,
    loop: bool,
) -> Manifest:
    """Export with a progress bar, and say what was written."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("capturing", total=None)

        def show(what: str, done: int, of: int) -> None:
            progress.update(task, description=what, completed=done, total=of)

        manifest = ditfastattn.export(
            pipeline,
            call,
            plan,
            out,
            dtype=dtype,
            dynamic_batch=dynamic_batch,
            loop=loop,
            on_progress=show,
        )
    weights = manifest.files[manifest.weights].bytes / _MEGABYTE
    graphs = sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".onnx"))
    console.print(
        f"wrote {out}: {len(manifest.variants)} step variants for {len(manifest.schedule)} steps, "
        f"{weights:.1f} MiB of weights shared by all, {graphs / _MEGABYTE:.1f} MiB of graphs"
    )
    return manifest


def run_verify(
    console: Console,
    folder: Path,
    pipeline: Any,
    call: Mapping[str, Any],
    runtime: str = "onnx",
) -> None:
    """Compare a bundle with its model and print the differences.

    Raises:
        TargetMissedError: they differ by more than rounding explains.
    """
    if runtime == "tensorrt" and torch.cuda.is_available():
        pipeline.to("cuda")
    found = ditfastattn.verify(folder, pipeline, call, runtime=runtime)
    table = Table(title="bundle and torch model, the same inputs")
    for column in ("step variant", "largest error"):
        table.add_column(column, justify="left" if column == "step variant" else "right")
    for file, error in found.variant_errors.items():
        table.add_row(file, f"{error:.1e}")
    console.print(table)
    error, psnr = found.bounds
    console.print(f"a whole generation: PSNR {found.psnr:.1f} dB (at least {psnr:g})")
    if found.loop_error:
        console.print(
            f"the unrolled loop: its latents' largest error {found.loop_error:.1e} of the largest"
        )
    if not found.passed:
        raise TargetMissedError(
            "the bundle does not compute what its model does",
            where=str(folder),
            got=f"error {max(found.step_errors):.1e}, PSNR {found.psnr:.1f} dB",
            expected=f"at most {error:.0e}, at least {psnr:g} dB",
            remedy="export it again; report it if that does not help",
        )
