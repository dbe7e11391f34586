"""Attend within tiles of the sequence itself: each tile sees one run of tokens.

On a CPU nothing is gathered then: each tile attends a slice of the keys.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn.passes.graph.paste_form import Form, token_major
from ditfastattn.passes.windows.masks import bias_of, rows_of
from ditfastattn.passes.windows.tile_attention import near_tiles
from ditfastattn.passes.windows.window import TileWindow


def is_in_runs(window: TileWindow, device: torch.device) -> bool:
    """Return whether tiles attend slices of the keys; on a GPU each would be too little work."""
    return len(window.grid) == 1 and device.type == "cpu"


def runs_form(
    window: TileWindow, scale: float, text: tuple[int, int], masked: bool, text_queries: bool
) -> Form:
    """Return the form for tiles of the sequence, each of which sees one run of it."""
    before, after = text
    stop = before + window.tokens
    asking = text if text_queries else (0, 0)
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
        ahead, behind = asking
        parts = [queries(0, ahead, *everything)] if ahead else []
        for start, end, first, last in runs:
            parts.append(queries(ahead + start, ahead + end, first, last))
        parts += [queries(stop, stop + behind, *everything)] if behind else []
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
