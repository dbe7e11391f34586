"""Tell key masks, such as padding, from masks that depend on the query.

A key mask is the same for every query, and so is supported within any window. A mask that depends
on the query, such as a causal one, is not. Which of both a mask is follows from how its second last
dimension, the queries, was made::

    %4 = aten.unsqueeze.default(%3, 2): bool[2, 1, 1, 64]
    %5 = aten.expand.default(%4, [2, 1, 64, 64]): bool[2, 1, 64, 64]   a key mask
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


def insert_key_mask(graph: Graph, mask: Node, like: Node) -> Node:
    """Add one query's row of ``mask``, ``[B | 1, H | 1, 1, N]``, at the insertion point."""
    row, rank = mask, value(mask).dim()
    if value(mask).shape[-2] != 1:
        row = insert(graph, aten.slice.Tensor, (mask, rank - 2, 0, 1), like)
    for _ in range(4 - rank):
        row = insert(graph, aten.unsqueeze.default, (row, 0), like)
    return row


def key_mask(mask: Tensor) -> Tensor:
    """Return one query's row of ``mask``, ``[B | 1, H | 1, 1, N]``."""
    row = mask[..., :1, :]
    return row.reshape((1,) * (4 - row.dim()) + tuple(row.shape))


def hide_keys(seen: Tensor, mask: Tensor | None) -> Tensor:
    """Return an attention mask of the pairs that are ``seen``, without those that ``mask`` hides.

    ``mask`` holds booleans, or floats to be added to the scores; attention takes both.
    """
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``mask`` adds to the scores, in ``dtype``."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def check_key_mask(q: Tensor, mask: Tensor | None, where: str) -> None:
    """Raise ``ConfigError`` unless ``mask`` is ``[B | 1, H | 1, 1, N]`` for ``q``."""
    if mask is None:
        return
    batch, heads, tokens, _ = q.shape
    fits: Any = mask.dim() == 4 and mask.shape[2:] == (1, tokens)
    if not (fits and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)):
        raise ConfigError(
            "the mask is not a key mask of these tokens",
            where=where,
            got=list(mask.shape),
            expected=f"[{batch} or 1, {heads} or 1, 1, {tokens}]",
            remedy="a window takes masks that are the same for every query",
        )
