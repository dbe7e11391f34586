"""``ditfastattn update-weights``: give a bundle other weights of the same structure."""

from __future__ import annotations

from typing import Annotated

import typer

import ditfastattn
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
from ditfastattn.tools.terminal import open_console, print_json, progress_bar

Revalidate = Annotated[
    bool, typer.Option(help="First measure whether the plan meets its target with these weights.")
]


def update_weights(
    bundle: BundleFolder,
    pipeline: PipelineName = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    guidance: Guidance = None,
    call: CallArguments = "",
    revalidate: Revalidate = False,
    as_json: Json = False,
) -> None:
    """Give a bundle the weights of another pipeline; programs that run it meanwhile go on."""
    manifest = read_manifest(bundle)
    opened = open_pipeline(pipeline, manifest.model.fingerprint.dtype)
    steps = manifest.sampler.steps
    arguments = Generation(steps, guidance, call).arguments(opened, classes, prompts)
    console = open_console(stderr=as_json)
    with progress_bar(console, "capturing", total=None) as advance:
        updated = ditfastattn.update_weights(
            bundle, opened, arguments, revalidate=revalidate, on_progress=advance
        )
    console.print(f"updated {bundle}", soft_wrap=True)
    if as_json:
        print_json({"bundle": str(bundle), "weights": updated.model.fingerprint.weights})
