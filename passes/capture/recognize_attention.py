"""Rewrite every form of attention as one node: scaled_dot_product_attention on [B, H, N, D].

Before::

    %4 = aten.mul.Tensor(%0, 0.35): float32[2, 4, 64, 8]
    %5 = aten.transpose.int(%1, -2, -1): float32[2, 4, 8, 64]
    %6 = aten.matmul.default(%4, %5): float32[2, 4, 64, 64]
    %7 = aten.softmax.int(%6, -1): float32[2, 4, 64, 64]
    %8 = aten.matmul.default(%7, %2): float32[2, 4, 64, 8]

After::

    %4 = aten.mul.Tensor(%0, 0.35): float32[2, 4, 64, 8]
    %6 = aten.scaled_dot_product_attention.default(%4, %1, %2, scale=1.0): float32[2, 4, 64, 8]

Scalings, an added mask, casts and inactive dropout may stand between the products, in any order.
Heads folded into the batch, ``[B * H, N, D]``, are unfolded. A softmax between two products that is
not recognized is reported with the reason, and so is linear attention, which has no softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.capture.expand_multihead import expand_multihead
from ditfastattn.passes.graph.ir import ATTENTION, SCALINGS, aten, calls, insert, outputs, value

RECOGNIZED = "recognized"  # marks an attention that the model writes as other operators
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
_FLATTENED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_KEEPS_ROWS = (
    *(*SCALINGS, *_CASTS, aten.contiguous.default, aten.clone.default),
    *(aten.transpose.int, aten.permute.default),
)


@dataclass(frozen=True)
class Unrecognized:
    """Name a node that computes some attention, and why it was not rewritten."""

    node: str
    reason: str


@dataclass(frozen=True)
class _Scores:
    """Hold the scores before a softmax: the product, its scale, and the masks added to it."""

    product: Node
    scale: float
    masks: tuple[Node, ...]


class _Declined(Exception):  # noqa: N818  # it carries a reason, and never leaves this module
    """Carry why something is not the attention that it looks like."""


def recognize_attention(module: GraphModule) -> tuple[Unrecognized, ...]:
    """Rewrite attention in place; return what looks like it and was not rewritten."""
    left = [Unrecognized(name, reason) for name, reason in expand_multihead(module).items()]
    for softmax in calls(module.graph, *_SOFTMAX):
        if not _between_products(softmax):
            continue
        try:
            _rewrite(module.graph, softmax)
        except _Declined as reason:
            left.append(Unrecognized(softmax.name, str(reason)))
    module.graph.eliminate_dead_code()
    module.recompile()
    return (*left, *_linear_attentions(module.graph))


def _rewrite(graph: Graph, softmax: Node) -> None:
    _check_axis(softmax)
    scores = _scores(softmax)
    weights, product = _weighted_sum(softmax)
    query, key = _factors(scores.product)
    values: Any = product.args[1]
    if value(query).dim() not in (3, 4):
        raise _Declined(f"its query has {value(query).dim()} dimensions, not [B, H, N, D]")
    if value(product).dtype != value(query).dtype:
        raise _Declined("its result and its query differ in dtype")
    with graph.inserting_before(product):
        key = insert(graph, aten.transpose.int, (key, -2, -1), product)
        mask = _mask(graph, scores.masks, product)
        heads = _heads(graph, query) if value(query).dim() == 3 else 0
        operands: list[Any] = [query, key, values]
        if value(query).dim() == 3:
            operands = [_unfolded(graph, item, heads) for item in operands]
            mask = mask and _unfolded_mask(graph, mask, value(query).shape[0], heads)
        if mask is not None:
            mask = _as_mask(graph, mask, operands, product)
        arguments = (*operands, mask) if mask is not None else tuple(operands)
        attention = insert(graph, ATTENTION, arguments, product, {"scale": scores.scale})
        attention.meta[RECOGNIZED] = True
        result = attention
        if value(product).dim() == 3:
            shape = [value(query).shape[0], *value(product).shape[1:]]
            result = insert(graph, aten.reshape.default, (attention, shape), product)
    product.replace_all_uses_with(result)
    graph.erase_node(product)
    for node in reversed(weights):
        if not node.users:
            graph.erase_node(node)


def _between_products(softmax: Node) -> bool:
    after = any(
        user.target in _PRODUCTS and user.args[0] is node
        for node in _chain_down(softmax)
        for user in node.users
    )
    return after and any(node.target in (*_PRODUCTS, aten.baddbmm.default) for node in _up(softmax))


def _up(softmax: Node) -> list[Node]:
    """Return the elementwise nodes before ``softmax``, up to and including the products."""
    seen: list[Node] = []
    pending: list[Any] = [softmax.args[0]]
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.append(node)
        if node.target in (*SCALINGS, *_CASTS, aten.add.Tensor, aten.masked_fill.Scalar):
            pending.extend(node.args[:2])
    return seen


def _chain_down(softmax: Node) -> list[Node]:
    """Return ``softmax`` and the casts and inactive dropouts that follow it."""
    chain = [softmax]
    for node in chain:
        chain += [user for user in node.users if user.target in _CASTS]
    return chain


def _check_axis(softmax: Node) -> None:
    axis: Any = softmax.args[1]
    if axis % value(softmax).dim() != value(softmax).dim() - 1:
        raise _Declined(f"its softmax is over dimension {axis}, not the last")


def _scores(softmax: Node) -> _Scores:
    """Walk from ``softmax`` up to the product of queries and keys."""
    node: Any = softmax.args[0]
    scale = 1.0
    masks: list[Node] = []
    while node.target not in _PRODUCTS:
        if node.target is aten.baddbmm.default:
            return _fused_scores(node, scale, masks)
        if node.target in _CASTS:
            node = node.args[0]
        elif node.target in SCALINGS and isinstance(node.args[1], (int, float)):
            factor = float(node.args[1])
            scale *= factor if node.target in _MULTIPLIES else 1.0 / factor
            node = node.args[0]
        elif node.target is aten.add.Tensor and not node.kwargs:
            ours = [arg for arg in node.args if isinstance(arg, Node) and _has_product(arg)]
            others = [arg for arg in node.args if arg not in ours]
            if len(ours) != 1 or len(others) != 1 or not isinstance(others[0], Node):
                raise _Declined("what is added to its scores is not a mask")
            if scale != 1.0:
                raise _Declined("it scales its scores after a mask was added")
            masks.append(others[0])
            node = ours[0]
        else:
            raise _Declined(f"{node.target} stands between its product and its softmax")
    return _Scores(node, scale, tuple(masks))


def _fused_scores(node: Node, scale: float, masks: list[Node]) -> _Scores:
    beta, alpha = (float(node.kwargs.get(name, 1.0)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
    added: Any = node.args[0]
    if beta not in (0.0, 1.0) or (beta == 1.0 and scale != 1.0):
        raise _Declined("its mask is scaled")
    return _Scores(node, scale * alpha, (*masks, added) if beta else tuple(masks))


def _has_product(node: Node) -> bool:
    while node.target in (*SCALINGS, *_CASTS, aten.add.Tensor):
        parents = [arg for arg in node.args[:2] if isinstance(arg, Node)]
        if len(parents) > 1:
            return any(_has_product(parent) for parent in parents)
        node = parents[0]
    return node.target in (*_PRODUCTS, aten.baddbmm.default)


def _factors(product: Node) -> tuple[Node, Node]:
    first, second = product.args[-2:] if product.target is aten.baddbmm.default else product.args
    if not isinstance(first, Node) or not isinstance(second, Node):
        raise _Declined("its product has a factor that is not a tensor")
    return first, second


def _weighted_sum(softmax: Node) -> tuple[list[Node], Node]:
    """Return the probabilities with their casts, and the one product that uses them."""
    chain = _chain_down(softmax)
    uses = [(node, user) for node in chain for user in node.users if user not in chain]
    products = [user for node, user in uses if user.target in _PRODUCTS and user.args[0] is node]
    if len(products) != len(uses) or len(products) != 1:
        raise _Declined("its probabilities are also used elsewhere")
    return chain, products[0]


def _heads(graph: Graph, query: Node) -> int:
    """Return into how many heads a query ``[B * H, N, D]`` can be unfolded: H, or 1.

    The batch is the model's. It must be the outer factor: only then is its first half the first
    half of the attention too.
    """
    batch = value(outputs(graph)[0]).shape[0]
    folded = value(query).shape[0]
    if folded % batch:
        return 1
    node: Any = query
    while node.target in _KEEPS_ROWS:
        node = node.args[0]
    if node.target not in _FLATTENED:
        return 1
    source: Any = node.args[0]
    before, after = value(source).shape, value(node).shape
    for position, size in enumerate(before):
        leading = _product(before[:position])
        if size == batch and any(
            after[place] == folded and _product(after[:place]) == leading
            for place in range(len(after))
        ):
            return int(folded // batch)
    return 1


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _unfolded(graph: Graph, node: Node, heads: int) -> Node:
    folded, *rest = value(node).shape
    shape = [folded // heads, heads, *rest]
    return insert(graph, aten.reshape.default, (node, shape), node)


def _unfolded_mask(graph: Graph, mask: Node, folded: int, heads: int) -> Node:
    if value(mask).dim() == 3 and value(mask).shape[0] == folded:
        return _unfolded(graph, mask, heads)
    if value(mask).dim() == 3 and value(mask).shape[0] != 1:
        raise _Declined(f"its mask has the shape {list(value(mask).shape)}")
    return mask


def _mask(graph: Graph, masks: Sequence[Node], like: Node) -> Node | None:
    """Return the sum of ``masks``, or None."""
    if not masks:
        return None
    total = masks[0]
    for mask in masks[1:]:
        total = insert(graph, aten.add.Tensor, (total, mask), like)
    return total


def _as_mask(graph: Graph, mask: Node, operands: Sequence[Node], like: Node) -> Node:
    """Return ``mask`` in the query's dtype, as attention takes it."""
    wanted = value(operands[0]).dtype
    if value(mask).dtype == wanted:
        return mask
    return insert(graph, aten.to.dtype, (mask, wanted), like)


def _linear_attentions(graph: Graph) -> list[Unrecognized]:
    """Return products of products without a softmax between them: linear attention."""
    found: list[Unrecognized] = []
    for product in calls(graph, *_PRODUCTS):
        first, second = product.args
        inner = [n for n in (first, second) if isinstance(n, Node) and n.target in _PRODUCTS]
        if len(inner) == 1 and value(product).dim() >= 3:
            reason = "it is linear attention, which has no softmax: its cost is not quadratic"
            found.append(Unrecognized(product.name, reason))
    return found
