"""Load a bundle's TensorRT engines as a transformer for a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.manifest import (
    MANIFEST,
    Manifest,
    VariantSpec,
    check_files,
    file_hash,
    read_manifest,
)
from ditfastattn.runtime.bundle.transformer import BundleTransformer, Engine
from ditfastattn.runtime.tensorrt.engines import (
    ENGINES_FOLDER,
    Engines,
    Layout,
    check_engine,
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
    """Return a transformer that runs the bundle in ``folder`` by its TensorRT engines.

    Args:
        folder: the bundle.
        target: whose engines to take; without one, those of this GPU.
        cuda_graphs: capture each engine as a CUDA graph, at the price of copying what goes in and
            out.

    Raises:
        ConfigError: there is no GPU; no engines were built for it, or from another bundle; they are
            not whole; their library is not installed.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    check_files(root, manifest)
    if not torch.cuda.is_available():
        raise ConfigError(
            "TensorRT engines run on an NVIDIA GPU, and there is none here",
            where=str(root),
            remedy='load the bundle by ONNX Runtime (runtime="onnx"), or on a machine with a GPU',
        )
    device = torch.device("cuda", torch.cuda.current_device())
    out = root / ENGINES_FOLDER / (target or _own_target(root, device))
    return load_engines(root, manifest, out, device, cuda_graphs)


def _own_target(root: Path, device: torch.device) -> str:
    """Return the target whose engines suit this GPU, its very own first."""
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
    root: Path, manifest: Manifest, out: Path, device: torch.device, cuda_graphs: bool = False
) -> BundleTransformer:
    """Return a transformer that runs the engines in ``out`` on ``device``."""
    engines = read_engines(out)
    if engines.manifest_sha256 != file_hash(root / MANIFEST):
        raise ConfigError(
            "the engines were built from another bundle", where=str(out), remedy=_BUILD
        )
    library = find_library(engines.library)
    opened = _Opened(library, engines, out, device, cuda_graphs)
    prologue = None
    if manifest.prologue is not None and engines.layout is not Layout.LOOP:
        prologue = opened.variant(manifest, manifest.prologue)
    variants: list[Engine] = []
    if engines.layout is Layout.VARIANTS:
        variants = [opened.variant(manifest, variant) for variant in manifest.variants]
    elif engines.switch is not None:
        switch = engines.switch
        whole = opened.engine(
            "switch.onnx",
            [switch.variant, *switch.inputs, *(port.name for port in switch.reads)],
            [
                *(spec.name for spec in manifest.outputs),
                *(port.name for port in switch.writes),
            ],
        )
        variants = [
            SwitchedVariant(whole, manifest, switch, index, device)
            for index in range(len(manifest.variants))
        ]
        manifest = through_switch(manifest, switch)
    else:
        variants = [_not_built] * len(manifest.variants)
    log.info("%s: %s, %s", out, engines.layout.value, engines.reason)
    if engines.layout is not Layout.LOOP:
        manifest = manifest.model_copy(update={"loop": None})  # it was not built

    def open_loop() -> Engine:
        loop = manifest.loop
        if loop is None:
            raise ConfigError(
                "the unrolled loop was not built",
                where=str(out),
                remedy="build it (`ditfastattn build --layout loop`)",
            )
        return opened.engine(loop.file, loop.graph_inputs, [loop.latents])

    providers = (f"{library.name} {library.version}",)
    return BundleTransformer(manifest, variants, prologue, device, open_loop, providers)


def _not_built(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    raise ConfigError(
        "only the unrolled loop was built: it generates, and cannot be stepped",
        remedy="call generate, or build the steps (`ditfastattn build --layout variants`)",
    )


class _Opened:
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

    def variant(self, manifest: Manifest, variant: VariantSpec) -> Engine:
        """Open the engine of one step variant, or of the prologue."""
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
        path = check_engine(self._out, spec)
        opened = TensorRTGraph(self._library, path, inputs, outputs, self._device)
        return CudaGraph(opened) if self._cuda_graphs else opened
