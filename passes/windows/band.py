"""Describe the band of a window: blocks of queries, the keys they see, the bias for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Hold what the constants of a window depend on.

    ``tokens`` counts those of the band. The text tokens ``before`` and ``after`` it attend, and are
    attended by, all; without ``text_queries`` they are keys alone.
    """

    tokens: int
    window: int
    dtype: torch.dtype
    device: torch.device
    before: int = 0
    after: int = 0
    text_queries: bool = True

    @property
    def queries(self) -> int:
        """Return how many queries there are, the text's among them."""
        return self.tokens + (self.text if self.text_queries else 0)

    @property
    def first_query(self) -> int:
        """Return which query is the band's first."""
        return self.before if self.text_queries else 0

    @property
    def text(self) -> int:
        """Return how many tokens stand outside the band."""
        return self.before + self.after

    def split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of the band, and the others, of ``[B, H, N, D]``."""
        stop = self.before + self.tokens
        outside = torch.cat([tensor[:, :, : self.before], tensor[:, :, stop:]], dim=2)
        return tensor[:, :, self.before : stop], outside

    def joined(self, band: Tensor, outside: Tensor) -> Tensor:
        """Undo ``split``."""
        first, last = outside[:, :, : self.before], outside[:, :, self.before :]
        return torch.cat([first, band, last], dim=2)

    @property
    def block(self) -> int:
        """Return how many queries share their keys: the fastest measured, about the window."""
        return min(256, max(32, 1 << (max(1, self.window) - 1).bit_length()))

    @property
    def blocks(self) -> int:
        """Return how many blocks cover the queries, the last one in part."""
        return math.ceil(self.tokens / self.block)

    @property
    def span(self) -> int:
        """Return how many keys of the band the queries of one block see together."""
        return self.block + 2 * self.window

    @property
    def bias_bytes(self) -> int:
        """Return the size of what ``band_bias`` builds."""
        return self.blocks * self.block * (self.span + self.text) * self.dtype.itemsize


def band_of(
    tokens: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
    before: int = 0,
    after: int = 0,
    *,
    text_queries: bool = True,
) -> Band:
    """Return the band of a window over ``tokens`` keys in all, text among them."""
    image = tokens - before - after
    return Band(image, min(window, image), dtype, device, before, after, text_queries)


def block_tokens(band: Band) -> Tensor:
    """Return the queries of each block, int64 ``[blocks, block]``; the last one fills the rest."""
    token = torch.arange(band.blocks * band.block, device=band.device)
    return token.clamp(max=band.tokens - 1).reshape(band.blocks, band.block) + band.first_query


def seen_tokens(band: Band) -> Tensor:
    """Return which tokens the queries of each block see, int64 ``[blocks, span + text]``.

    Positions past an end of the band repeat the token at that end; the bias hides them.
    """
    start = torch.arange(band.blocks, device=band.device)[:, None] * band.block
    near = start + torch.arange(band.span, device=band.device) - band.window
    total = band.tokens + band.text
    text = [*range(band.before), *range(total - band.after, total)]
    every = torch.tensor(text, dtype=torch.int64, device=band.device).expand(band.blocks, -1)
    return torch.cat([near.clamp(0, band.tokens - 1) + band.before, every], dim=1)


@lru_cache(maxsize=4)  # step variants are lowered one by one, and share what they can
def band_bias(band: Band) -> Tensor:
    """Return the bias of each block, 0 inside the band, ``[blocks, 1, block, span + text]``.

    Queries past the last token see everything: without a key their softmax would be NaN.
    """
    with torch.inference_mode(False):
        start = torch.arange(band.blocks, device=band.device)[:, None, None] * band.block
        query = start + torch.arange(band.block, device=band.device)[:, None]
        key = start + torch.arange(band.span, device=band.device) - band.window
        seen = ((query - key).abs() <= band.window) & (key >= 0) & (key < band.tokens)
        seen = seen | (query >= band.tokens)
        text = torch.ones((*seen.shape[:2], band.text), dtype=torch.bool, device=band.device)
        seen = torch.cat([seen, text], dim=-1)
        bias = torch.zeros(seen.shape, dtype=band.dtype, device=band.device)
        return bias.masked_fill(~seen, -math.inf)[:, None]
