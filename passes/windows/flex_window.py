"""Compute a window with FlexAttention: a block mask skips keys outside, a bias hides masked ones.

The block mask is a constant of the band; a mask is data, and modifies the scores.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch.nn.attention import flex_attention as flex

from ditfastattn.passes.graph.paste_form import Constants, Form, token_major
from ditfastattn.passes.windows.band import Band

FLEX_BLOCK = 128


def flex_form(band: Band, scale: float, masked: bool = False) -> tuple[Form, Constants]:
    """Return the FlexAttention form, and its constants."""
    total = band.tokens + band.text
    stop = band.before + band.tokens
    offset = band.before - band.first_query  # from queries to the tokens that they are

    def in_band(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = query + offset
        near = (token - key).abs() <= band.window
        if not band.text:
            return near
        text = (token < band.before) | (token >= stop) | (key < band.before) | (key >= stop)
        return near | text

    def near(counts: Constants) -> flex.BlockMask:
        parts, part_places, wholes, whole_places = counts
        return flex.BlockMask.from_kv_blocks(
            parts,
            part_places,
            wholes,
            whole_places,
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=in_band,
            seq_lengths=(band.queries, total),
            compute_q_blocks=False,  # only the backward reads them
        )

    def run(q: Tensor, k: Tensor, v: Tensor, *counts: Tensor) -> Tensor:
        return token_major(flex.flex_attention(q, k, v, block_mask=near(counts), scale=scale))

    def run_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *counts: Tensor) -> Tensor:
        # The mask is an explicit input of the score function: without Dynamo no closure is lifted.
        options: Any = flex._apply_kernel_options(q, k, v, False, None)
        blocks = near(counts).as_tuple()
        output, *_ = flex_attention_hop(q, k, v, _masked_score, blocks, scale, options, (mask,), ())
        return token_major(output)

    return run_masked if masked else run, band_blocks(band)


def _masked_score(
    score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, mask: Tensor
) -> Tensor:
    """Apply a mask ``[B | 1, H | 1, queries | 1, keys]``."""
    axes = zip((batch, head, query), mask.shape, strict=False)
    row, place, own = (index * int(size > 1) for index, size in axes)
    found = mask[row, place, own, key]
    return score.masked_fill(~found, -math.inf) if mask.dtype == torch.bool else score + found


@lru_cache(maxsize=4)
def band_blocks(band: Band) -> Constants:
    """Return FlexAttention's key blocks per query block: part and whole ones, counts and indices.

    Found from the blocks' corners: ``create_block_mask`` would look at all pairs.
    """
    side, total = FLEX_BLOCK, band.tokens + band.text
    start = band.before - band.first_query
    with torch.inference_mode(False):
        queries = _Blocks.of(band, start, start + band.queries)
        keys = _Blocks.of(band, 0, total)
        distance = (queries.first[:, None] - keys.first[None, :]).abs()
        near = (distance - side + 1).clamp(min=0) <= band.window
        near = near | queries.has_text[:, None] | keys.has_text[None, :]
        whole = distance + side - 1 <= band.window
        whole = whole | queries.all_text[:, None] | keys.all_text[None, :]
        whole = whole & queries.full[:, None] & keys.full[None, :]
        return *_counted(near & ~whole), *_counted(whole)


class _Blocks(NamedTuple):
    """Describe blocks of tokens: where each begins, what it holds, whether it is full."""

    first: Tensor
    has_text: Tensor
    all_text: Tensor
    full: Tensor

    @classmethod
    def of(cls, band: Band, start: int, end: int) -> _Blocks:
        """Cut the tokens from ``start`` to ``end`` into blocks."""
        stop = band.before + band.tokens
        first = torch.arange(start, end, FLEX_BLOCK, device=band.device)
        last = first + FLEX_BLOCK
        has_text = (first < band.before) | (last.clamp(max=end) > stop)
        return cls(first, has_text, (last <= band.before) | (first >= stop), last <= end)


def _counted(kept: Tensor) -> Constants:
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()
