"""Remove what computes nothing, so that data flow shows only what matters.

Before::

    %1 = aten.to.dtype(%0, float32): float32[2, 4]
    %2 = aten.dropout.default(%1, 0.1, False): float32[2, 4]
    %3 = aten.div.Tensor(%2, 1.0): float32[2, 4]
    return [%3]

After::

    return [%0]

A cast to the dtype of another tensor no longer depends on that tensor::

    %2 = aten.type_as.default(%0, %1): float32[2, 4]

becomes::

    %2 = aten.to.dtype(%0, float32): float32[2, 4]

A view of another shape becomes a reshape, which copies where passes have changed the layout::

    %2 = aten.view.default(%1, [2, 64, 32]): float32[2, 64, 32]

becomes::

    %2 = aten.reshape.default(%1, [2, 64, 32]): float32[2, 64, 32]

A selection from the first dimension of a permutation, such as the queries of ``[3, B, H, N, D]``,
moves before the permutation, so that the batch stays the first dimension::

    %1 = aten.permute.default(%0, [2, 0, 3, 1, 4]): float32[3, 2, 4, 16, 8]
    %2 = aten.select.int(%1, 0, 1): float32[2, 4, 16, 8]

becomes::

    %1 = aten.select.int(%0, 2, 1): float32[2, 16, 4, 8]
    %2 = aten.permute.default(%1, [0, 2, 1, 3]): float32[2, 4, 16, 8]
"""

from __future__ import annotations

from typing import Any

from torch.amp.autocast_mode import _enter_autocast
from torch.fx import GraphModule, Node

from ditfastattn.passes.graph.ir import SCALINGS, argument, aten, calls, insert, value

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
_ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def canonicalize(module: GraphModule) -> int:
    """Drop exact no-ops and dead nodes in place; return how many no-ops were dropped."""
    dropped = _drop_inactive_autocast(module)
    for node in calls(module.graph, aten.permute.default):
        _select_before(module, node)
    for node in calls(module.graph, aten.type_as.default):
        _cast_by_dtype(module, node)
    for node in calls(module.graph, aten.view.default):
        node.target = aten.reshape.default
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            dropped += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return dropped


def _drop_inactive_autocast(module: GraphModule) -> int:
    """Drop both ends of blocks that turn autocast off: it is off around the graph already."""
    inactive = [
        node
        for node in calls(module.graph, _enter_autocast)
        if len(node.args) > 2 and node.args[2] is False
    ]
    for node in inactive:
        for end in list(node.users):
            module.graph.erase_node(end)
        module.graph.erase_node(node)
    return len(inactive)


def _cast_by_dtype(module: GraphModule, node: Node) -> None:
    """Replace ``node``, a cast to another tensor's dtype, by a cast to that dtype."""
    source: Any = node.args[0]
    if value(source).device == value(node).device:
        with module.graph.inserting_before(node):
            cast = insert(module.graph, aten.to.dtype, (source, value(node).dtype), node)
        node.replace_all_uses_with(cast)
        module.graph.erase_node(node)


def _select_before(module: GraphModule, permute: Node) -> None:
    """Make selections from the first dimension of ``permute`` select from its source."""
    graph = module.graph
    source: Any = permute.args[0]
    dims: Any = permute.args[1]
    first, *others = (dim % value(source).dim() for dim in dims)
    order = [dim - (dim > first) for dim in others]
    for node, index in _selections(permute):
        with graph.inserting_before(node):
            selected = insert(graph, aten.select.int, (source, first, index), node)
            moved = insert(graph, aten.permute.default, (selected, order), node)
        node.replace_all_uses_with(moved)
        graph.erase_node(node)


def _selections(node: Node) -> list[tuple[Node, int]]:
    """Return the users of ``node`` that select from dimension 0, each with its index."""
    found: list[tuple[Node, Any]] = []
    for user in node.users:
        if argument(user, 1, "dim", 0) != 0:
            continue
        if user.target is aten.select.int:
            found.append((user, argument(user, 2, "index")))
        if user.target is aten.unbind.int:
            found += [(item, item.args[1]) for item in user.users]
    return found


def _is_no_op(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target in _ALIASES:
        return True
    if node.target in SCALINGS:
        return _is_one(node.args[1]) and _same_kind(node)
    return node.target in _CASTS and _same_kind(node)


def _is_one(factor: object) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


def _same_kind(node: Node) -> bool:
    before, after = value(node.all_input_nodes[0]), value(node)
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and before.shape == after.shape
        and before.stride() == after.stride()
    )
