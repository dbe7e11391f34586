"""Compute linears of one input as one, so that runtimes see one product and hold its weight once.

Before::

    %3 = aten.linear.default(%0, %1): float32[2, 64, 32]
    %4 = aten.linear.default(%0, %2): float32[2, 64, 32]

After::

    %3 = aten.cat.default([%1, %2]): float32[64, 32]
    %4 = aten.linear.default(%0, %3): float32[2, 64, 64]
    %5 = aten.split_with_sizes.default(%4, [32, 32], -1): list
    %6 = getitem(%5, 0): float32[2, 64, 32]
    %7 = getitem(%5, 1): float32[2, 64, 32]

The concatenated weight is a constant where graphs are written with their weights. Builders of
engines merge such products by themselves, but not the same ones in each branch of a switch.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.graph.ir import aten, calls, insert, value

_LINEAR = aten.linear.default


def merge_linears(module: GraphModule, static: Collection[int]) -> int:
    """Merge in place; return how many linears were.

    ``static`` holds the positions of the inputs whose content is known.
    """
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    known = {node for index, node in enumerate(placeholders) if index in static}
    groups: dict[Any, list[Node]] = {}
    for node in calls(graph, _LINEAR):
        source, weight, *bias = node.args
        if weight in known and all(item in known for item in bias if item is not None):
            key = (source, bool(bias and bias[0] is not None))
            groups.setdefault(key, []).append(node)
    merged = [group for group in groups.values() if len(group) > 1]
    for group in merged:
        _merge(graph, group)
    if merged:
        module.recompile()
    return sum(map(len, merged))


def _merge(graph: Graph, group: list[Node]) -> None:
    first = group[0]
    sizes = [value(node).shape[-1] for node in group]
    with graph.inserting_before(first):
        parameters = [
            insert(graph, aten.cat.default, ([node.args[place] for node in group],), first)
            for place in range(1, len(first.args))
            if first.args[place] is not None
        ]
        whole = insert(graph, _LINEAR, (first.args[0], *parameters), first)
        parts = insert(graph, aten.split_with_sizes.default, (whole, sizes, -1), first)
        for index, node in enumerate(group):
            part = insert(graph, operator.getitem, (parts, index), node)
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
