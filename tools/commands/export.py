"""``ditfastattn export``: write a bundle, and build engines of it if asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.export.triton.options import Backend, check_repository
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.manifest import Format, Manifest
from ditfastattn.runtime.tensorrt.engines import Layout
from ditfastattn.runtime.tensorrt.library import CURRENT
from ditfastattn.tools.commands.build import build_engines
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    EngineLayout,
    EngineTarget,
    Guidance,
    Json,
    PipelineName,
    Prompts,
)
from ditfastattn.tools.terminal import open_console, print_json, progress_bar

_MEGABYTE = 2**20

PlanToExport = Annotated[
    Path | None, typer.Option(help="The plan. Default: none, export the dense model.")
]
Out = Annotated[Path, typer.Option(help="Folder to write the bundle to.")]
CastTo = Annotated[
    str, typer.Option(help="float32, float16 or bfloat16. Default: the model's dtype.")
]
FixedBatch = Annotated[bool, typer.Option(help="Fix the batch size.")]
Loop = Annotated[bool, typer.Option(help="Also write a whole generation as one graph.")]
WrittenAs = Annotated[
    Format, typer.Option(help="onnx, or pt2: AOTInductor packages, for torch's own runtime.")
]
Isa = Annotated[
    str,
    typer.Option(help="Vector instructions of packages: avx2 or avx512. Default: the best here."),
]
Regions = Annotated[
    bool, typer.Option(help="Compile packages of blocks, once for all equal ones, not of steps.")
]
Engines = Annotated[bool, typer.Option(help="Build TensorRT engines afterwards.")]
TritonRepo = Annotated[
    Path | None,
    typer.Option(help="Also write the loop as a model of this repository of Triton's."),
]
TritonBackend = Annotated[
    Backend, typer.Option(help="What runs it there; python, for servers without onnxruntime's.")
]
TritonImages = Annotated[int, typer.Option(min=1, help="Most images of requests joined there.")]


def export(
    plan: PlanToExport = None,
    out: Out = Path("bundle"),
    pipeline: PipelineName = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    guidance: Guidance = None,
    call: CallArguments = "",
    dtype: CastTo = "",
    fixed_batch: FixedBatch = False,
    loop: Loop = False,
    format: WrittenAs = Format.ONNX,
    isa: Isa = "",
    regions: Regions = False,
    tensorrt: Engines = False,
    target: EngineTarget = CURRENT,
    layout: EngineLayout = Layout.AUTO,
    triton_repo: TritonRepo = None,
    triton_backend: TritonBackend = Backend.ONNXRUNTIME,
    triton_images: TritonImages = 4,
    as_json: Json = False,
) -> None:
    """Export the model, run by a plan, as a bundle of graphs that share one weights file."""
    if layout is not Layout.AUTO and not tensorrt:
        raise ConfigError(
            "a layout was given, and no engines are built",
            where="--layout",
            got=layout.value,
            remedy="add --tensorrt, or give the layout to `ditfastattn build`",
        )
    if tensorrt and format is not Format.ONNX:
        raise ConfigError(
            "engines are built from ONNX graphs",
            where="--format",
            got=format.value,
            remedy="leave out --tensorrt, or export with --format onnx",
        )
    if triton_repo is not None:
        check_repository(out, triton_repo)
    loaded = None if plan is None else Plan.load(plan)
    opened = open_pipeline(pipeline, loaded.model.dtype if loaded else "float32")
    steps = 1 if loaded is None else loaded.sampler.steps
    arguments = Generation(steps, guidance, call).arguments(opened, classes, prompts)
    console = open_console(stderr=as_json)
    with_loop = loop or layout is Layout.LOOP or triton_repo is not None
    options = {"dtype": dtype, "dynamic_batch": not fixed_batch, "loop": with_loop}
    options |= {"format": format, "isa": isa, "regions": regions}
    with resumable("graphs and engines that were written are kept"):
        manifest = write_bundle(console, opened, arguments, loaded, out, options)
        if tensorrt:
            build_engines(console, out, target, layout)
    printed = {"bundle": str(out), "manifest": manifest.model_dump(mode="json")}
    if triton_repo is not None:
        version = ditfastattn.export_triton(
            out, triton_repo, backend=triton_backend, images=triton_images
        )
        console.print(f"wrote {version}", soft_wrap=True)
        printed["triton"] = str(version)
    if as_json:
        print_json(printed)


def write_bundle(
    console: Console,
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | None,
    out: Path,
    options: Mapping[str, Any],
) -> Manifest:
    """Export with a progress bar, and print what was written; ``options`` as ``export`` takes."""
    with progress_bar(console, "capturing", total=None) as advance:
        manifest = ditfastattn.export(pipeline, call, plan, out, on_progress=advance, **options)
    weights = manifest.files[manifest.weights].bytes / _MEGABYTE
    graphs = sum(
        spec.bytes for name, spec in manifest.files.items() if name.endswith((".onnx", ".pt2"))
    )
    console.print(
        f"wrote {out}: {len(manifest.variants)} step variants for {len(manifest.schedule)} steps, "
        f"{weights:.1f} MiB of shared weights, {graphs / _MEGABYTE:.1f} MiB of graphs",
        soft_wrap=True,
    )
    return manifest
