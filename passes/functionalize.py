"""Turn writes to a graph's own tensors into values: steps can only be rewritten where none is left.

Before::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div_.Tensor(%1, 2.0): float64[4]
    return [%1]

After::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div.Tensor(%1, 2.0): float64[4]
    return [%2]

A write to a part of such a tensor, ``table[..., 0::2] = ...``, becomes a ``slice_scatter``. A write
to an input, or to a tensor that a view used later shares its memory with, is left for the caller to
refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.passes.ir import aten, insert, value

_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def functionalize(module: GraphModule) -> list[Node]:
    """Replace the writes that can be, in place; return the nodes that still write."""
    left: list[Node] = []
    for node in list(module.graph.nodes):
        if not is_write(node):
            continue
        if not _replaced(module, node):
            left.append(node)
    module.recompile()
    return left


def is_write(node: Node) -> bool:
    """Tell whether ``node`` writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _replaced(module: GraphModule, node: Node) -> bool:
    """Replace the write ``node`` by a value, if nobody could tell."""
    chain = _views(node.args[0])
    base = chain[0]
    if base.op != "call_function" or _is_view(base):
        return False
    if any(_is_view(user) for user in _seen_after(node, chain)):
        return False
    made = _value(module, node)
    if made is None:
        return False
    with module.graph.inserting_before(node):
        for parent, view in zip(chain[-2::-1], chain[:0:-1], strict=True):
            if value(view).shape != value(parent).shape:  # else all of it is written
                arguments = (parent, made, *view.args[1:])
                made = insert(module.graph, _SCATTERS[view.target], arguments, node)
    later = set(_after(node))
    for user in list(base.users):
        if user in later:
            user.replace_input_with(base, made)
    if node.users:
        node.replace_all_uses_with(made if len(chain) == 1 else _again(module, node, made, chain))
    module.graph.erase_node(node)
    return True


def _views(written: Any) -> list[Node]:
    """Return the tensor that ``written`` is a part of, and the views that lead to it."""
    chain: list[Node] = [written]
    while chain[0].target in _SCATTERS:
        source: Any = chain[0].args[0]
        chain.insert(0, source)
    return chain


def _seen_after(node: Node, chain: Sequence[Node]) -> list[Node]:
    """Return the views of what is written that were made before, and that are used after it."""
    later = set(_after(node))
    views = [user for source in chain for user in source.users if _is_view(user)]
    for view in views:
        views += [user for user in view.users if _is_view(user)]
    return [view for view in views if view not in later and any(u in later for u in view.users)]


def _again(module: GraphModule, node: Node, made: Node, chain: Sequence[Node]) -> Node:
    """Return the part that was written, of the new value of the whole."""
    part = made
    with module.graph.inserting_before(node):
        for view in chain[1:]:
            part = insert(module.graph, view.target, (part, *view.args[1:]), view)
    return part


def _value(module: GraphModule, node: Node) -> Node | None:
    """Return what ``node`` writes, as a value; None where no operator computes it."""
    with module.graph.inserting_before(node):
        if node.target is aten.copy_.default:
            return _copied(module, node)
        target = _pure(node)
        if target is None:
            return None
        made = module.graph.call_function(target, node.args, node.kwargs)
    made.meta = dict(node.meta)
    return made


def _copied(module: GraphModule, node: Node) -> Node:
    """Return the source of a copy, in the dtype and shape of where it goes."""
    place, source = node.args[:2]
    wanted = value(place)
    assert isinstance(source, Node)
    if value(source).dtype != wanted.dtype:
        source = insert(module.graph, aten.to.dtype, (source, wanted.dtype), node)
    if value(source).shape != wanted.shape:
        source = insert(module.graph, aten.expand.default, (source, list(wanted.shape)), node)
    return source


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


def _after(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]
