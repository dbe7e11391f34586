"""Define ``ditfastattn::tile_attention``: self-attention among near tiles of a token grid.

A band over the flattened sequence sees whole rows of an image; a window by tiles sees what is near
along every axis. The grid is cut into tiles, and the queries of a tile attend the keys of the tiles
at most ``reach`` away along each axis. At the grid's edge the window moves inward, so that every
tile sees the same number of keys and none of them is masked (sliding tile attention, Zhang et al.
2025, section 3). Tokens are in row-major order of the grid, time first. Text tokens ``before`` and
``after`` the grid attend, and are attended by, all, or are keys alone, and a mask hides keys or
pairs, as in ``window_attention``.

The operator marks the window in a graph and computes it as masked full attention;
``lower_tile_attention`` replaces it by a form that skips the other tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.windows.masks import check_mask, hide_pairs
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.passes.windows.window_attention import allocate, check_alike, rows_of_queries


@torch.library.custom_op("ditfastattn::tile_attention", mutates_args=())
def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    reach: Sequence[int],
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend from each tile of ``q`` to the tiles near it.

    Takes and returns ``[B, H, N, D]``, where ``N`` is ``before``, the grid's tokens, ``after``; of
    ``q`` it may be the grid's tokens alone. ``mask``, ``[B | 1, H | 1, queries | 1, keys]``, is
    false at hidden pairs, or is added to the scores.

    Raises:
        ConfigError: the inputs differ, the grid does not fit, or the mask does not fit.
    """
    window = TileWindow(grid=tuple(grid), tile=tuple(tile), reach=tuple(reach))
    _check(q, k, v, window, before + after, mask)
    every = seen_pairs(window, before, after, q.device)
    seen = hide_pairs(rows_of_queries(every, q.shape[2], before), mask)
    result = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return allocate(q).copy_(result)


@tile_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    reach: Sequence[int],
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    window = TileWindow(grid=tuple(grid), tile=tuple(tile), reach=tuple(reach))
    _check(q, k, v, window, before + after, mask)
    return allocate(q)


TILE_ATTENTION = torch.ops.ditfastattn.tile_attention.default


def near_tiles(window: TileWindow, device: torch.device | None = None) -> Tensor:
    """Return which tiles the queries of each tile see, int64 ``[tiles, near]``, ascending."""
    axes = zip(window.counts, window.spans, window.reach, strict=True)
    near = torch.zeros((1, 1), dtype=torch.int64, device=device)
    for count, span, reach in axes:
        first = (torch.arange(count, device=device) - reach).clamp(0, count - span)
        own = first[:, None] + torch.arange(span, device=device)  # [count, span]
        near = near[:, None, :, None] * count + own[None, :, None, :]
        near = near.reshape(near.shape[0] * count, -1)
    return near


def tile_order(window: TileWindow, device: torch.device | None = None) -> Tensor:
    """Return the tokens of each tile, int64 ``[tiles, tile tokens]``."""
    tokens = torch.arange(window.tokens, device=device)
    split = [size for pair in zip(window.counts, window.tile, strict=True) for size in pair]
    rank = len(window.grid)
    axes = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return tokens.reshape(split).permute(axes).reshape(math.prod(window.counts), -1)


def seen_tokens(
    window: TileWindow, before: int, after: int, device: torch.device | None = None
) -> Tensor:
    """Return which tokens the queries of each tile see, int64 ``[tiles, seen + text]``."""
    near = tile_order(window, device)[near_tiles(window, device)].flatten(1) + before
    total = before + window.tokens + after
    text = [*range(before), *range(total - after, total)]
    every = torch.tensor(text, dtype=torch.int64, device=device).expand(near.shape[0], -1)
    return torch.cat([near, every], dim=1)


def seen_pairs(
    window: TileWindow, before: int, after: int, device: torch.device | None = None
) -> Tensor:
    """Return which (query, key) pairs are kept, bool ``[tokens, tokens]``, text among them."""
    order, near = tile_order(window, device), near_tiles(window, device)
    total = before + window.tokens + after
    seen = torch.ones((total, total), dtype=torch.bool, device=device)
    image = seen[before : before + window.tokens, before : before + window.tokens]
    image.fill_(False)
    keys = order[near].flatten(1)  # [tiles, seen tokens]
    image[order[:, :, None], keys[:, None, :]] = True
    return seen


def tile_pairs(window: TileWindow, queries: int, keys: int) -> int:
    """Count the pairs kept: those of near tiles, and all with a text token."""
    text = keys - window.tokens
    return window.tokens * (window.seen + text) + (queries - window.tokens) * keys


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: TileWindow, text: int, mask: Tensor | None
) -> None:
    check_alike(q, k, v, text, "tile_attention")
    check_mask(q, k, mask, "tile_attention")
    if k.shape[2] != window.tokens + text:
        raise ConfigError(
            "the key has the wrong number of tokens for the grid",
            where="tile_attention",
            got=f"{k.shape[2]} tokens, {text} of text",
            expected=" x ".join(map(str, window.grid)),
        )


@register_flop_formula(torch.ops.ditfastattn.tile_attention)
def _flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    grid: Sequence[int],
    tile: Sequence[int],
    reach: Sequence[int],
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: torch.Size | None = None,
    **_: Any,
) -> int:
    """Count scores and weighted sum, a multiply and an add each, of the kept pairs alone."""
    batch, heads, head_dim = q[0], q[1], q[3]
    window = TileWindow(grid=tuple(grid), tile=tuple(tile), reach=tuple(reach))
    return 4 * batch * heads * head_dim * tile_pairs(window, q[2], k[2])
