"""Load a bundle of AOTInductor packages as a transformer for a pipeline."""

from __future__ import annotations

import logging
import os

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.strict_json import parse_json
from ditfastattn.runtime.aoti.package import AotiPackage, PackageFile, RegionStep
from ditfastattn.runtime.aoti.target import check_target
from ditfastattn.runtime.aoti.weights import open_weights
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.manifest import EXPORT_AGAIN, Format
from ditfastattn.runtime.bundle.packages import StepCalls
from ditfastattn.runtime.bundle.transformer import BundleTransformer, Engine

log = logging.getLogger(__name__)


def load(folder: str | os.PathLike[str]) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder`` with torch's AOTInductor.

    Its ``weights`` are those that all packages compute with: what is written into one of them
    changes every step from then on.

    Raises:
        ConfigError: the bundle is incomplete, not valid, or holds ONNX graphs; its packages were
            compiled for another torch, processor or GPU.
    """
    opened = open_bundle(folder, Format.PT2)
    manifest, packages = opened.manifest, opened.manifest.packages
    assert packages is not None  # the format says so
    check_target(packages.target, str(opened.root))
    device = torch.device(packages.target.device)
    name = manifest.weights
    weights = open_weights(opened.opened(name), opened.path(name), device)

    loaded = {
        file: AotiPackage(
            PackageFile(opened.path(file), opened.opened(file)), spec, weights, device
        )
        for file, spec in packages.files.items()
    }

    def engine(file: str) -> Engine:
        if file in loaded:
            return loaded[file]
        where = str(opened.path(file))
        data = parse_json(bytes(opened.content(file)).decode(), where, "the step", EXPORT_AGAIN)
        return RegionStep(StepCalls.from_json(data, where, EXPORT_AGAIN), loaded, weights, where)

    variants = [engine(variant.file) for variant in manifest.variants]
    hoisted = engine(manifest.hoisted.file) if manifest.hoisted else None
    opened.check_unchanged()
    opened.keep_only({name})
    log.info("%s: %d packages on %s", opened.root, len(loaded), packages.target.isa or device)

    def no_loop() -> Engine:
        return _no_loop(opened)

    found = BundleTransformer(manifest, variants, hoisted, device, no_loop, ("AOTInductor",))
    found.weights = weights
    return found


def _no_loop(opened: OpenBundle) -> Engine:
    raise ConfigError(
        "a bundle of packages has no unrolled loop",
        where=str(opened.root),
        remedy="step it by a pipeline, or export ONNX graphs with loop=True (--loop)",
    )
