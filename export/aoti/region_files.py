"""Compile the regions of a bundle's steps as packages: equal blocks of all layers and steps once.

A step's file then lists the packages that it calls, in order. Weights are inputs of a region, so
that blocks which differ in them alone are one package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
from ditfastattn.export.aoti.constants import PackageGraph
from ditfastattn.export.aoti.files import PackageFiles, package_form, package_input, variant_entry
from ditfastattn.export.emitter import Value
from ditfastattn.export.step_graphs import Form, StepGraph, used_inputs
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.outline import outline
from ditfastattn.passes.graph.region import Region, freed_after
from ditfastattn.runtime.bundle.manifest import STEP_SUFFIX
from ditfastattn.runtime.bundle.packages import PackageSpec, RegionCall, StepCalls
from ditfastattn.runtime.bundle.specs import VariantSpec

_REGIONS: Final = "regions"  # in a module's meta


def region_form(module: GraphModule, static: Sequence[int]) -> None:
    """Lower windows, and cut the graph into regions, for inputs that are contiguous."""
    package_form(module, static)
    placeholders = module.graph.find_nodes(op="placeholder")
    with fake_mode(module.graph):
        given = [node.meta["val"].contiguous() for node in placeholders]
    module.meta[_REGIONS] = outline(module, given)


class RegionFiles(PackageFiles):
    """Compile the distinct regions of graphs, and write each graph as a list of calls."""

    suffix = STEP_SUFFIX.removeprefix(".")

    @property
    def form(self) -> Form:
        """Return what lowers a graph, and cuts it into regions."""
        return region_form

    def write(self, graph: StepGraph, file: str, about: Mapping[str, str]) -> VariantSpec:
        """Write ``graph`` as calls; compile the regions that are new."""
        module = graph.source.module
        regions: tuple[Region, ...] = module.meta[_REGIONS]
        inputs, constants = self._sources(graph)
        made = [node for region in regions for node in region.outputs]
        place = {node: index for index, node in enumerate([*inputs, *constants, *made])}
        calls = tuple(
            RegionCall(
                file=self._region(graph, region),
                reads=tuple(place[node] for node in region.inputs),
                frees=tuple(place[node] for node in freed),
            )
            for region, freed in zip(regions, freed_after(regions, module.graph), strict=True)
        )
        returned = tuple(place[n] for n in outputs(module.graph) if isinstance(n, Node))
        step = StepCalls(constants=tuple(constants.values()), calls=calls, returned=returned)
        write_text_atomically(self._partial.folder / file, step.model_dump_json() + "\n")
        self._report(file, {call.file for call in calls})
        return variant_entry(graph, file)

    def _sources(self, graph: StepGraph) -> tuple[list[Node], dict[Node, str]]:
        """Return the nodes of a step's inputs, and those of its constants by name."""
        module, static = graph.source.module, graph.source.static
        inputs: list[Node] = []
        constants: dict[Node, str] = {}
        for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
            if index in static and node.users:
                constants[node] = self._constants.weight(*static[index])
            elif node.users:
                inputs.append(node)
        for node in module.graph.find_nodes(op="get_attr"):
            held = getattr(module, str(node.target))
            if isinstance(held, Tensor):
                constants[node] = self._constants.constant(held)
        assert len(inputs) == len(used_inputs(graph))
        return inputs, constants

    def _region(self, graph: StepGraph, region: Region) -> str:
        """Return the file of a region, which is compiled unless an equal one was."""
        key = _key(graph, region)
        file = f"region_{key[:16]}.pt2"
        if file not in self._files:
            ready = _region_graph(region, graph.source.module)
            values = [_value(graph, node, f"input_{i}") for i, node in enumerate(region.inputs)]
            spec = PackageSpec(inputs=tuple(map(package_input, values)), constants=())
            self._files[file] = self._compile_into(file, graph, ready, values, spec)
        return file


def _key(graph: StepGraph, region: Region) -> str:
    """Return a hash of what a region computes, at any batch: one number may or may not be that."""
    symbols = graph.source.symbols

    def plain(item: Any) -> Any:
        return "" if isinstance(item, Node) else item

    parts = [
        (map_aggregate(symbols.args[node], plain), map_aggregate(symbols.kwargs[node], plain))
        for node in region.nodes
    ]
    return hashlib.sha256(f"{region.key}{parts}".encode()).hexdigest()


def _region_graph(region: Region, module: GraphModule) -> PackageGraph:
    """Return the graph of ``region``, all of whose inputs are its own."""
    graph = Graph()
    attributes: dict[str, Any] = {}
    copies: dict[Node, Node] = {}
    for index, source in enumerate(region.inputs):
        copies[source] = graph.placeholder(f"input_{index}")

    def copied(source: Node) -> Node:
        if source not in copies:  # a function that FlexAttention calls
            attributes[str(source.target)] = getattr(module, str(source.target))
            copies[source] = graph.get_attr(str(source.target))
        return copies[source]

    for node in region.nodes:
        copies[node] = graph.node_copy(node, copied)
        copies[node].meta = {}
    graph.output(tuple(copies[node] for node in region.outputs))
    return PackageGraph(GraphModule(attributes, graph), (), copies)


def _value(graph: StepGraph, node: Node, name: str) -> Value:
    """Describe an input of a region, as values cross regions: contiguous."""
    module = graph.source.module
    held = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    if node.op == "call_function" and not held.is_contiguous():
        raise ConfigError(
            "a value that is not contiguous crosses regions",
            where=f"node {node.name}",
            remedy="export whole steps: regions=False",
        )
    shape: Any = graph.source.symbols.shapes.get(node, tuple(held.shape))
    return Value(name, shape, held.dtype)
