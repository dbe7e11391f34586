"""Describe a region: a run of calls that can be cut out of a graph, compiled, and shared by key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.graph.fake_values import empty_like, fake_mode
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.lazy_code import lazy_module
from ditfastattn.passes.graph.origin import is_static


@dataclass(frozen=True, eq=False)
class Region:
    """Hold a run of calls; two regions of equal ``key`` compute the same from their inputs.

    ``inputs`` are the values from outside, in the order of their first use; ``outputs`` are the
    nodes used outside, in graph order.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: str

    def extract(self, module: GraphModule) -> GraphModule:
        """Return the region of ``module`` as a graph of its own, over ``inputs``."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        mode = fake_mode(module.graph)
        for index, source in enumerate(self.inputs):
            copies[source] = graph.placeholder(f"input_{index}")
            copies[source].meta["val"] = empty_like(mode, _tensor(module, source))
            copies[source].meta["tensor_dict"] = source.meta.get("tensor_dict", {})

        def copied(source: Node) -> Node:
            if source not in copies:  # a function that FlexAttention calls
                copies[source] = graph.get_attr(str(source.target))
            return copies[source]

        for node in self.nodes:
            copies[node] = graph.node_copy(node, copied)
        graph.output(tuple(copies[node] for node in self.outputs))
        return lazy_module(module, graph)


def _tensor(module: GraphModule, node: Node) -> Tensor:
    held: Tensor = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    return held


def make_region(module: GraphModule, nodes: Sequence[Node]) -> Region:
    """Return the region of ``nodes``, calls of ``module`` in graph order."""
    inside = set(nodes)
    inputs = dict.fromkeys(
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and not _is_function(module, source)
    )
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    key = _key(module, nodes, tuple(inputs), results)
    return Region(tuple(nodes), tuple(inputs), tuple(results), key)


def _is_function(module: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target)), GraphModule)


def _key(
    module: GraphModule, nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Node]
) -> str:
    """Hash what the region computes; values are named by their order alone."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    for index, node in enumerate(inputs):
        names[node] = f"i{index}"
        lines.append(f"{_layout(_tensor(module, node))} {is_static(node)}")

    def name(source: Node) -> str:
        return names.get(source) or _function_text(getattr(module, str(source.target)))

    for index, node in enumerate(nodes):
        names[node] = f"n{index}"
        lines.append(f"{node.target}{_text(node.args, name)}{_text(node.kwargs, name)}")
    lines += [f"{names[node]} {_layout(node.meta['val'])}" for node in results]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()} {tensor.device}"


def _function_text(function: GraphModule) -> str:
    tensors = [*function.parameters(), *function.buffers()]
    return f"{function.code}{[id(tensor) for tensor in tensors]}"


def _text(argument: Any, name: Callable[[Node], str]) -> str:
    if isinstance(argument, Node):
        return name(argument)
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(_text(item, name) for item in argument)}]"
    if isinstance(argument, Mapping):
        items = (f"{key}: {_text(argument[key], name)}" for key in sorted(argument))
        return f"{{{', '.join(items)}}}"
    if isinstance(argument, slice):
        return _text([argument.start, argument.stop, argument.step], name)
    return repr(argument)  # distinguishes 1, 1.0 and True


def freed_after(regions: Sequence[Region], graph: Graph) -> list[tuple[Node, ...]]:
    """Return, per region, the values that nothing needs after it has run."""
    last: dict[Node, int] = {}
    for index, region in enumerate(regions):
        last |= dict.fromkeys(region.outputs, index)
        last |= {source: index for source in region.inputs if source in last}
    kept = {result for result in outputs(graph) if isinstance(result, Node)}
    freed: list[list[Node]] = [[] for _ in regions]
    for node, index in last.items():
        if node not in kept:
            freed[index].append(node)
    return [tuple(nodes) for nodes in freed]
