"""Load a bundle as a transformer for a pipeline, run by ONNX Runtime or OpenVINO."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.graph_file import GraphFile, WeightsFile, read_graph
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.onnx_graph import OnnxGraph, SessionOptions
from ditfastattn.runtime.bundle.openvino_graph import OpenVinoGraph
from ditfastattn.runtime.bundle.specs import LoopSpec, TensorSpec, VariantSpec
from ditfastattn.runtime.bundle.transformer import BundleTransformer, Engine

log = logging.getLogger(__name__)

Opening = Callable[[GraphFile, Sequence[str], Sequence[str]], OnnxGraph | OpenVinoGraph]


def load(
    folder: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    *,
    threads: int = 0,
    share_threads: bool = False,
    low_memory: bool = False,
) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder`` with ONNX Runtime.

    Args:
        folder: the bundle.
        providers: execution providers, in order of preference; each must load.
        threads: of each graph on the CPU; 0 lets ONNX Runtime choose.
        share_threads: use one pool for all sessions of the process; all other sessions of the
            process must then use it too.
        low_memory: share the pages of the weights file and one arena of activations among all
            graphs: a fraction of the memory, but slower.

    Raises:
        ConfigError: the bundle is incomplete or not valid, or a provider did not load.
    """
    options = SessionOptions(tuple(providers), threads, share_threads, low_memory)

    def session(graph: GraphFile, inputs: Sequence[str], outputs: Sequence[str]) -> OnnxGraph:
        return OnnxGraph(graph, inputs, outputs, options)

    opened = open_bundle(folder)
    return _transformer(opened, session, opened.check_unchanged)


def load_openvino(folder: str | os.PathLike[str], *, threads: int = 0) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder`` by OpenVINO, on the CPU.

    Args:
        folder: the bundle.
        threads: of each graph; 0 lets OpenVINO choose.

    Raises:
        ConfigError: the bundle is not valid, was replaced meanwhile, or is in bfloat16; OpenVINO is
            not installed.
    """

    def compiled(graph: GraphFile, inputs: Sequence[str], outputs: Sequence[str]) -> OpenVinoGraph:
        return OpenVinoGraph(graph, inputs, outputs, threads)

    opened = open_bundle(folder)
    manifest = opened.manifest
    specs = (*manifest.inputs, *manifest.outputs, *manifest.every_slot)
    if any(spec.dtype == "bfloat16" for spec in specs):
        raise ConfigError(
            "a bundle in bfloat16 cannot be run by OpenVINO",
            where=str(opened.root),
            remedy="export it, and its plan's caches, in float32 or float16",
        )
    return _transformer(opened, compiled, opened.check_in_place)


def _transformer(
    opened: OpenBundle, open_with: Opening, check: Callable[[], None]
) -> BundleTransformer:
    """Return a transformer whose graphs ``open_with`` opens; then ``check`` the bundle's files."""
    manifest = opened.manifest
    graphs = [open_graph(opened, variant, open_with) for variant in manifest.variants]
    hoisted = None
    if manifest.hoisted is not None:
        hoisted = open_graph(opened, manifest.hoisted, open_with)
    check()
    opened.keep_only({manifest.weights, *([manifest.loop.file] if manifest.loop else [])})
    log.info("%s: %d graphs on %s", opened.root, len(graphs), ", ".join(graphs[0].providers))

    def open_loop() -> Engine:
        found = _open_loop(opened, open_with)
        check()
        return found

    device, loaded = graphs[0].device, graphs[0].providers
    return BundleTransformer(manifest, graphs, hoisted, device, open_loop, loaded)


def _open_loop(opened: OpenBundle, open_with: Opening) -> Engine:
    loop = opened.manifest.loop
    if loop is None:
        raise ConfigError(
            "the bundle has no unrolled loop",
            where=str(opened.root),
            remedy="export it with loop=True (--loop), or step it by a pipeline",
        )
    latents = loop.noise.model_copy(update={"name": loop.latents})
    graph = _read(opened, loop, (loop.noise, *loop.conditions), (latents,))
    return open_with(graph, loop.graph_inputs, [loop.latents])


def open_graph(
    opened: OpenBundle, spec: VariantSpec, open_with: Opening
) -> OnnxGraph | OpenVinoGraph:
    """Open one graph of a bundle."""
    inputs, outputs = _signature(opened.manifest, spec)
    graph = _read(opened, spec, inputs, outputs)
    return open_with(graph, spec.graph_inputs, opened.manifest.graph_outputs(spec))


def _read(
    opened: OpenBundle,
    spec: VariantSpec | LoopSpec,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> GraphFile:
    name = opened.manifest.weights
    weights = WeightsFile(name, opened.content(name))
    path, content = opened.path(spec.file), bytes(opened.content(spec.file))
    return read_graph(path, content, weights, inputs, outputs, spec.size)


def _signature(manifest: Manifest, graph: VariantSpec) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the inputs and outputs of one graph, as it names them."""
    arguments = {spec.name: spec for spec in manifest.inputs}
    slots = {spec.name: spec for spec in manifest.every_slot}
    number = TensorSpec(name="", shape=(), dtype="float32")  # how far a step extrapolates

    def ports(pairs: Sequence[tuple[str, str]]) -> list[TensorSpec]:
        specs = [(slots.get(slot, number), name) for slot, name in pairs]
        return [TensorSpec(name=name, shape=s.shape, dtype=s.dtype) for s, name in specs]

    inputs = [arguments[name] for name in graph.inputs] + ports(graph.reads)
    results = [] if graph is manifest.hoisted else list(manifest.outputs)
    return inputs, results + ports(graph.writes)
