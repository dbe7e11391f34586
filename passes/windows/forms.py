"""Choose windows, bands of the sequence or tiles of a token grid, and read them off a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch.fx import Node

from ditfastattn.passes.graph.ir import argument, value
from ditfastattn.passes.windows.tile_attention import TILE_ATTENTION, tile_pairs
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.passes.windows.window_attention import WINDOW_ATTENTION, kept_pairs

WINDOWED = (WINDOW_ATTENTION, TILE_ATTENTION)
_BAND_FRACTION = 8  # the paper's window: N/8 tokens on each side
_TILES = 6  # along an axis, of which 3 are seen: a quarter of an image, as in the paper's window
_FEWEST_TILES = 4  # of which 3 are seen
_TILES_PER_SIDE = 2  # of the sequence, for the paper's window: the fastest measured


def band(tokens: int) -> int:
    """Return the paper's window over ``tokens``, per side."""
    return max(1, tokens // _BAND_FRACTION)


def window_forms(tokens: int, grid: Sequence[int]) -> tuple[Window, ...]:
    """Return the windows over ``tokens``: a band, tiles of the grid, tiles of the sequence.

    ``grid`` is () where none is known.
    """
    forms = [band(tokens), tiles(grid)]
    if len(grid) != 1:  # one axis (frames): the grid is the sequence
        forms.append(sequence_tiles(tokens))
    return tuple(form for form in forms if form is not None)


def tiles(grid: Sequence[int]) -> TileWindow | None:
    """Return a window of three tiles along each axis, or None where no axis divides into four.

    Of the sizes that divide an axis, a tile has the one nearest to a sixth of it. An axis without
    such a size, for example of a few frames, is seen whole.
    """
    sides = [_tile(size) for size in grid]
    if list(grid) == sides:
        return None
    return TileWindow(grid=tuple(grid), tile=tuple(sides), reach=(1,) * len(sides))


@cache
def sequence_tiles(tokens: int) -> TileWindow | None:
    """Return a window of tiles of the flattened sequence that covers the paper's band, or None.

    It sees slightly more than the band, takes as many products as the band's blocks, and needs no
    bias. There is none where no tile size near half of a side divides ``tokens``.
    """
    side = band(tokens)
    wanted = side / _TILES_PER_SIDE
    tile = _divisor(tokens, wanted)
    if not wanted / 2 <= tile <= 2 * wanted:
        return None
    return TileWindow(grid=(tokens,), tile=(tile,), reach=(math.ceil(side / tile),))


def _divisor(size: int, near: float) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - near))


def _tile(size: int) -> int:
    fitting = [tile for tile in range(1, size // _FEWEST_TILES + 1) if size % tile == 0]
    return min(fitting, key=lambda tile: abs(tile - size / _TILES), default=size)


def window_call(
    window: Window, scale: float, text: tuple[int, int], mask: Any = None
) -> tuple[Any, tuple[Any, ...]]:
    """Return the operator of ``window``, and its arguments after query, key and value."""
    outside: tuple[Any, ...] = text if any(text) else ()
    if mask is not None:
        outside = (*text, mask)
    if isinstance(window, TileWindow):
        sizes = (list(window.grid), list(window.tile), list(window.reach))
        return TILE_ATTENTION, (*sizes, scale, *outside)
    return WINDOW_ATTENTION, (window, scale, *outside)


def window_of(node: Node) -> tuple[Window, float, tuple[int, int]]:
    """Return the window, scale and text that ``window_call`` was given for ``node``."""
    tiled = node.target is TILE_ATTENTION
    place = 6 if tiled else 4
    window: Any = node.args[3]
    if tiled:
        grid, tile, reach = (tuple(sizes) for sizes in node.args[3:6])  # type: ignore[arg-type]
        window = TileWindow(grid=grid, tile=tile, reach=reach)
    scale: Any = argument(node, place, "scale")
    before, after = argument(node, place + 1, "before", 0), argument(node, place + 2, "after", 0)
    return window, scale, (before, after)


def pairs_of(node: Node) -> int:
    """Count the pairs of query and key that a windowed attention keeps, per head."""
    window, _, text = window_of(node)
    queries, keys = value(node).shape[2], value(node.args[1]).shape[2]
    if isinstance(window, TileWindow):
        return tile_pairs(window, queries, keys)
    return kept_pairs(queries, keys, window, sum(text))


def fraction(window: Window, tokens: int) -> float:
    """Return the fraction of all pairs that a window over ``tokens``, without text, keeps."""
    if isinstance(window, TileWindow):
        return window.seen / math.prod(window.grid)
    return kept_pairs(tokens, tokens, window) / tokens**2
