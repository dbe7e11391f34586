"""Cut a step's graph into regions, so that equal blocks of the model are compiled once.

Before, two blocks of equal structure::

    %3 = aten.linear.default(%2, %0): float32[2, 64, 32]      blocks.0.ff
    %4 = aten.add.Tensor(%2, %3): float32[2, 64, 32]          blocks.0
    %5 = aten.linear.default(%4, %1): float32[2, 64, 32]      blocks.1.ff
    %6 = aten.add.Tensor(%4, %5): float32[2, 64, 32]          blocks.1
    return [%6]

After, two regions of one key, each over (activation, weight)::

    %4 = region(%2, %0)
    %6 = region(%4, %1)
    return [%6]

Any cut is correct; a good one makes equal blocks equal. Module paths steer it: a region is one
member of a *repeated layer* (``blocks.3``) or what lies between two members. Two things would make
equal blocks differ by their neighbours, and are undone: a view made in one region for another is
made where it is used, and values cross regions contiguous.

A member is cut further: its conditioning (shifts, scales, gates) apart from its residual stream,
and the stream where it alone is alive, as it is between attention and feed-forward. A plan combines
the forms of the parts freely, and the parts have fewer forms than their combinations.
"""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.graph.ir import VIEWS, aten, evaluate, fake_mode, insert, outputs
from ditfastattn.passes.graph.origin import is_marked_static, module_path

Ranks = dict[Node, int]


@dataclass(frozen=True, eq=False)
class Region:
    """Hold a run of nodes; two regions of equal ``key`` compute the same from their inputs.

    ``inputs`` are the values from outside, in the order of their first use; ``outputs`` the nodes
    used outside, in graph order.
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
            copies[source].meta["val"] = _fresh(mode, _tensor(module, source))
            copies[source].meta["tensor_dict"] = source.meta.get("tensor_dict", {})

        def copied(source: Node) -> Node:
            if source not in copies:  # a body of FlexAttention
                copies[source] = graph.get_attr(str(source.target))
            return copies[source]

        for node in self.nodes:
            copies[node] = graph.node_copy(node, copied)
        graph.output(tuple(copies[node] for node in self.outputs))
        return GraphModule(module, graph)


def outline(module: GraphModule, args: Sequence[Tensor]) -> tuple[Region, ...]:
    """Return the regions of ``module``, in an order in which they can run.

    The graph is changed in place where views and layouts cross regions, and its inputs take on the
    strides of ``args``. Without a repeated layer there is one region.
    """
    graph = module.graph
    ranks = _ranks(graph)
    _sink_views(graph, ranks)
    _settle_layouts(graph, ranks, args)
    members: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in ranks:
            members[ranks[node]].append(node)
    regions = (_region(module, members[rank]) for rank in sorted(members))
    return tuple(region for region in regions if region.outputs)


def _ranks(graph: Graph) -> Ranks:
    """Give each call the number of its region, a run of calls of one part of one member."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    made = {node: place for place, node in enumerate(calls)}
    used = _last_uses(calls)
    ranks: Ranks = {}
    rank = 0
    for label, start, end in _runs(_labels(calls)):
        inside = [n for n in used if made[n] < end and used[n] >= start]
        inside = [n for n in inside if made[n] >= start or used[n] < end]
        large = _large(inside, used, end) if label else frozenset()
        conditioning = _conditioning(calls[start:end]) if label else frozenset()
        first, rank = rank, rank + bool(conditioning)
        for place in range(start, end):
            node = calls[place]
            source = node.args[0] if node.target is operator.getitem else None
            if node in conditioning:
                ranks[node] = first
            else:  # tensors cross regions, tuples of them do not
                ranks[node] = ranks[source] if isinstance(source, Node) else rank
            alive = [n for n in large if made[n] <= place < used[n]]
            rank += alive == [node] and node.target is aten.add.Tensor
        rank += 1
    return ranks


def _large(inside: Sequence[Node], used: Mapping[Node, int], end: int) -> frozenset[Node]:
    """Return the values at least half as large as the largest that a member hands on."""
    least = max((_bytes(node) for node in inside if used[node] >= end), default=0) / 2
    return frozenset(node for node in inside if least and _bytes(node) >= least)


def _conditioning(calls: Sequence[Node]) -> frozenset[Node]:
    """Return the calls of a member that its residual stream has no part in.

    They make shifts, scales and gates of the timestep; which of them a form uses is not to make
    the rest of the member another one. The stream is what is large among all that comes in.
    """
    members = set(calls)
    incoming = {source for node in calls for source in node.all_input_nodes} - members
    activations = [source for source in incoming if not _is_static(source)]
    least = max(map(_bytes, activations), default=0) / 2
    depends = {source for source in activations if _bytes(source) >= least}
    for node in calls:
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    return frozenset(members - depends)


def _is_static(node: Node) -> bool:
    return node.op == "get_attr" or is_marked_static(node)


def _last_uses(calls: Sequence[Node]) -> dict[Node, int]:
    """Return, for each call whose memory another reads, the place of the last one to do so."""
    origins: dict[Node, Node] = {}
    used: dict[Node, int] = {}
    for place, node in enumerate(calls):
        source = node.args[0] if node.args else None
        tuple_or_view = not isinstance(node.meta["val"], Tensor) or node.target in VIEWS
        borrowed = tuple_or_view or node.target is operator.getitem
        shares = borrowed and isinstance(source, Node) and source in origins
        origins[node] = origins[source] if shares else node  # type: ignore[index]  # a node then
        for origin in {origins[read] for read in node.all_input_nodes if read in origins}:
            used[origin] = place
    return used


