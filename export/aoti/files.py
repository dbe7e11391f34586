"""Write the graphs of a bundle as AOTInductor packages that share one file of weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.core.files import replacing
from ditfastattn.export.aoti.checked import Compilation
from ditfastattn.export.aoti.compilations import Compilations
from ditfastattn.export.aoti.constants import Constants, PackageGraph, with_constants
from ditfastattn.export.aoti.earlier import EarlierPackage
from ditfastattn.export.aoti.free_batch import contiguous_strides, free_batch
from ditfastattn.export.aoti.options import CompileFor
from ditfastattn.export.aoti.program import graph_of, traced
from ditfastattn.export.complex_numbers import pair_boundary
from ditfastattn.export.emitter import Value
from ditfastattn.export.graph_files import Written
from ditfastattn.export.partial import PartialBundle
from ditfastattn.export.step_graphs import Form, StepGraph, sizes, spec, used_inputs, written_name
from ditfastattn.passes.graph.ir import graph_text
from ditfastattn.passes.windows.lower_windows import lower_windows
from ditfastattn.passes.windows.mask_windows import mask_windows
from ditfastattn.runtime.bundle.packages import PackageInput, PackageSpec, PackagesSpec
from ditfastattn.runtime.bundle.specs import GraphSize, VariantSpec

log = logging.getLogger(__name__)

WEIGHTS_FILE: Final = "weights.safetensors"


def package_form(module: GraphModule, static: Sequence[int]) -> None:
    """Lower windows to operators that torch's C++ library has; weights stay apart, as named."""
    for reason in lower_windows(module):
        log.info("window attention becomes a masked full attention: %s", reason)
    mask_windows(module)
    pair_boundary(module, static)


class PackageFiles:
    """Compile graphs into the folder of a bundle, and collect their weights."""

    suffix = "pt2"

    @property
    def form(self) -> Form:
        """Return what lowers a graph to what torch's C++ library has."""
        return package_form

    def __init__(
        self,
        partial: PartialBundle,
        batches: tuple[int, int],
        made: CompileFor,
        compilations: Compilations,
        written: Written,
        earlier: Mapping[str, EarlierPackage],
    ) -> None:
        """Take the two batches of the captures, what to compile for and by, and what there is."""
        self._partial, self._batches, self._compile = partial, batches, made
        self._compilations, self._written, self._earlier = compilations, written, earlier
        self._waiting: dict[str, set[str]] = {}  # per step, its packages that are not compiled
        self._unfinished: set[str] = set()
        self._constants = Constants()
        self._files: dict[str, PackageSpec] = {}

    def write(self, graph: StepGraph, file: str, about: Mapping[str, str]) -> VariantSpec:
        """Compile ``graph`` now or later, unless an interrupted export has."""
        ready = with_constants(graph, self._constants)
        used = used_inputs(graph)
        package = PackageSpec(inputs=tuple(map(package_input, used)), constants=ready.constants)
        self._files[file] = self._compile_into(file, graph, ready, used, package)
        self._report(file, {file})
        return variant_entry(graph, file)

    def _compile_into(
        self,
        file: str,
        graph: StepGraph,
        ready: PackageGraph,
        inputs: Sequence[Value],
        package: PackageSpec,
    ) -> PackageSpec:
        """Compile ``ready``, a part of ``graph`` or all of it, now or later; see ``write``.

        Return ``package`` with its key.
        """
        key = self._key(graph, ready, package)
        keyed = package.model_copy(update={"key": key})
        if self._partial.has(file, key):
            return keyed
        module, batch = ready.module, self._batches[1]
        examples = self._examples(inputs, batch)
        program = None
        if batch != self._batches[0]:
            program = free_batch(graph, ready, inputs, examples)
        elif not self._compilations.here:
            program = traced(module, examples)
        if program is not None:
            module = graph_of(program)
        path, weights = self._partial.folder / file, self._constants.tensors
        compilation = Compilation(path, module, package, weights, examples, self._compile)
        earlier = self._earlier.get(key)
        content = None if earlier is None else earlier.content()
        if content is not None and compilation.takes(content):
            self._partial.keep(file, key)
            return keyed
        self._unfinished.add(file)
        self._compilations.add(compilation, program, lambda: self._compiled(file, key))
        return keyed

    def _compiled(self, file: str, key: str) -> None:
        """Record that a package is complete, and report the steps that now are."""
        self._partial.keep(file, key)
        self._unfinished.discard(file)
        for step, packages in list(self._waiting.items()):
            self._report(step, packages)

    def _report(self, step: str, packages: set[str]) -> None:
        """Report the file of a step that consists of ``packages``, once all are compiled."""
        missing = packages & self._unfinished
        if missing:
            self._waiting[step] = missing
        else:
            self._waiting.pop(step, None)
            self._written(step)

    def _examples(self, inputs: Sequence[Value], batch: int) -> list[Tensor]:
        """Return inputs as the runtime will give them: contiguous."""
        device = self._compile.target.device
        return [torch.zeros(spec(v).sizes(batch), dtype=v.dtype, device=device) for v in inputs]

    def _key(self, graph: StepGraph, ready: PackageGraph, package: PackageSpec) -> str:
        """Return a hash of all that the package is compiled from."""
        parts = (
            graph_text(graph.source.module.graph),
            graph_text(ready.module.graph),
            package,
            self._compile,
            self._batches,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def close(self) -> str:
        """Compile what is left, and write the weights; return the name of their file."""
        self._compilations.finish()
        path: Path = self._partial.folder / WEIGHTS_FILE
        with replacing(path) as temporary:
            safetensors.torch.save_file(_apart(self._constants.tensors), temporary)
        return WEIGHTS_FILE

    def packages(self) -> PackagesSpec:
        """Return what was compiled."""
        return PackagesSpec(target=self._compile.target, files=self._files)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` on the CPU, no two of which share memory: the file format has no views."""
    known: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.cpu()
        storage = plain.untyped_storage()
        whole = storage.nbytes() == plain.nbytes and storage.data_ptr() not in known
        found[name] = plain if whole else plain.clone()
        known.add(storage.data_ptr())
    return found


def package_input(value: Value) -> PackageInput:
    """Return the manifest's description of an input, which will be contiguous."""
    described = spec(value)
    return PackageInput(
        name=described.name,
        shape=described.shape,
        dtype=described.dtype,
        strides=sizes(contiguous_strides(value)),
    )


def variant_entry(graph: StepGraph, file: str) -> VariantSpec:
    """Return the manifest's entry of a step that ``file`` holds."""
    used = {value.name for value in used_inputs(graph)}
    return VariantSpec(
        file=file,
        size=_size(graph),
        inputs=tuple(v.name for v in graph.inputs if v.name in used and v.name not in graph.reads),
        reads=tuple((slot, slot) for slot in graph.reads if slot in used),
        writes=tuple((slot, written_name(slot)) for slot in graph.writes),
    )


def _size(graph: StepGraph) -> GraphSize:
    """Return how large the graph is, at the batch of its capture."""
    nodes = [node for node in graph.source.module.graph.nodes if node.op == "call_function"]
    values = [node.meta.get("val") for node in nodes]
    sizes = [item.nbytes for item in values if isinstance(item, Tensor)]
    return GraphSize(nodes=len(nodes), largest=max([0, *sizes]))
