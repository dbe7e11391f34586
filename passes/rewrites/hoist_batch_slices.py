"""Hoist slices that take half of the batch above everything that works row by row.

Before::

    %3 = aten.linear.default(%0, %1, %2): float32[2, 64, 32]
    %4 = aten.slice.Tensor(%3, 0, 0, 1): float32[1, 64, 32]

After::

    %3 = aten.slice.Tensor(%0, 0, 0, 1): float32[1, 64, 16]
    %4 = aten.linear.default(%3, %1, %2): float32[1, 64, 32]

A slice moves above a node only if every user of the node takes the same half: work is halved, never
repeated. The rules of ``analysis.batch_halves`` are exact, so a slice that stops early costs speed,
not correctness.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.batch_halves import TakeHalf, halved_call, halved_split
from ditfastattn.passes.graph.ir import aten, calls, insert, value
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode

_HALF = "batch_half"  # meta key of slices that take half of the batch: whether the second


@dataclass(frozen=True)
class HoistBatchSlices:
    """Move batch-half slices as far up as is exact and saves work."""

    name: str = "hoist-batch-slices"
    requires: tuple[str, ...] = ("share-guidance",)

    def run(self, module: GraphModule) -> PassResult:
        """Erase dead users, which would hold slices up, then move slices until none can."""
        graph = module.graph
        changed = EliminateDeadCode().run(module).changed
        pending = [node for node in graph.nodes if _HALF in node.meta]
        while pending:
            node = pending.pop()
            if not node.users:  # it has been hoisted or merged already
                continue
            moved = _hoist(graph, node)
            if moved is not None:
                changed += 1
                pending.extend(moved)
        return PassResult(changed, tuple(_stopped(graph)))


def insert_half(graph: Graph, node: Node, second: bool) -> Node:
    """Return the slice that takes one half of ``node`` along dimension 0, made at most once."""
    for user in node.users:
        if user.meta.get(_HALF) is second:
            return user
    rows = value(node).shape[0]
    bounds = (rows // 2, rows) if second else (0, rows // 2)
    with graph.inserting_after(_last_input(graph) if node.op == "placeholder" else node):
        half = insert(graph, aten.slice.Tensor, (node, 0, *bounds), node)
    half.meta[_HALF] = second
    return half


def _last_input(graph: Graph) -> Node:
    last: Node = graph.find_nodes(op="placeholder")[-1]
    return last


def _hoist(graph: Graph, half: Node) -> list[Node] | None:
    """Move ``half`` above the node it slices; return the slices that may move next."""
    source, second = half.args[0], half.meta[_HALF]
    if not isinstance(source, Node) or source.op != "call_function":
        return None
    if any(user.meta.get(_HALF) is not second for user in source.users):
        return None
    made: list[Node] = []

    def take_half(node: Node) -> Node:
        made.append(insert_half(graph, node, second))
        return made[-1]

    halved = _halved(graph, source, take_half)
    if halved is None:
        return None
    half.replace_all_uses_with(halved)
    graph.erase_node(half)
    for node in _erase_dead(graph, source):
        made.extend(user for user in node.users if user.meta.get(_HALF) is second)
    return made


def _erase_dead(graph: Graph, node: Node) -> list[Node]:
    """Erase ``node`` and what only it used; return the nodes that lost a user and live on."""
    if node.users or node.op != "call_function":
        return [node]
    sources = node.all_input_nodes
    graph.erase_node(node)
    return [alive for source in sources for alive in _erase_dead(graph, source)]


def _halved(graph: Graph, node: Node, take_half: TakeHalf) -> Node | None:
    """Compute one half of ``node`` from halves of its inputs; None where no rule applies."""
    if node.target is operator.getitem:
        return _halved_item(graph, node, take_half)
    call = halved_call(node, take_half)
    if call is None:
        return None
    with graph.inserting_before(node):
        return insert(graph, node.target, call.args, node, call.kwargs)


def _halved_item(graph: Graph, item: Node, take_half: TakeHalf) -> Node | None:
    """Compute one half of one piece of a chunk or split."""
    pieces: Any = item.args[0]
    call = halved_split(pieces, take_half)
    if call is None:
        return None
    with graph.inserting_before(item):
        halved = insert(graph, pieces.target, call.args, pieces, call.kwargs)
        return insert(graph, operator.getitem, (halved, item.args[1]), item)


def _stopped(graph: Graph) -> list[str]:
    """Name what slices could not pass although nothing else needs its whole batch."""
    halves = [node for node in calls(graph, aten.slice.Tensor) if _HALF in node.meta]
    sources = (half.all_input_nodes[0] for half in halves)
    return [
        f"{source.name}: no rule moves half of the batch above {source.target}"
        for source in sources
        if source.op == "call_function" and len(source.users) == 1
    ]
