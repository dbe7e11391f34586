"""Masks of attention within windows: which pairs they hide, and what that adds to the scores.

A *key mask*, such as padding, is the same for every query: windows take one row of it. Any other
mask depends on the query, as a causal one does: windows take all rows, and each block of queries
its own rows and the columns of the keys that it sees. Which of both a mask is follows from how its
second last dimension, the queries, was made::

    %4 = aten.unsqueeze.default(%3, 2): bool[2, 1, 1, 64]
    %5 = aten.expand.default(%4, [2, 1, 64, 64]): bool[2, 1, 64, 64]   a key mask

A query that sees no key, since the mask hides all those in its window, gives 0, as in torch's
attention without a window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.graph.ir import aten, insert, value

_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int),
)
_SPREADS = (aten.expand.default, aten.repeat.default)
_COPIES = (
    *(aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
)
_UNTAGGED = (  # pointwise, but not tagged so
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor),
    *(aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf),
)
_FILLED = (
    *(aten.full.default, aten.ones.default, aten.zeros.default, aten.full_like.default),
    *(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default),
    *(aten.ones_like.default, aten.zeros_like.default),
)


def hides_keys_alone(mask: Node, keys: int) -> bool:
    """Return whether ``mask``, broadcast to ``[B, H, N, keys]``, is the same for every query."""
    return value(mask).shape[-1] == keys and _is_constant(mask)


def _is_constant(node: Node) -> bool:
    """Return whether ``node`` is the same along its second last dimension."""
    shape = value(node).shape
    if len(shape) < 2 or shape[-2] == 1 or node.target in _FILLED:
        return True
    sources = [source for source in node.all_input_nodes if value(source).dim()]
    if node.target in _SPREADS or node.target in _COPIES or _is_pointwise(node):
        return bool(sources) and all(map(_is_constant, sources))
    if node.target in _RESHAPES:  # only if both last dimensions stay
        return value(sources[0]).shape[-2:] == shape[-2:] and _is_constant(sources[0])
    return False


def _is_pointwise(node: Node) -> bool:
    return node.target in _UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ())


def insert_mask(graph: Graph, mask: Node, keys: int, like: Node) -> Node:
    """Add ``mask`` as windows take it, ``[B | 1, H | 1, N | 1, keys]``, at the insertion point.

    Of a key mask that is one query's row. Equal calls are made once.
    """
    row, rank = mask, value(mask).dim()
    if hides_keys_alone(mask, keys) and value(mask).shape[-2] != 1:
        row = _once(graph, aten.slice.Tensor, (mask, rank - 2, 0, 1), like)
    for _ in range(4 - rank):
        row = _once(graph, aten.unsqueeze.default, (row, 0), like)
    if value(row).shape[-1] != keys:
        row = _once(graph, aten.expand.default, (row, [-1, -1, -1, keys]), like)
    return row


def _once(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """Return the call of ``target`` that is there, or a new one at the insertion point."""
    known = (user for user in args[0].users if (user.target, user.args) == (target, args))
    return next((user for user in known if user < like), None) or insert(graph, target, args, like)


def windowed_mask(mask: Tensor, keys: int, hides_keys: bool) -> Tensor:
    """Return ``mask`` as windows take it, ``[B | 1, H | 1, N | 1, keys]``; see ``insert_mask``."""
    row = mask[..., :1, :] if hides_keys else mask
    return row.reshape((1,) * (4 - row.dim()) + tuple(row.shape)).expand(-1, -1, -1, keys)


def hide_pairs(seen: Tensor, mask: Tensor | None) -> Tensor:
    """Return an attention mask of the pairs that are ``seen``, without those that ``mask`` hides.

    ``mask`` holds booleans, or floats to be added to the scores; attention takes both.
    """
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def rows_of(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return what ``mask`` says of the queries from ``start`` to ``stop``."""
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]


def rows_outside(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return what ``mask`` says of the queries before ``start`` and from ``stop``."""
    if mask.shape[2] == 1:
        return mask
    return torch.cat([mask[:, :, :start], mask[:, :, stop:]], dim=2)


def bias_of_blocks(mask: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``mask`` adds to the scores of blocks, ``[B | 1, H | 1, blocks, n | 1, k]``.

    ``queries``, ``[blocks, n]``, holds the tokens of each block, and ``keys``, ``[blocks, k]``,
    those that it sees.
    """
    rows = torch.zeros_like(queries[:, :1]) if mask.shape[2] == 1 else queries
    return bias_of(mask[:, :, rows[:, :, None], keys[:, None, :]], dtype)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``mask`` adds to the scores, in ``dtype``."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def check_mask(q: Tensor, k: Tensor, mask: Tensor | None, where: str) -> None:
    """Raise ``ConfigError`` unless ``mask`` is ``[B | 1, H | 1, queries | 1, keys]``."""
    if mask is None:
        return
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    allowed = (1, batch), (1, heads), (1, queries), (keys,)
    sizes = tuple(mask.shape)
    if len(sizes) != 4 or any(size not in each for size, each in zip(sizes, allowed, strict=True)):
        raise ConfigError(
            "the mask does not fit these tokens",
            where=where,
            got=list(sizes),
            expected=f"[{batch} or 1, {heads} or 1, {queries} or 1, {keys}]",
            remedy="a window takes masks of four dimensions that hold every key",
        )
