"""Compute a window with FlexAttention: a block mask skips keys outside, a bias hides masked ones.

The block mask is a constant of the band; a mask is data, and modifies the scores.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

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

    def in_band(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query - key).abs() <= band.window
        if not band.text:
            return near
        text = (query < band.before) | (query >= stop) | (key < band.before) | (key >= stop)
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
            seq_lengths=(total, total),
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
    """Apply a mask ``[B | 1, H | 1, N | 1, N]``."""
    axes = zip((batch, head, query), mask.shape, strict=False)
    row, place, own = (index * int(size > 1) for index, size in axes)
    found = mask[row, place, own, key]
    return score.masked_fill(~found, -math.inf) if mask.dtype == torch.bool else score + found


@lru_cache(maxsize=4)
def band_blocks(band: Band) -> Constants:
    """Return FlexAttention's key blocks per query block: part and whole ones, counts and indices.

    Found from the blocks' corners: ``create_block_mask`` would look at all ``[N, N]`` pairs.
    """
    side, total = FLEX_BLOCK, band.tokens + band.text
    stop = band.before + band.tokens
    with torch.inference_mode(False):
        first = torch.arange(0, total, side, device=band.device)
        distance = (first[:, None] - first[None, :]).abs()
        near = (distance - side + 1).clamp(min=0) <= band.window
        inner = first + side <= total
        has_text = (first < band.before) | ((first + side).clamp(max=total) > stop)
        all_text = (first + side <= band.before) | (first >= stop)
        whole = distance + side - 1 <= band.window
        whole = (whole | all_text[:, None] | all_text[None, :]) & inner[:, None] & inner[None, :]
        near = near | has_text[:, None] | has_text[None, :]
        return *_counted(near & ~whole), *_counted(whole)


def _counted(kept: Tensor) -> Constants:
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()
