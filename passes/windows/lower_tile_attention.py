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

If the grid is the sequence itself (one axis), a tile sees one run of tokens. On a CPU nothing is
gathered then: each tile attends a slice of the keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

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
from ditfastattn.passes.windows.masks import bias_of, bias_of_blocks, rows_of, rows_outside
from ditfastattn.passes.windows.tile_attention import (
    TILE_ATTENTION,
    near_tiles,
    seen_tokens,
    tile_order,
)
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
        form, constants = tiles_form(window, scale, text, value(node).device, is_masked(node))
        paster.replace(node, (window, scale, text), form, constants)
    module.recompile()
    return reasons


def _decline(node: Node) -> str:
    if not has_static_shape(node):
        return f"its shape is symbolic: {list(value(node).shape)}"
    window, _, text = window_of(node)
    assert isinstance(window, TileWindow)
    keys = value(sources(node)[1])
    if _is_in_runs(window, keys.device):
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
) -> tuple[Form, Constants]:
    """Return the form that attends tile by tile, and its constants."""
    if _is_in_runs(window, device):
        return _runs_form(window, scale, text, masked), ()
    form, near = _GatheredTiles(window, scale, *text), _near(window, device)
    if not masked:
        return form.run, (near,)
    return form.run_masked, (near, *_pairs(window, text, device))


@dataclass(frozen=True)
class _GatheredTiles:
    """Attend from each tile to the keys of its near tiles, gathered; text before and after."""

    window: TileWindow
    scale: float
    before: int
    after: int

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
        own_q, own_k, own_v = (item[:, :, before:stop] for item in (q, k, v))
        rest = [torch.cat([x[:, :, :before], x[:, :, stop:]], dim=2) for x in (q, k, v)]
        image = self._in_tiles(own_q, own_k, own_v, bias, near, *rest[1:])
        hidden = None if mask is None else bias_of(rows_outside(mask, before, stop), q.dtype)
        rows = scaled_dot_product_attention(rest[0], k, v, attn_mask=hidden, scale=self.scale)
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


def _is_in_runs(window: TileWindow, device: torch.device) -> bool:
    """Return whether tiles attend slices of the keys; on a GPU each would be too little work."""
    return len(window.grid) == 1 and device.type == "cpu"


def _runs_form(window: TileWindow, scale: float, text: tuple[int, int], masked: bool) -> Form:
    """Return the form for tiles of the sequence, each of which sees one run of it."""
    before, after = text
    stop = before + window.tokens
    runs = _runs(window)  # not while the form is traced

    def seen(item: Tensor, dim: int, first: int, last: int) -> Tensor:
        """Return the tokens from ``first`` to ``last``, and the text."""
        if last - first == window.tokens:
            return item
        parts = [(0, before), (before + first, before + last), (stop, stop + after)]
        found = [item.narrow(dim, start, end - start) for start, end in parts if end > start]
        return torch.cat(found, dim=dim) if len(found) > 1 else found[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def queries(start: int, end: int, first: int, last: int) -> Tensor:
            keys, values = seen(k, 2, first, last), seen(v, 2, first, last)
            bias = None
            if mask is not None:
                bias = bias_of(seen(rows_of(mask, start, end), 3, first, last), q.dtype)
            rows = q.narrow(2, start, end - start)
            return scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)

        everything = 0, window.tokens
        parts = [queries(0, before, *everything)] if before else []
        for start, end, first, last in runs:
            parts.append(queries(before + start, before + end, first, last))
        parts += [queries(stop, stop + after, *everything)] if after else []
        return token_major(torch.cat(parts, dim=2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, None)

    def run_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, v, mask)

    return run_masked if masked else run


@lru_cache(maxsize=8)
def _runs(window: TileWindow) -> list[tuple[int, int, int, int]]:
    """Return the runs of queries of a sequence (from, to), and the run of keys that each sees.

    Tiles at an end of the sequence see the same keys, and are one run.
    """
    (tile,), (span,), (count,) = window.tile, window.spans, window.counts
    firsts = near_tiles(window)[:, 0].tolist()
    found: list[tuple[int, int, int, int]] = []
    for first, alike in groupby(range(count), key=firsts.__getitem__):
        places = list(alike)
        queries = places[0] * tile, (places[-1] + 1) * tile
        found.append((*queries, first * tile, (first + span) * tile))
    return found


@lru_cache(maxsize=8)
def _near(window: TileWindow, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return near_tiles(window, device).flatten()


@lru_cache(maxsize=8)
def _pairs(window: TileWindow, text: tuple[int, int], device: torch.device) -> Constants:
    """Return the tokens of each tile, and those that it sees."""
    with torch.inference_mode(False):
        return tile_order(window, device) + text[0], seen_tokens(window, *text, device)


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
