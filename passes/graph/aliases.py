"""Find which values of a graph may share memory.

An operator's schema marks the arguments that it may return views of (``alias_info``). Operators
composed of others carry no such mark, yet may return a view, as ``einsum`` of one operand does, or
an argument itself, as ``dropout`` does in evaluation: those are run on fake tensors to find out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tag
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from ditfastattn.passes.graph.ir import argument, aten, value
from ditfastattn.passes.graph.kinds import Kind, claimed_kind, run_call

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device)


def is_write(node: Node) -> bool:
    """Tell whether ``node`` writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def shared_arguments(node: Node, kind: Callable[[Node], Kind] = claimed_kind) -> tuple[Node, ...]:
    """Return the arguments whose memory the result of ``node`` may lie in.

    ``kind`` returns what is known of an argument.
    """
    if node.op != "call_function":
        return ()
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return (source,) if shared_arguments(source, kind) else ()
    if not isinstance(node.target, OpOverload):  # nothing is known of it
        return tuple(node.all_input_nodes)
    if not _returns_tensors(node.target) or Tag.dynamic_output_shape in node.target.tags:
        return ()  # what is selected by content is a copy
    marked = _marked(node.target)
    if not marked:
        return run_call(node, kind)[1]
    items = [argument(node, position, name) for position, name in marked]
    return () if _converts(node) else tuple(_nodes(items))


def owners(
    node: Node, shared: Callable[[Node], tuple[Node, ...]] = shared_arguments
) -> frozenset[Node]:
    """Return the nodes that allocate the memory ``node`` may lie in; ``node`` itself if it does."""
    found: set[Node] = set()
    seen = {node}
    pending = [node]
    while pending:
        current = pending.pop()
        sources = shared(current)
        if not sources:
            found.add(current)
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return frozenset(found)


@functools.cache
def _marked(target: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return the arguments that ``target`` may return views of, by position and name."""
    schema = target._schema
    if all(returned.alias_info is None for returned in schema.returns):
        return ()
    return tuple(
        (position, item.name)
        for position, item in enumerate(schema.arguments)
        if item.alias_info is not None
    )


@functools.cache
def _returns_tensors(target: OpOverload) -> bool:
    return any("Tensor" in str(returned.type) for returned in target._schema.returns)


def _converts(node: Node) -> bool:
    source: Any = node.args[0]
    return node.target in _CASTS and value(node).dtype != value(source).dtype


def _nodes(item: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(item, found.append)
    return found
