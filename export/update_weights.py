"""Give a bundle the weights of another model of the same structure, such as a style's.

The graphs are written anew as well: what they hold of the weights (products of them, small ones,
two of equal content kept once) may differ. What a program relies on may not: see ``_SAME``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.aoti.options import isa_option
from ditfastattn.export.bundle import export
from ditfastattn.export.options import ExportOptions, Progress, silent
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.files import open_bundle
from ditfastattn.runtime.bundle.manifest import PLAN_FILE, STEP_SUFFIX, Manifest, read_manifest
from ditfastattn.runtime.bundle.packages import PackageSpec
from ditfastattn.runtime.search.judge.validate import validate

log = logging.getLogger(__name__)

_ENGINES: Final = "engines"
_SAME: Final = (  # what a driver of a bundle, and an engine's layout, depend on
    "opset", "sampler", "fixed_batch", "batch_multiple", "timestep", "latent", "shares_guidance",
    "inputs", "guards", "outputs", "variants", "schedule", "slots", "factors", "second", "hoisted",
    "loop", "weights",
)  # fmt: skip


def update_weights(
    folder: str | os.PathLike[str],
    pipeline: Any,
    call: Mapping[str, Any],
    *,
    revalidate: bool = False,
    on_progress: Progress = silent,
) -> Manifest:
    """Replace the weights of the bundle in ``folder`` by those of ``pipeline``'s transformer.

    A program that has loaded the bundle goes on with the old weights; one that loads it meanwhile
    gets the old bundle or the new one, whole. The plan stays: its quality was measured with other
    weights.

    Args:
        folder: the bundle.
        pipeline: one whose transformer has the structure of the bundle's.
        call: what a generation is called with; its resolution and text length are the bundle's.
        revalidate: first measure whether the plan meets its target with these weights.
        on_progress: as for an export.

    Raises:
        ConfigError: structure, shapes or sampler are not the bundle's, or it was replaced
            meanwhile. The bundle is then as it was.
        TargetMissedError: the plan misses its target with these weights.
    """
    opened = open_bundle(folder, read_manifest(folder).format)
    before = opened.manifest
    plan = Plan.load(opened.path(PLAN_FILE)) if before.plan_sha256 else None
    opened.check_in_place()

    def accept(after: Manifest, adopted: Plan | None) -> None:
        _check_same(before, after, str(folder))
        if revalidate and adopted is not None:
            validate(pipeline, adopted, call, speed=False).require()
        opened.check_in_place()

    options = ExportOptions(
        dtype=before.model.dtype,
        dynamic_batch=not before.fixed_batch,
        loop=before.loop is not None,
        timestep=before.timestep,
        golden=bool(before.golden),
        format=before.format,
        isa=isa_option(before.packages.target) if before.packages else "",
        regions=any(graph.file.endswith(STEP_SUFFIX) for graph in before.graphs),
        on_progress=on_progress,
    )
    had_engines = (opened.root / _ENGINES).is_dir()
    manifest = export(pipeline, call, plan, folder, options, accept)
    if had_engines:
        log.warning(
            "%s: the engines held the old weights and are gone; build them anew "
            "(`ditfastattn build`)",
            Path(folder),
        )
    if plan is not None and not revalidate:
        log.warning(
            "%s: the plan's quality was measured with other weights (`ditfastattn validate`, or "
            "revalidate=True)",
            Path(folder),
        )
    return manifest


def _check_same(before: Manifest, after: Manifest, where: str) -> None:
    pairs = [(field, getattr(before, field), getattr(after, field)) for field in _SAME]
    pairs.append(("packages", _packages(before), _packages(after)))
    for field, old, new in pairs:
        if old != new:
            raise ConfigError(
                "the model does not fit the bundle",
                where=f"{where}: {field}",
                got=str(new)[:200],
                expected=str(old)[:200],
                remedy="export a bundle of its own for this model (`ditfastattn export`)",
            )


def _packages(manifest: Manifest) -> dict[str, PackageSpec]:
    """Return what a driver knows of each package."""
    files = manifest.packages.files if manifest.packages else {}
    return {file: spec.model_copy(update={"key": ""}) for file, spec in files.items()}
