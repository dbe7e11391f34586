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
on the band alone, the bias or the block mask, becomes buffers that all nodes share. A mask is added
to the bias of each block, its queries' rows and its keys' columns alone, or in FlexAttention to the
scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import pad, scaled_dot_product_attention

from ditfastattn.passes.graph.ir import argument, calls, value
from ditfastattn.passes.graph.paste_form import (
    Constants,
    Form,
    FormPaster,
    has_static_shape,
    is_masked,
    sources,
    token_major,
)
from ditfastattn.passes.windows.band import Band, band_bias, band_of, block_tokens, seen_tokens
from ditfastattn.passes.windows.flex_window import FLEX_BLOCK, flex_form
from ditfastattn.passes.windows.masks import bias_of, bias_of_blocks, rows_outside
from ditfastattn.passes.windows.window_attention import WINDOW_ATTENTION


class WindowKernel(StrEnum):
    """Name what computes a window."""

    AUTO = "auto"  # FlexAttention on GPUs, blocks elsewhere
    BLOCKS = "blocks"
    FLEX = "flex"  # on a CPU for tests: Inductor fails there where q or k views a linear's output


_FLEX_DEVICES = ("cuda", "xpu")
_FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLEX_MIN_HEAD_DIM = 16
_MAX_BIAS_BYTES = 2**30


def lower_window_attention(
    module: GraphModule, kernel: WindowKernel = WindowKernel.AUTO
) -> list[str]:
    """Lower the windows of ``module`` in place; return why others stay."""
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
    build = flex_form if kernel is WindowKernel.FLEX else blocks_form
    form, constants = build(band, scale, is_masked(node))
    paster.replace(node, (kernel, band, scale), form, constants)


def _band(node: Node) -> Band:
    query, key = (value(source) for source in sources(node)[:2])
    window: Any = node.args[3]
    before, after = argument(node, 5, "before", 0), argument(node, 6, "after", 0)
    asks = query.shape[2] == key.shape[2]
    tokens, dtype, device = key.shape[2], query.dtype, query.device
    return band_of(tokens, window, dtype, device, before, after, text_queries=asks)


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
    taken = band.bias_bytes
    if is_masked(node):  # a bias for each row of the batch
        taken *= value(node).shape[0] * value(sources(node)[3]).shape[1]
    if not flexible and taken > _MAX_BIAS_BYTES:
        return f"the bias of its blocks would take {taken >> 20} MiB"
    return ""


def blocks_form(band: Band, scale: float, masked: bool = False) -> tuple[Form, Constants]:
    """Return the form in blocks of queries, each with the keys it can see, and its constants."""
    form, bias = _Blocks(band, scale), band_bias(band)
    return (form.run_masked, (bias, *_pairs(band))) if masked else (form.run, (bias,))


@dataclass(frozen=True)
class _Blocks:
    """Attend in blocks of queries, each with the keys it can see.

    Blocks come first, ``[blocks, B * H, block, D]``, so that all heads read a block's bias from
    cache. With a mask the bias differs along the batch too: ``[blocks * B, H, block, D]``.
    """

    band: Band
    scale: float

    def run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attend without a mask."""
        return self._attend(q, k, v, None, bias)

    def run_masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        bias: Tensor,
        queries: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Attend with a mask."""
        hidden = bias_of_blocks(mask, queries, seen, q.dtype)
        return self._attend(q, k, v, mask, self._with_mask(bias, hidden, q.shape[0]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
        band, masked = self.band, mask is not None
        if not band.text:
            return token_major(self._in_blocks(q, self._spans(k), self._spans(v), bias, masked))
        (near_k, text_k), (near_v, text_v) = band.split(k), band.split(v)
        keys = self._with_text(self._spans(near_k), text_k)
        values = self._with_text(self._spans(near_v), text_v)
        if not band.text_queries:
            return token_major(self._in_blocks(q, keys, values, bias, masked))
        near_q, text_q = band.split(q)
        image = self._in_blocks(near_q, keys, values, bias, masked)
        hidden = None
        if mask is not None:
            hidden = bias_of(rows_outside(mask, band.before, band.before + band.tokens), q.dtype)
        text = scaled_dot_product_attention(text_q, k, v, attn_mask=hidden, scale=self.scale)
        return token_major(band.joined(image, text))

    def _in_blocks(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, masked: bool
    ) -> Tensor:
        own = self._queries(q)
        if masked:
            own, keys, values = (
                item.reshape(-1, q.shape[1], *item.shape[2:]) for item in (own, keys, values)
            )
        blocks = scaled_dot_product_attention(own, keys, values, attn_mask=bias, scale=self.scale)
        apart = blocks.reshape(self.band.blocks, -1, *blocks.shape[2:])
        merged = apart.transpose(0, 1).reshape(*q.shape[:2], -1, q.shape[3])
        return merged[:, :, : self.band.tokens] if self._padding else merged

    @property
    def _padding(self) -> int:
        """Return how many queries the last block lacks."""
        return self.band.blocks * self.band.block - self.band.tokens

    def _queries(self, q: Tensor) -> Tensor:
        """Return the queries of each block, ``[blocks, B * H, block, D]``."""
        padded = pad(q, (0, 0, 0, self._padding)) if self._padding else q
        split = padded.reshape(-1, self.band.blocks, self.band.block, q.shape[3])
        return split.transpose(0, 1)

    def _spans(self, keys: Tensor) -> Tensor:
        """Return the keys, or values, that each block sees, ``[blocks, B * H, span, D]``."""
        band = self.band
        padded = pad(keys, (0, 0, band.window, band.window + self._padding)).contiguous()
        batch, heads, tokens, head_dim = padded.shape
        # Overlapping views: Inductor copies the result of unfold, several times the keys' size.
        shape = (band.blocks, batch * heads, band.span, head_dim)
        return padded.as_strided(shape, (band.block * head_dim, tokens * head_dim, head_dim, 1))

    def _with_mask(self, bias: Tensor, hidden: Tensor, batch: int) -> Tensor:
        """Return the bias of each block and row of the batch, [blocks * B, H | 1, block, keys]."""
        each = hidden.permute(2, 0, 1, 3, 4).expand(-1, batch, -1, -1, -1)
        return (each + bias[:, None]).flatten(0, 1)

    def _with_text(self, near: Tensor, text: Tensor) -> Tensor:
        """Append the text's keys, or values, to those of each block."""
        flat = text.reshape(1, -1, self.band.text, text.shape[3])
        return torch.cat([near, flat.expand(self.band.blocks, -1, -1, -1)], dim=2)


@lru_cache(maxsize=4)
def _pairs(band: Band) -> Constants:
    with torch.inference_mode(False):
        return block_tokens(band), seen_tokens(band)
