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

Any cut is correct; a good one makes equal blocks equal (see ``partition``). Two things would make
equal blocks differ because of their neighbours, so the graph is changed first: a region makes the
views that it uses, and values cross regions contiguous.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.graph.fake_values import empty_like, fake_mode
from ditfastattn.passes.graph.ir import VIEWS, aten, insert
from ditfastattn.passes.graph.kinds import result_of
from ditfastattn.passes.graph.partition import Partition, partition
from ditfastattn.passes.graph.region import Region, make_region


def outline(module: GraphModule, args: Sequence[Tensor]) -> tuple[Region, ...]:
    """Return the regions of ``module``, in an order in which they can run.

    The graph is changed in place where views and layouts cross regions, and its inputs take on the
    strides of ``args``. A model without repeated blocks is one region.
    """
    graph = module.graph
    regions = partition(graph)
    _sink_views(graph, regions)
    _settle_layouts(graph, regions, args)
    members: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in regions:
            members[regions[node]].append(node)
    found = (make_region(module, members[region]) for region in sorted(members))
    return tuple(region for region in found if region.outputs)


def _users_elsewhere(node: Node, regions: Partition) -> list[Node]:
    """Return the users of ``node`` in other regions."""
    return [user for user in node.users if user in regions and regions[user] != regions[node]]


def _sink_views(graph: Graph, regions: Partition) -> None:
    """Make a view in each region that uses it; the defining region then has no such output."""
    for node in reversed(graph.nodes):
        if node not in regions or node.target not in VIEWS:
            continue
        users: dict[int, list[Node]] = defaultdict(list)
        for user in _users_elsewhere(node, regions):
            users[regions[user]].append(user)
        for region, group in users.items():
            with graph.inserting_after(node):
                copy = graph.node_copy(node)
            regions[copy] = region
            for user in group:
                user.replace_input_with(node, copy)
        if not node.users:
            del regions[node]
            graph.erase_node(node)


def _settle_layouts(graph: Graph, regions: Partition, args: Sequence[Tensor]) -> None:
    """Make values cross regions contiguous, and recompute the strides that this changes."""
    mode = fake_mode(graph)
    changed: set[Node] = set()  # nodes whose strides differ from before
    for node, given in zip(graph.find_nodes(op="placeholder"), args, strict=True):
        if given.stride() != node.meta["val"].stride():
            node.meta["val"] = empty_like(mode, given)
            changed.add(node)
    for node in list(graph.nodes):
        if node not in regions:
            continue
        if not changed.isdisjoint(node.all_input_nodes) and node.target is not flex_attention:
            before, after = node.meta["val"], result_of(node)
            if _strides(before) != _strides(after):
                node.meta["val"] = after
                changed.add(node)
        users = _users_elsewhere(node, regions)
        if users and not node.meta["val"].is_contiguous():
            with graph.inserting_after(node):
                settled = insert(graph, aten.contiguous.default, (node,), node)
            regions[settled] = regions[node]
            changed.add(settled)
            for user in users:
                user.replace_input_with(node, settled)


def _strides(result: Any) -> list[tuple[int, ...]]:
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return [leaf.stride() for leaf in leaves if isinstance(leaf, Tensor)]
