"""Turn a step's weights into constants of a package: tensors of one file, named by what they are.

Before, the weights are inputs; after, attributes that the package is pointed to when it is loaded::

    %3 = aten.linear.default(%0, %1): float32[2, 64, 32]
    %3 = aten.linear.default(%0, %blocks.0.ff.weight): float32[2, 64, 32]
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ditfastattn.export.step_graphs import StepGraph
from ditfastattn.export.weights import raw_bytes
from ditfastattn.passes.graph.ir import outputs


@dataclass
class Constants:
    """Collect the tensors that packages take, by name: a name stands for one content.

    Two tensors that share their memory are one; what merely happens to be equal may change apart.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)
    _held: list[Tensor] = field(default_factory=list)  # so that no address is used again

    def weight(self, name: str, tensor: Tensor) -> str:
        """Return the name of a weight of the model, which the model calls ``name``."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._names:
            plain = re.sub(r"[^\w.]", "_", name)
            self._names[key] = self._add(plain, tensor)
            self._held.append(tensor)
        return self._names[key]

    def constant(self, tensor: Tensor) -> str:
        """Return the name of a tensor that a pass has made, such as a window's bias."""
        return self._add(f"constants.c{_digest(tensor)}", tensor)

    def _add(self, name: str, tensor: Tensor) -> str:
        """Keep ``tensor`` under ``name``, or under another if that stands for other content."""
        known = self.tensors.get(name)
        if known is not None and _digest(known) != _digest(tensor):
            return self._add(f"{name}_{_digest(tensor)}", tensor)
        if known is None:
            self.tensors[name] = tensor.detach().contiguous()
        return name


def _digest(tensor: Tensor) -> str:
    described = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(described + raw_bytes(tensor)).hexdigest()[:16]


@dataclass(frozen=True)
class PackageGraph:
    """Hold a graph over the inputs that it needs, and the names of its constants.

    ``copies`` maps the nodes of the step's graph to those of ``module``.
    """

    module: GraphModule
    constants: tuple[str, ...]
    copies: dict[Node, Node]


def with_constants(step: StepGraph, constants: Constants) -> PackageGraph:
    """Return the graph of ``step`` with its weights in ``constants``, and no input unused."""
    source, static = step.source.module, step.source.static
    needed = _needed(source.graph)
    graph = Graph()
    copies: dict[Node, Node] = {}
    attributes: dict[str, Any] = {}

    def attribute(name: str, item: Any) -> Node:
        attributes[name] = item
        return graph.get_attr(name)

    placeholders = source.graph.find_nodes(op="placeholder")
    position = {node: index for index, node in enumerate(placeholders)}
    taken: dict[str, None] = {}  # in order
    for node in source.graph.nodes:
        given = node.op == "placeholder" and position[node] not in static
        if given and node.users:
            copies[node] = graph.placeholder(node.name)
        if node not in needed or given:
            continue
        if node.op == "placeholder":
            name = constants.weight(*static[position[node]])
            taken[name] = None
            copies[node] = attribute(name, constants.tensors[name])
        elif node.op == "get_attr":
            held = getattr(source, str(node.target))
            if isinstance(held, Tensor):
                name = constants.constant(held)
                taken[name] = None
                copies[node] = attribute(name, constants.tensors[name])
            else:
                copies[node] = attribute(str(node.target), held)
        elif node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    graph.output(tuple(copies[n] if isinstance(n, Node) else n for n in outputs(source.graph)))
    return PackageGraph(GraphModule(attributes, graph), tuple(taken), copies)


def _needed(graph: Graph) -> set[Node]:
    """Return the nodes that the results need."""
    found: set[Node] = set()
    waiting = [node for node in outputs(graph) if isinstance(node, Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
