"""Turn in-place writes to a graph's own tensors into values; rewriting a step needs this.

Before::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div_.Tensor(%1, 2.0): float64[4]
    return [%1]

After::

    %1 = aten.arange.default(4): float64[4]
    %2 = aten.div.Tensor(%1, 2.0): float64[4]
    return [%2]

A write to a part of such a tensor, ``table[..., 0::2] = ...``, becomes a ``slice_scatter``, and
views of it that are used later are recreated. A write to an input, or to a view whose base is used
later, is left for the caller to refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.passes.graph.aliases import is_write, owners, shared_arguments
from ditfastattn.passes.graph.ir import aten, insert, value

_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def functionalize(module: GraphModule) -> list[Node]:
    """Replace writes by values where possible; return the nodes that still write."""
    left: list[Node] = []
    for node in list(module.graph.nodes):
        if is_write(node) and not _replaced(module, node):
            left.append(node)
    module.recompile()
    return left


def _replaced(module: GraphModule, node: Node) -> bool:
    """Replace the write ``node`` by a value, unless another tensor shares the memory written."""
    chain = _parts(node.args[0])
    base = chain[0]
    owner, *more = owners(base, _viewed)
    if more or owner.op != "call_function":
        return False
    later = set(_after(node))
    own = _aliases(base)
    others = [alias for alias in _aliases(owner) if alias not in own]
    if any(user in later for alias in others for user in alias.users):
        return False
    made = _value(module, node)
    if made is None:
        return False
    with module.graph.inserting_before(node):
        for parent, part in zip(chain[-2::-1], chain[:0:-1], strict=True):
            if value(part).shape != value(parent).shape:  # otherwise all of it is written
                arguments = (parent, made, *part.args[1:])
                made = insert(module.graph, _SCATTERS[part.target], arguments, node)
        renewed = {base: made}
        for alias in own[1:]:  # from here on, views are views of the new value
            if alias not in later and alias is not node:
                args, kwargs = map_arg((alias.args, alias.kwargs), lambda n: renewed.get(n, n))
                renewed[alias] = insert(module.graph, alias.target, args, alias, dict(kwargs))
    written: Any = node.args[0]
    node.replace_all_uses_with(renewed[written])
    module.graph.erase_node(node)
    for alias, new in renewed.items():
        for user in list(alias.users):
            if user in later:
                user.replace_input_with(alias, new)
    return True


def _parts(written: Any) -> list[Node]:
    """Return the tensor that ``written`` is a part of, and the views that lead to it."""
    chain: list[Node] = [written]
    while chain[0].target in _SCATTERS:
        source: Any = chain[0].args[0]
        chain.insert(0, source)
    return chain


def _viewed(tensor: Node) -> tuple[Node, ...]:
    """Return what ``tensor`` may be a view of; the result of a write counts as a new tensor."""
    return () if is_write(tensor) else shared_arguments(tensor)


def _aliases(tensor: Node) -> list[Node]:
    """Return ``tensor`` and all views of it, in the order of the graph."""
    found = {tensor}
    for node in _after(tensor):
        if node.op == "call_function" and not found.isdisjoint(_viewed(node)):
            found.add(node)
    return [node for node in tensor.graph.nodes if node in found]


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


def _pure(node: Node) -> OpOverload | None:
    """Return the out-of-place operator of ``node``, if its result has the same dtype and shape."""
    assert isinstance(node.target, OpOverload)
    name, overload = node.target._schema.name, node.target._overloadname
    packet = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_"), None)
    if not name.startswith("aten::") or packet is None or overload not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload)
    written: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]  # a node: it was checked
    with torch.no_grad():
        made = found(*map_arg(node.args, _meta_like), **map_arg(node.kwargs, _meta_like))
    same = made.dtype == written.dtype and made.shape == written.shape
    return found if same else None


def _meta_like(source: Node) -> Tensor:
    value: Tensor = source.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _after(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]
