"""Expand what PyTorch packs: multi-head attention, grouped heads, products by einsum.

Before::

    %5 = aten._native_multi_head_attention.default(%0, %0, %0, 32, 4, %1, %2, %3, %4, None, False)
    %6 = getitem(%5, 0): float32[2, 64, 32]

After::

    %5 = aten.slice.Tensor(%1, 0, 0, 32): float32[32, 32]
    ...
    %20 = aten.scaled_dot_product_attention.default(%9, %14, %19): float32[2, 4, 64, 8]
    %23 = aten.linear.default(%22, %3, %4): float32[2, 64, 32]

The keys and values of grouped-query attention are repeated for each head that reads them. An
einsum of two tensors that is one batched product of matrices, as queries and keys are often
multiplied, becomes permutations and a ``matmul``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, calls, insert, value

_PACKED = aten._native_multi_head_attention.default
_PARTS = 3  # queries, keys, values


def expand_multihead(module: GraphModule) -> dict[str, str]:
    """Rewrite in place; return the packed attentions that remain, each with the reason."""
    graph = module.graph
    left: dict[str, str] = {}
    for node in calls(graph, _PACKED):
        reason = _why_packed(node)
        if reason:
            left[node.name] = reason
        else:
            _unpack(graph, node)
    for node in calls(graph, ATTENTION):
        if argument(node, 7, "enable_gqa", False):
            _ungroup(graph, node)
    for node in calls(graph, aten.einsum.default):
        _as_matmul(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return left


def _why_packed(node: Node) -> str:
    if len(node.args) > 9 and node.args[9] is not None:
        return "it is a packed multi-head attention with a mask"
    results = [user for user in node.users if user.target is operator.getitem]
    if len(results) != len(node.users) or any(user.args[1] != 0 and user.users for user in results):
        return "its attention weights are used"
    return ""


def _unpack(graph: Graph, node: Node) -> None:
    width, heads, weight, bias, out_weight, out_bias = node.args[3:9]
    with graph.inserting_before(node):
        parts = [
            _projected(graph, node, part, (width, heads), (weight, bias)) for part in range(_PARTS)
        ]
        attention = insert(graph, ATTENTION, tuple(parts), node)
        merged = insert(graph, aten.transpose.int, (attention, 1, 2), node)
        shape = [*value(merged).shape[:2], width]
        flat = insert(graph, aten.reshape.default, (merged, shape), node)
        result = insert(graph, aten.linear.default, (flat, out_weight, out_bias), node)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def _projected(
    graph: Graph, node: Node, part: int, sizes: tuple[Any, Any], packed: Sequence[Any]
) -> Node:
    """Return queries, keys or values ``[B, H, N, D]``."""
    width, heads = sizes
    weight, bias = (
        insert(graph, aten.slice.Tensor, (item, 0, part * width, (part + 1) * width), node)
        for item in packed
    )
    source: Any = node.args[part]
    projected = insert(graph, aten.linear.default, (source, weight, bias), node)
    shape = [*value(projected).shape[:2], heads, width // heads]
    split = insert(graph, aten.view.default, (projected, shape), node)
    return insert(graph, aten.transpose.int, (split, 1, 2), node)


def _ungroup(graph: Graph, node: Node) -> None:
    """Repeat keys and values ``[B, G, N, D]`` to the heads of the query."""
    heads = value(node.args[0]).shape[1]
    with graph.inserting_before(node):
        repeated = [_repeated(graph, item, heads) for item in node.args[1:3]]
    node.args = (node.args[0], *repeated, *node.args[3:])
    node.kwargs = {name: item for name, item in node.kwargs.items() if name != "enable_gqa"}


def _repeated(graph: Graph, node: Any, heads: int) -> Node:
    batch, groups, tokens, head_dim = value(node).shape
    apart = insert(graph, aten.unsqueeze.default, (node, 2), node)
    shape = [batch, groups, heads // groups, tokens, head_dim]
    each = insert(graph, aten.expand.default, (apart, shape), node)
    return insert(graph, aten.reshape.default, (each, [batch, heads, tokens, head_dim]), node)


def _as_matmul(graph: Graph, node: Node) -> None:
    """Turn an einsum that is one batched product of matrices into a ``matmul``."""
    equation = node.args[0]
    operands: Any = node.args[1]
    terms, _, out = str(equation).replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) != 2 or not out or "." in terms:
        return
    left, right = letters
    batch = [c for c in out if c in left and c in right]
    rows = [c for c in out if c in left and c not in right]
    columns = [c for c in out if c in right and c not in left]
    summed = [c for c in left if c in right and c not in out]
    sizes = (len(rows), len(columns), len(summed))
    if sizes != (1, 1, 1) or not 1 <= len(batch) <= 2:
        return
    if len({*left}) != len(batch) + 2 or len({*right}) != len(batch) + 2 or len(out) != len(left):
        return
    first, second = operands
    with graph.inserting_before(node):
        first = _permuted(graph, first, left, [*batch, *rows, *summed])
        second = _permuted(graph, second, right, [*batch, *summed, *columns])
        product = insert(graph, aten.matmul.default, (first, second), node)
        result = _permuted(graph, product, "".join([*batch, *rows, *columns]), list(out))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _permuted(graph: Graph, node: Any, letters: str, wanted: Sequence[str]) -> Node:
    order = [letters.index(letter) for letter in wanted]
    if order == list(range(len(order))):
        found: Node = node
        return found
    return insert(graph, aten.permute.default, (node, order), node)
