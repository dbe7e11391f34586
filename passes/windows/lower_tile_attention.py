"""Lower ``ditfastattn::tile_attention`` to full attention from each tile to its near tiles.

Before::

    %3 = ditfastattn.tile_attention.default(%0, %1, %2, [64, 64], [8, 8], [1, 1], 0.18)

After::

    %9 = aten.index_select.default(%8, 1, %near): float32[12, 576, 64, 32]
    %12 = aten.scaled_dot_product_attention.default(%5, %10, %11, ...): float32[12, 64, 64, 32]

Tiles become the second dimension of ``[B * H, tiles, tile tokens, D]``. Every tile sees the same
number of others, so nothing is masked except by the model itself: all that is gathered is used, by
whichever kernel is fastest. Of a mask that depends on the query, a tile takes its own rows and the
columns of what it sees.

If the grid is the sequence itself (one axis), nothing is gathered on a CPU: see ``tile_runs``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn.passes.graph.ir import calls, value
from ditfastattn.passes.graph.paste_form import (
    Constants,
    Form,
    FormPaster,
    has_static_shape,
    is_masked,
    sources,
    token_major,
)
from ditfastattn.passes.windows.forms import window_of
from ditfastattn.passes.windows.masks import bias_of, bias_of_blocks, rows_outside
from ditfastattn.passes.windows.tile_attention import (
    TILE_ATTENTION,
    near_tiles,
    seen_tokens,
    tile_order,
)
from ditfastattn.passes.windows.tile_runs import is_in_runs, runs_form
from ditfastattn.passes.windows.window import TileWindow

_MAX_GATHERED_BYTES = 2**31


def lower_tile_attention(module: GraphModule) -> list[str]:
    """Lower the tile windows of ``module`` in place; return why others stay."""
    paster = FormPaster(module)
    reasons: list[str] = []
    for node in calls(module.graph, TILE_ATTENTION):
        reason = _decline(node)
        if reason:
            reasons.append(f"{node.name}: {reason}")
            continue
        window, scale, text = window_of(node)
        assert isinstance(window, TileWindow)
        query, key = (value(source) for source in sources(node)[:2])
        asks = query.shape[2] == key.shape[2]
        form, constants = tiles_form(
            window, scale, text, query.device, is_masked(node), text_queries=asks
        )
        paster.replace(node, (window, scale, text), form, constants)
    module.recompile()
    return reasons


def _decline(node: Node) -> str:
    if not has_static_shape(node):
        return f"its shape is symbolic: {list(value(node).shape)}"
    window, _, text = window_of(node)
    assert isinstance(window, TileWindow)
    keys = value(sources(node)[1])
    if is_in_runs(window, keys.device):
        return ""
    gathered = 2 * keys.nbytes * math.prod(window.spans)
    if gathered > _MAX_GATHERED_BYTES:
        return f"the keys and values that its tiles see would take {gathered >> 20} MiB"
    if not is_masked(node):
        return ""
    _, heads, rows, _ = value(sources(node)[3]).shape
    pairs = min(rows, window.tokens) * (window.seen + sum(text))
    bias = keys.shape[0] * heads * pairs * keys.dtype.itemsize
    if bias > _MAX_GATHERED_BYTES:
        return f"the bias of its tiles would take {bias >> 20} MiB"
    return ""


def tiles_form(
    window: TileWindow,
    scale: float,
    text: tuple[int, int],
    device: torch.device,
    masked: bool = False,
    *,
    text_queries: bool = True,
) -> tuple[Form, Constants]:
    """Return the form that attends tile by tile, and its constants.

    Without ``text_queries`` the ``text`` tokens are keys alone.
    """
    if is_in_runs(window, device):
        return runs_form(window, scale, text, masked, text_queries), ()
    form, near = _GatheredTiles(window, scale, *text, text_queries), _near(window, device)
    if not masked:
        return form.run, (near,)
    first = text[0] if text_queries else 0
    return form.run_masked, (near, *_pairs(window, text, first, device))


@dataclass(frozen=True)
class _GatheredTiles:
    """Attend from each tile to the keys of its near tiles, gathered; text before and after."""

    window: TileWindow
    scale: float
    before: int
    after: int
    text_queries: bool

    def run(self, q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
        """Attend without a mask."""
        return self._attend(q, k, v, None, None, near)

    def run_masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        near: Tensor,
        queries: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Attend with a mask."""
        return self._attend(q, k, v, mask, bias_of_blocks(mask, queries, seen, q.dtype), near)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        near: Tensor,
    ) -> Tensor:
        before, stop = self.before, self.before + self.window.tokens
        if not self.before + self.after:
            return token_major(self._in_tiles(q, k, v, bias, near))
        own_k, own_v = (item[:, :, before:stop] for item in (k, v))
        rest = [torch.cat([x[:, :, :before], x[:, :, stop:]], dim=2) for x in (k, v)]
        if not self.text_queries:
            return token_major(self._in_tiles(q, own_k, own_v, bias, near, *rest))
        image = self._in_tiles(q[:, :, before:stop], own_k, own_v, bias, near, *rest)
        hidden = None if mask is None else bias_of(rows_outside(mask, before, stop), q.dtype)
        asking = torch.cat([q[:, :, :before], q[:, :, stop:]], dim=2)
        rows = scaled_dot_product_attention(asking, k, v, attn_mask=hidden, scale=self.scale)
        return token_major(torch.cat([rows[:, :, :before], image, rows[:, :, before:]], dim=2))

    def _in_tiles(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, near: Tensor, *text: Tensor
    ) -> Tensor:
        """Attend from each tile; ``text`` holds the keys and values of the text, if any."""
        window = self.window
        batch, heads, _, head_dim = q.shape
        keys, values = (_gathered(window, item, near) for item in (k, v))
        if text:
            keys, values = (
                torch.cat([found, _every_tile(window, item)], dim=2)
                for found, item in zip((keys, values), text, strict=True)
            )
        output = self._attend_tiles(_tiled(window, q), keys, values, bias, batch)
        return _raster(window, output).reshape(batch, heads, window.tokens, head_dim)

    def _attend_tiles(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, batch: int
    ) -> Tensor:
        """Attend among ``[B * H, tiles, n, D]``; ``bias`` is ``[B | 1, H | 1, tiles, n | 1, k]``.

        A bias of each query is as large as the scores: heads that share it must not copy it, so
        they become the second dimension, ``[B * tiles, H, n, D]``.
        """
        if bias is None:
            return scaled_dot_product_attention(q, k, v, scale=self.scale)
        if bias.shape[3] == 1:
            each = bias.expand(batch, q.shape[0] // batch, -1, -1, -1).flatten(0, 1)
            return scaled_dot_product_attention(q, k, v, attn_mask=each, scale=self.scale)
        q, k, v = (_swapped(x, batch) for x in (q, k, v))
        each = bias.transpose(1, 2).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        output = scaled_dot_product_attention(q, k, v, attn_mask=each, scale=self.scale)
        return _swapped(output, batch)


def _swapped(item: Tensor, batch: int) -> Tensor:
    """Turn ``[B * H, tiles, n, D]`` into ``[B * tiles, H, n, D]``, or back."""
    return item.reshape(batch, -1, *item.shape[1:]).transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=8)
