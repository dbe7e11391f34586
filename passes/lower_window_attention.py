"""Lower ``ditfastattn::window_attention`` to forms that skip the work outside the band.

Before::

    %3 = ditfastattn.window_attention.default(%0, %1, %2, 128, 0.18): float32[2, 6, 1024, 32]

After, in blocks of queries, each with the keys it can see (``WindowKernel.BLOCKS``)::

    %9 = aten.as_strided.default(...): float32[8, 12, 384, 32]
    %12 = aten.scaled_dot_product_attention.default(%5, %9, %11, %4, ...): float32[8, 12, 128, 32]

or as FlexAttention with a block mask (``WindowKernel.FLEX``)::

    %9 = flex_attention(%0, %1, %2, %7, [1024, 1024, %3, %4, %5, %6, ...], 0.18, ...): tuple
    %10 = getitem(%9, 0): float32[2, 6, 1024, 32]

Each form is a plain function, traced at the node's shapes and pasted over the node. What depends
on the band alone, the bias or the block mask, becomes buffers that all nodes share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad, scaled_dot_product_attention

from ditfastattn.passes.ir import argument, calls, value
from ditfastattn.passes.paste_form import (
    Constants,
    Form,
    FormPaster,
    has_static_shape,
    sources,
    token_major,
)
from ditfastattn.passes.window_attention import WINDOW_ATTENTION


class WindowKernel(StrEnum):
    """Name what computes a window."""

    AUTO = "auto"  # FlexAttention on GPUs, blocks elsewhere
    BLOCKS = "blocks"
    FLEX = "flex"  # on a CPU for tests: Inductor fails there where q or k views a linear's output


FLEX_BLOCK = 128
_FLEX_DEVICES = ("cuda", "xpu")
_FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLEX_MIN_HEAD_DIM = 16
_MAX_BIAS_BYTES = 2**30


@dataclass(frozen=True)
class Band:
    """Hold what the constants of a window depend on.

    ``tokens`` are those of the band; ``before`` and ``after`` it stand the ones that see, and are
    seen by, all.
    """

    tokens: int
    window: int
    dtype: torch.dtype
    device: torch.device
    before: int = 0
    after: int = 0

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


def lower_window_attention(
    module: GraphModule, kernel: WindowKernel = WindowKernel.AUTO
) -> list[str]:
    """Lower the windows of ``module`` in place; return the reason for each that stays."""
    paster = FormPaster(module)
    reasons: list[str] = []
    for node in calls(module.graph, WINDOW_ATTENTION):
        chosen = kernel
        if kernel is WindowKernel.AUTO:
            on_gpu = value(node).device.type in _FLEX_DEVICES
            chosen = WindowKernel.FLEX if on_gpu else WindowKernel.BLOCKS
        reason = _decline(node, chosen)
        if reason:
            reasons.append(f"{node.name}: {reason}")
        else:
            _lower(paster, node, chosen)
    module.recompile()
    return reasons


def _lower(paster: FormPaster, node: Node, kernel: WindowKernel) -> None:
    band = _band(node)
    scale: Any = node.args[4]
    build = _flex_form if kernel is WindowKernel.FLEX else blocks_form
    form, constants = build(band, scale)
    paster.replace(node, (kernel, band, scale), form, constants)


def _band(node: Node) -> Band:
    query = value(sources(node)[0])
    window: Any = node.args[3]
    before, after = argument(node, 5, "before", 0), argument(node, 6, "after", 0)
    return band_of(query.shape[2], window, query.dtype, query.device, before, after)


def band_of(
    tokens: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
    before: int = 0,
    after: int = 0,
) -> Band:
    """Return the band of a window over ``tokens`` in all, text among them."""
    image = tokens - before - after
    return Band(image, min(window, image), dtype, device, before, after)


def _decline(node: Node, kernel: WindowKernel) -> str:
    """Return why ``kernel`` cannot, or need not, compute ``node``; empty if it can."""
    if not has_static_shape(node):
        return f"its shape is symbolic: {list(value(node).shape)}"
    band, head_dim = _band(node), value(node).shape[3]
    flexible = kernel is WindowKernel.FLEX
    block = FLEX_BLOCK if flexible else band.block
    if block + 2 * band.window >= band.tokens:
        return (
            f"a window of {band.window} per side in blocks of {block} leaves none of "
            f"{band.tokens} tokens to skip"
        )
    if flexible and band.dtype not in _FLEX_DTYPES:
        return f"FlexAttention does not take {band.dtype}"
    if flexible and head_dim < _FLEX_MIN_HEAD_DIM:
        return f"FlexAttention needs head_dim >= {_FLEX_MIN_HEAD_DIM}, not {head_dim}"
    if not flexible and band.bias_bytes > _MAX_BIAS_BYTES:
        return f"the bias of its blocks would take {band.bias_bytes >> 20} MiB"
    return ""


def blocks_form(band: Band, scale: float) -> tuple[Form, Constants]:
    """Return the form in blocks of queries, each with the keys it can see, and its constants."""
    rest = band.blocks * band.block - band.tokens

    def queries(q: Tensor) -> Tensor:
        padded = pad(q, (0, 0, 0, rest)) if rest else q
        return padded.reshape(-1, band.blocks, band.block, q.shape[3]).transpose(0, 1)

    def spans(keys: Tensor) -> Tensor:
        padded = pad(keys, (0, 0, band.window, band.window + rest)).contiguous()
        batch, heads, tokens, head_dim = padded.shape
        # Overlapping views: of unfold Inductor makes a copy, several times the size of the keys.
        shape = (band.blocks, batch * heads, band.span, head_dim)
        return padded.as_strided(shape, (band.block * head_dim, tokens * head_dim, head_dim, 1))

    def in_blocks(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        # Blocks come first, [blocks, B * H, block, D]: all heads read a block's bias from cache.
        blocks = scaled_dot_product_attention(queries(q), keys, values, attn_mask=bias, scale=scale)
        merged = blocks.transpose(0, 1).reshape(*q.shape[:2], -1, q.shape[3])
        return merged[:, :, : band.tokens] if rest else merged

    def with_text(near: Tensor, text: Tensor) -> Tensor:
        every = text.reshape(1, -1, band.text, text.shape[3]).expand(band.blocks, -1, -1, -1)
        return torch.cat([near, every], dim=2)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if not band.text:
            return token_major(in_blocks(q, spans(k), spans(v), bias))
        (near_k, text_k), (near_v, text_v) = band.split(k), band.split(v)
        near_q, text_q = band.split(q)
        keys, values = with_text(spans(near_k), text_k), with_text(spans(near_v), text_v)
        image = in_blocks(near_q, keys, values, bias)
        text = scaled_dot_product_attention(text_q, k, v, scale=scale)
        return token_major(band.joined(image, text))

    return run, (band_bias(band),)


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


def _flex_form(band: Band, scale: float) -> tuple[Form, Constants]:
    total = band.tokens + band.text
    stop = band.before + band.tokens

    def in_band(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query - key).abs() <= band.window
        if not band.text:
            return near
        text = (query < band.before) | (query >= stop) | (key < band.before) | (key >= stop)
        return near | text

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part_counts: Tensor,
        part_indices: Tensor,
        whole_counts: Tensor,
        whole_indices: Tensor,
    ) -> Tensor:
        mask = flex.BlockMask.from_kv_blocks(
            part_counts,
            part_indices,
            whole_counts,
            whole_indices,
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=in_band,
            seq_lengths=(total, total),
            compute_q_blocks=False,  # only the backward reads them
        )
        return token_major(flex.flex_attention(q, k, v, block_mask=mask, scale=scale))

    return run, band_blocks(band)


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
        some = (first < band.before) | ((first + side).clamp(max=total) > stop)  # of it is text
        only = (first + side <= band.before) | (first >= stop)
        whole = distance + side - 1 <= band.window
        whole = (whole | only[:, None] | only[None, :]) & inner[:, None] & inner[None, :]
        near = near | some[:, None] | some[None, :]
        return *_counted(near & ~whole), *_counted(whole)


def _counted(kept: Tensor) -> Constants:
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()
