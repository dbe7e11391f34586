"""Load a bundle's TensorRT engines as a transformer for a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.specs import VariantSpec
from ditfastattn.runtime.bundle.transformer import BundleTransformer, Engine
from ditfastattn.runtime.tensorrt.engines import (
    ENGINES_FOLDER,
    SWITCH_FILE,
    Engines,
    Layout,
    read_engine,
    read_engines,
)
from ditfastattn.runtime.tensorrt.graph import CudaGraph, TensorRTGraph
from ditfastattn.runtime.tensorrt.library import CURRENT, Library, find_library
from ditfastattn.runtime.tensorrt.switch import SwitchedVariant, through_switch

log = logging.getLogger(__name__)
_BUILD = "build them (`ditfastattn build`)"


def load(
    folder: str | os.PathLike[str], *, target: str = "", cuda_graphs: bool = False
) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder`` with its TensorRT engines.

    Args:
        folder: the bundle.
        target: of the engines; by default those for this GPU.
        cuda_graphs: capture each engine as a CUDA graph, at the cost of copying inputs and outputs.

    Raises:
        ConfigError: there is no GPU; no engines were built for it from this bundle; they are
            incomplete; their library is not installed.
    """
    opened = open_bundle(folder)
    root = opened.root
    if not torch.cuda.is_available():
        raise ConfigError(
            "TensorRT engines run on an NVIDIA GPU, and there is none here",
            where=str(root),
            remedy='load the bundle by ONNX Runtime (runtime="onnx"), or on a machine with a GPU',
        )
    device = torch.device("cuda", torch.cuda.current_device())
    out = root / ENGINES_FOLDER / (target or _own_target(root, device))
    return load_engines(opened, out, device, cuda_graphs)


def _own_target(root: Path, device: torch.device) -> str:
    """Return the target whose engines suit this GPU; those built on it come first."""
    major, minor = torch.cuda.get_device_capability(device)
    for target in (CURRENT, f"sm{major}{minor}"):
        if (root / ENGINES_FOLDER / target).is_dir():
            return target
    present = sorted(path.name for path in (root / ENGINES_FOLDER).glob("*") if path.is_dir())
    raise ConfigError(
        "there are no engines for this GPU",
        where=str(root / ENGINES_FOLDER),
        got=", ".join(present) or "none at all",
        expected=f"{CURRENT} or sm{major}{minor}",
        remedy=_BUILD,
    )


def load_engines(
    bundle: OpenBundle, out: Path, device: torch.device, cuda_graphs: bool = False
) -> BundleTransformer:
    """Return a transformer that runs the engines in ``out`` on ``device``."""
    engines = read_engines(out)
    if engines.manifest_sha256 != bundle.manifest_sha256:
        raise ConfigError(
            "the engines were built from another bundle", where=str(out), remedy=_BUILD
        )
    library = find_library(engines.library)
    opened = _EngineFolder(library, engines, out, device, cuda_graphs)
    hoisted = opened.hoisted(bundle.manifest)
    manifest, variants = opened.steps(bundle.manifest)
    log.info("%s: %s, %s", out, engines.layout.value, engines.reason)
    if engines.layout is not Layout.LOOP:
        manifest = manifest.model_copy(update={"loop": None})  # it was not built
    providers = (f"{library.name} {library.version}",)
    return BundleTransformer(
        manifest, variants, hoisted, device, partial(opened.loop, manifest), providers
    )


def _not_built(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    raise ConfigError(
        "only the unrolled loop was built: it generates images, and cannot be stepped",
        remedy="call generate, or build the steps (`ditfastattn build --layout variants`)",
    )


class _EngineFolder:
    """Open the engines of one folder."""

    def __init__(
        self,
        library: Library,
        engines: Engines,
        out: Path,
        device: torch.device,
        cuda_graphs: bool,
    ) -> None:
        self._library, self._engines, self._out = library, engines, out
        self._device, self._cuda_graphs = device, cuda_graphs

    def hoisted(self, manifest: Manifest) -> Engine | None:
        """Open the engine of the hoisted values, if there are any."""
        if manifest.hoisted is None or self._engines.layout is Layout.LOOP:
            return None
        return self.variant(manifest, manifest.hoisted)

    def steps(self, manifest: Manifest) -> tuple[Manifest, list[Engine]]:
        """Open what runs each step variant; return it with the manifest that describes it."""
        count = len(manifest.variants)
        if self._engines.layout is Layout.VARIANTS:
            return manifest, [self.variant(manifest, variant) for variant in manifest.variants]
        switch = self._engines.switch
        if switch is None:
            return manifest, [_not_built] * count
        reads, writes = ([port.name for port in ports] for ports in (switch.reads, switch.writes))
        outputs = [spec.name for spec in manifest.outputs]
        whole = self.engine(
            SWITCH_FILE, [switch.variant, *switch.inputs, *reads], [*outputs, *writes]
        )
        variants: list[Engine] = [
            SwitchedVariant(whole, manifest, switch, index, self._device) for index in range(count)
        ]
        return through_switch(manifest, switch), variants

    def loop(self, manifest: Manifest) -> Engine:
        """Open the engine of the unrolled loop."""
        loop = manifest.loop
        if loop is None:
            raise ConfigError(
                "the unrolled loop was not built",
                where=str(self._out),
                remedy="build it (`ditfastattn build --layout loop`)",
            )
        return self.engine(loop.file, loop.graph_inputs, [loop.latents])

    def variant(self, manifest: Manifest, variant: VariantSpec) -> Engine:
        """Open the engine of one step variant, or of the hoisted values."""
        return self.engine(variant.file, variant.graph_inputs, manifest.graph_outputs(variant))

    def engine(self, graph: str, inputs: Sequence[str], outputs: Sequence[str]) -> Engine:
        """Open the engine that was built from ``graph``."""
        spec = self._engines.of(graph)
        if spec is None:
            raise ConfigError(
                "not all engines were built",
                where=str(self._out),
                got=f"none of {graph}",
                remedy="finish the build (`ditfastattn build`)",
            )
        path, content = self._out / spec.file, read_engine(self._out, spec)
        opened = TensorRTGraph(self._library, path, content, inputs, outputs, self._device)
        return CudaGraph(opened) if self._cuda_graphs else opened
