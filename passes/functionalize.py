"""Turn writes to a graph's own tensors into values: steps can only be rewritten where none is left.

Before::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div_.Tensor(%1, 2.0): float64[4]
    return [%1]

After::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div.Tensor(%1, 2.0): float64[4]
    return [%2]

A write to an input, or to a tensor that a view shares its memory with, is left for the caller to
refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def functionalize(module: GraphModule) -> list[Node]:
    """Replace the writes that can be, in place; return the nodes that still write."""
    left: list[Node] = []
    for node in list(module.graph.nodes):
        if not is_write(node):
            continue
        made = _pure(node) if _owns_memory(node.args[0]) else None
        if made is None:
            left.append(node)
            continue
        _replace(module, node, made)
    module.recompile()
    return left


def is_write(node: Node) -> bool:
    """Tell whether ``node`` writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _owns_memory(tensor: Any) -> bool:
    """Tell whether ``tensor`` was made here, and nothing else is a view of it."""
    made = isinstance(tensor, Node) and tensor.op == "call_function" and not _is_view(tensor)
    return made and not any(map(_is_view, tensor.users))


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True  # who knows
    return not is_write(node) and any(
        returned.alias_info is not None for returned in node.target._schema.returns
    )


def _pure(node: Node) -> OpOverload | None:
    """Return the operator that computes what ``node`` writes, if it is of the same type."""
    assert isinstance(node.target, OpOverload)
    name, overload = node.target._schema.name, node.target._overloadname
    packet = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_"), None)
    if not name.startswith("aten::") or packet is None or overload not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload)
    written: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]  # a node: it was checked
    with torch.no_grad():
        made = found(*map_arg(node.args, _outline), **map_arg(node.kwargs, _outline))
    same = made.dtype == written.dtype and made.shape == written.shape
    return found if same else None


def _outline(source: Node) -> Tensor:
    value: Tensor = source.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _replace(module: GraphModule, node: Node, target: OpOverload) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    with module.graph.inserting_before(node):
        made = module.graph.call_function(target, node.args, node.kwargs)
    made.meta = dict(node.meta)
    later = set(_after(node))
    for user in list(source.users):
        if user in later:
            user.replace_input_with(source, made)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _after(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]
