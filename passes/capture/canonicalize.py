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

FlexAttention keeps no lists for its backward, which no inference runs.

Nor does what is filled with a number depend on the tensor whose shape it has::

    %2 = aten.ones_like.default(%1): float32[2, 4]

becomes::

    %2 = aten.full.default([2, 4], 1, dtype=float32): float32[2, 4]

A value without elements, such as the rows that a mask of ones leaves over, depends on nothing, and
adds nothing to what it is concatenated with::

    %1 = aten.slice.Tensor(%0, 0, 6, 9): float32[0, 4]
    %2 = aten.cat.default([%0, %1]): float32[6, 4]
    %3 = aten.linear.default(%1, %w): float32[0, 8]
    return [%2, %3]

becomes::

    %3 = aten.full.default([0, 8], 0, dtype=float32): float32[0, 8]
    return [%0, %3]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.autocast_mode import _enter_autocast
from torch.fx import GraphModule, Node

from ditfastattn.passes.graph.ir import (
    FLEX_ATTENTION,
    SCALINGS,
    argument,
    aten,
    calls,
    insert,
    value,
)

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
_FILLED: dict[Any, tuple[int, Any]] = {  # with the position of what fills it, or that itself
    aten.zeros_like.default: (0, 0),
    aten.new_zeros.default: (0, 0),
    aten.ones_like.default: (0, 1),
    aten.new_ones.default: (0, 1),
    aten.full_like.default: (1, None),
    aten.new_full.default: (2, None),
}
_BACKWARD_LISTS = slice(6, 10)  # the queries that attend each block of keys
_ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def canonicalize(module: GraphModule) -> int:
    """Drop exact no-ops and dead nodes in place; return how many no-ops were dropped."""
    dropped = _drop_inactive_autocast(module)
    for node in calls(module.graph, FLEX_ATTENTION):
        _drop_backward_lists(node)
    for node in calls(module.graph, aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # shapes and dtypes are fixed: it has held
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.all_input_nodes:
            filling = 0 if _is_empty(node) else _filling(node)
            if filling is not None:
                _make_anew(module, node, filling)
    for node in calls(module.graph, aten.cat.default):
        _drop_empty_operands(module, node)
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


def _drop_backward_lists(node: Node) -> None:
    """Leave out the lists of a FlexAttention's block mask that its backward alone reads."""
    block_mask: Any = list(node.args[4])  # type: ignore[arg-type]
    block_mask[_BACKWARD_LISTS] = [None] * len(block_mask[_BACKWARD_LISTS])
    node.args = (*node.args[:4], tuple(block_mask), *node.args[5:])


def _is_empty(node: Any) -> bool:
    found = node.meta.get("val")
    return isinstance(found, Tensor) and not found.numel()


def _filling(node: Node) -> Any:
    """Return the number that fills a value of which another one gives the shape alone, or None."""
    if node.target not in _FILLED or not value(node).is_contiguous():
        return None
    position, number = _FILLED[node.target]
    return argument(node, position, "fill_value") if position else number


def _make_anew(module: GraphModule, node: Node, filling: float) -> None:
    """Replace ``node``, whose elements are all ``filling``, by what depends on no other value."""
    kind = value(node)
    options = {"dtype": kind.dtype, "device": kind.device, "pin_memory": False}
    with module.graph.inserting_before(node):
        made = insert(module.graph, aten.full.default, (list(kind.shape), filling), node, options)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _drop_empty_operands(module: GraphModule, node: Node) -> None:
    """Leave those operands of a concatenation that have elements, unless they decide its dtype."""
    operands: Any = node.args[0]
    kept = [item for item in operands if not _is_empty(item)]
    if not kept or {value(item).dtype for item in kept} != {value(node).dtype}:
        return
    if len(kept) > 1:
        node.args = (kept, *node.args[1:])
        return
    node.replace_all_uses_with(kept[0])
    module.graph.erase_node(node)


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