def _near(window: TileWindow, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return near_tiles(window, device).flatten()


@lru_cache(maxsize=8)
def _pairs(
    window: TileWindow, text: tuple[int, int], first: int, device: torch.device
) -> Constants:
    """Return the queries of each tile, the grid's from ``first``, and the tokens that it sees."""
    with torch.inference_mode(False):
        return tile_order(window, device) + first, seen_tokens(window, *text, device)


def _tiled(window: TileWindow, item: Tensor) -> Tensor:
    """Turn ``[B, H, N, D]`` in raster order into ``[B * H, tiles, tile tokens, D]``."""
    rank = len(window.grid)
    split = [size for pair in zip(window.counts, window.tile, strict=True) for size in pair]
    apart = item.reshape(-1, *split, item.shape[-1])
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    shape = (math.prod(window.counts), math.prod(window.tile), item.shape[-1])
    return apart.permute(order).reshape(-1, *shape)


def _raster(window: TileWindow, item: Tensor) -> Tensor:
    """Undo ``_tiled``; the heads stay folded into the batch."""
    rank = len(window.grid)
    apart = item.reshape(-1, *window.counts, *window.tile, item.shape[-1])
    pairs = [axis for i in range(1, rank + 1) for axis in (i, rank + i)]
    return apart.permute([0, *pairs, 2 * rank + 1])


def _gathered(window: TileWindow, item: Tensor, near: Tensor) -> Tensor:
    """Return what each tile sees of keys or values, ``[B * H, tiles, seen, D]``."""
    found = _tiled(window, item).index_select(1, near)
    return found.reshape(found.shape[0], math.prod(window.counts), window.seen, item.shape[-1])


def _every_tile(window: TileWindow, text: Tensor) -> Tensor:
    """Repeat the text's keys or values ``[B, H, text, D]`` for each tile."""
    flat = text.reshape(-1, 1, text.shape[2], text.shape[3])
    return flat.expand(-1, math.prod(window.counts), -1, -1)
