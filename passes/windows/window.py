"""Describe a window: a band of the flattened sequence, or tiles of a token grid."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from ditfastattn.core.records import Record


class TileWindow(Record, frozen=True):
    """Describe a window by tiles of a token grid, ``(h, w)`` or ``(t, h, w)``.

    Per axis, ``tile`` counts tokens, and ``reach`` the tiles seen on each side of a query's own. At
    an edge the window moves inward, so that each tile sees the same number of others.
    """

    grid: tuple[Annotated[int, Field(gt=0)], ...]
    tile: tuple[Annotated[int, Field(gt=0)], ...]
    reach: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _check(self) -> TileWindow:
        if not len(self.grid) == len(self.tile) == len(self.reach) > 0:
            raise ValueError("grid, tile and reach: one number each per axis")
        for size, tile in zip(self.grid, self.tile, strict=True):
            if size % tile:
                raise ValueError(f"tile: {tile} does not divide {size} tokens")
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of tiles along each axis."""
        return tuple(size // tile for size, tile in zip(self.grid, self.tile, strict=True))

    @property
    def spans(self) -> tuple[int, ...]:
        """Return how many tiles are seen along each axis."""
        pairs = zip(self.counts, self.reach, strict=True)
        return tuple(min(count, 2 * reach + 1) for count, reach in pairs)

    @property
    def tokens(self) -> int:
        """Return the tokens of the grid."""
        return math.prod(self.grid)

    @property
    def seen(self) -> int:
        """Return how many tokens each query sees."""
        return math.prod(self.spans) * math.prod(self.tile)

    def __str__(self) -> str:
        """Return a short description: ``3x3 of 8x8 tiles``."""
        spans, counts = ("x".join(map(str, sizes)) for sizes in (self.spans, self.counts))
        return f"{spans} of {counts} tiles"


Window = Annotated[int, Field(ge=0)] | TileWindow
