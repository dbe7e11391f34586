"""Remove what computes nothing, so that data flow shows only what matters.

Before::

    %1 = aten.to.dtype(%0, float32): float32[2, 4]
    %2 = aten.dropout.default(%1, 0.1, False): float32[2, 4]
    %3 = aten.div.Tensor(%2, 1.0): float32[2, 4]
    return [%3]

After::

    return [%0]
"""

from __future__ import annotations

from torch.amp.autocast_mode import _enter_autocast
from torch.fx import GraphModule, Node

from ditfastattn.passes.ir import SCALINGS, aten, calls, value

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
_ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def canonicalize(module: GraphModule) -> int:
    """Drop exact no-ops and dead nodes in place; return how many no-ops were dropped."""
    dropped = _drop_inactive_autocast(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            dropped += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return dropped


def _drop_inactive_autocast(module: GraphModule) -> int:
    """Drop the ends of blocks in which autocast is off, as it is around the graph."""
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