def _runs(labels: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Return the label and the bounds of each run of calls of one member."""
    start = 0
    for label, group in groupby(labels):
        end = start + len(list(group))
        yield label, start, end
        start = end


def _bytes(node: Node) -> int:
    result = node.meta["val"]
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def _labels(calls: Sequence[Node]) -> list[str]:
    """Return the member of a repeated layer that each call belongs to, or ""."""
    paths = [module_path(node) for node in calls]
    repeated = _repeated_layers(set(paths))
    known = {path: _label(path, repeated) for path in set(paths)}
    labels = [known[path] for path in paths]
    # What lies between two calls of one member belongs to it.
    following = [*labels, ""]
    for place in reversed(range(len(labels))):
        following[place] = labels[place] or following[place + 1]
    for place in range(1, len(labels)):
        if labels[place - 1] == following[place]:
            labels[place] = following[place]
    return labels


def _label(path: str, repeated: set[str]) -> str:
    """Return the member of the outermost layer of ``repeated`` in ``path``, or ""."""
    found = (f"{layer}.{index}" for layer, index, _ in _members(path) if layer in repeated)
    return next(found, "")


def _repeated_layers(paths: set[str]) -> set[str]:
    """Return the containers of which two members have a submodule in common."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in paths:
        for layer, index, rest in _members(path):
            if rest:
                seen[layer, rest].add(index)
    return {layer for (layer, _), indices in seen.items() if len(indices) > 1}


def _members(path: str) -> Iterator[tuple[str, str, str]]:
    """Split ``blocks.3.ff.net.0`` at its numbers: (blocks, 3, ff.net.0), (blocks.3.ff.net, 0, )."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:place]), part, ".".join(parts[place + 1 :])


def _abroad(node: Node, ranks: Ranks) -> list[Node]:
    """Return the users of ``node`` in other regions."""
    return [user for user in node.users if user in ranks and ranks[user] != ranks[node]]


def _sink_views(graph: Graph, ranks: Ranks) -> None:
    """Make a view in each region that uses it: its region need not know who does."""
    for node in reversed(graph.nodes):
        if node not in ranks or node.target not in VIEWS:
            continue
        users: dict[int, list[Node]] = defaultdict(list)
        for user in _abroad(node, ranks):
            users[ranks[user]].append(user)
        for rank, group in users.items():
            with graph.inserting_after(node):
                copy = graph.node_copy(node)
            ranks[copy] = rank
            for user in group:
                user.replace_input_with(node, copy)
        if not node.users:
            del ranks[node]
            graph.erase_node(node)


def _settle_layouts(graph: Graph, ranks: Ranks, args: Sequence[Tensor]) -> None:
    """Let values cross regions contiguous, and recompute the strides that this changes."""
    mode = fake_mode(graph)
    moved: set[Node] = set()  # nodes whose strides have changed
    for node, given in zip(graph.find_nodes(op="placeholder"), args, strict=True):
        if given.stride() != node.meta["val"].stride():
            node.meta["val"] = _fresh(mode, given)
            moved.add(node)
    for node in list(graph.nodes):
        if node not in ranks:
            continue
        if not moved.isdisjoint(node.all_input_nodes) and node.target is not flex_attention:
            before, after = node.meta["val"], evaluate(graph, node.target, node.args, node.kwargs)
            if _strides(before) != _strides(after):
                node.meta["val"] = after
                moved.add(node)
        users = _abroad(node, ranks)
        if users and not node.meta["val"].is_contiguous():
            with graph.inserting_after(node):
                settled = insert(graph, aten.contiguous.default, (node,), node)
            ranks[settled] = ranks[node]
            moved.add(settled)
            for user in users:
                user.replace_input_with(node, settled)


def _strides(result: Any) -> list[tuple[int, ...]]:
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return [leaf.stride() for leaf in leaves if isinstance(leaf, Tensor)]


def _fresh(mode: Any, like: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=like.device, requires_grad=False
        )


def _tensor(module: GraphModule, node: Node) -> Tensor:
    held: Tensor = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    return held


def _region(module: GraphModule, nodes: list[Node]) -> Region:
    inside = set(nodes)
    inputs = dict.fromkeys(
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and not _is_body(module, source)
    )
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    key = _key(module, nodes, tuple(inputs), results)
    return Region(tuple(nodes), tuple(inputs), tuple(results), key)


def _is_body(module: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target)), GraphModule)


def _key(
    module: GraphModule, nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Node]
) -> str:
    """Hash what the region computes, its values named by their order alone."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    for index, node in enumerate(inputs):
        names[node] = f"i{index}"
        lines.append(f"{_layout(_tensor(module, node))} {_is_static(node)}")

    def name(source: Node) -> str:
        return names.get(source) or _body_text(getattr(module, str(source.target)))

    for index, node in enumerate(nodes):
        names[node] = f"n{index}"
        lines.append(f"{node.target}{_text(node.args, name)}{_text(node.kwargs, name)}")
    lines += [f"{names[node]} {_layout(node.meta['val'])}" for node in results]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()} {tensor.device}"


def _body_text(body: GraphModule) -> str:
    tensors = [*body.parameters(), *body.buffers()]
    return f"{body.code}{[id(tensor) for tensor in tensors]}"


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
    return repr(argument)  # tells 1, 1.0 and True apart


def freed_after(regions: Sequence[Region], graph: Graph) -> list[tuple[Node, ...]]:
    """List, per region, the values of regions that nothing needs once it has run."""
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
