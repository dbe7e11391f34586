"""Write attention within a window in ONNX: MatMul-Softmax-MatMul over blocks, or tiles, of queries.

The keys that each sees are gathered by a constant index, so that the work outside is skipped. What
a mask adds to their scores is gathered likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, axis_of
from ditfastattn.export.operators.products import additive, attend, mask_bias, or_zero
from ditfastattn.export.operators.shapes import transpose
from ditfastattn.passes.windows.band import Band, band_of, block_tokens, seen_tokens
from ditfastattn.passes.windows.tile_attention import TILE_ATTENTION, near_tiles, tile_order
from ditfastattn.passes.windows.tile_attention import seen_tokens as tokens_seen_by_tiles
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.passes.windows.window_attention import (
    WINDOW_ATTENTION,
    rows_of_queries,
    seen_pairs,
)

Three = tuple[str, str, str]  # names of query, key and value


@dataclass(frozen=True)
class _Mask:
    """What a mask adds to the scores, ``[B, H, N | 1, N]``; "" without one."""

    bias: str
    by_query: bool


def _text_queries(call: Call) -> bool:
    """Return whether text tokens are queries, and not keys alone."""
    return bool(call.first.shape[2] == call.args[1].shape[2])


def _window_attention(emitter: Emitter, call: Call) -> str:
    tokens = call.args[1].shape[2]
    assert isinstance(tokens, int)
    window, scale = call.args[3:5]
    before, after = call.get(5, "before", 0), call.get(6, "after", 0)
    asks, device = _text_queries(call), torch.device("cpu")
    band = band_of(tokens, window, call.dtype, device, before, after, text_queries=asks)
    query, key, value_ = (emitter.use(item) for item in call.args[:3])
    mask = _mask(emitter, call, call.get(7, "mask"))
    if band.span >= band.tokens:
        every = seen_pairs(tokens, band.window, before, after)
        seen = rows_of_queries(every, band.queries, before)
        biases = [emitter.constant(additive(seen, call.dtype)), *([mask.bias] if mask.bias else [])]
        attended = attend(emitter, call, (query, key, value_), scale, biases)
        return or_zero(emitter, call, attended, biases) if mask.bias else attended

    def in_blocks(tensors: Three, text: tuple[str, str]) -> str:
        return _in_blocks(emitter, call, band, scale, tensors, text, mask)

    text = before, after
    tensors = (query, key, value_)
    return _beside_text(emitter, call, tensors, scale, band.tokens, text, mask, in_blocks)


def _tile_attention(emitter: Emitter, call: Call) -> str:
    """Attend tile by tile: ``[B, H, tiles, tile tokens, D]``, each with the tiles it sees.

    Meanwhile batch and heads are one: TensorRT has eight dimensions, and three axes take six.
    """
    grid, tile, reach = (tuple(sizes) for sizes in call.args[3:6])
    window, scale = TileWindow(grid=grid, tile=tile, reach=reach), call.args[6]
    query, key, value_ = (emitter.use(item) for item in call.args[:3])
    text = call.get(7, "before", 0), call.get(8, "after", 0)
    mask = _mask(emitter, call, call.get(9, "mask"))
    own = tile_order(window) + (text[0] if _text_queries(call) else 0)
    biases = _bias_of_blocks(emitter, mask, own, tokens_seen_by_tiles(window, *text))

    def in_tiles(tensors: Three, text: tuple[str, str]) -> str:
        return _in_tiles(emitter, call, window, scale, tensors, text, biases)

    tensors = (query, key, value_)
    return _beside_text(emitter, call, tensors, scale, window.tokens, text, mask, in_tiles)


def _mask(emitter: Emitter, call: Call, mask: Value | None) -> _Mask:
    return _Mask(mask_bias(emitter, mask, call), mask is not None and mask.shape[2] != 1)


def _bias_of_blocks(
    emitter: Emitter, mask: _Mask, queries: torch.Tensor, keys: torch.Tensor
) -> list[str]:
    """Return what ``mask`` adds to the scores of blocks, ``[B, H, blocks, n | 1, k]``; or nothing.

    ``queries``, ``[blocks, n]``, holds the tokens of each block, and ``keys``, ``[blocks, k]``,
    those that it sees.
    """
    if not mask.bias:
        return []
    if not mask.by_query:
        flat = emitter.op("Squeeze", mask.bias, emitter.ints([2]))
        found = emitter.op("Gather", flat, emitter.constant(keys), axis=2)
        return [emitter.op("Unsqueeze", found, emitter.ints([3]))]
    rows = emitter.op("Gather", mask.bias, emitter.constant(queries), axis=2)
    columns = transpose(emitter, rows, [2, 4, 0, 1, 3])  # [blocks, N, B, H, n]
    index = emitter.constant(keys[:, :, None])
    found = emitter.op("GatherND", columns, index, batch_dims=1)  # [blocks, k, B, H, n]
    return [transpose(emitter, found, [2, 3, 0, 4, 1])]


def _in_tiles(
    emitter: Emitter,
    call: Call,
    window: TileWindow,
    scale: float,
    tensors: Three,
    text: tuple[str, str],
    biases: list[str],
) -> str:
    heads, head_dim = call.first.shape[1], call.first.shape[3]
    assert isinstance(heads, int)
    assert isinstance(head_dim, int)
    rank, count = len(window.grid), math.prod(window.counts)
    split = [size for pair in zip(window.counts, window.tile, strict=True) for size in pair]
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    shape = [-1, heads, count, math.prod(window.tile), head_dim]

    def tiled(name: str) -> str:
        apart = emitter.op("Reshape", name, emitter.ints([-1, *split, head_dim]))
        return emitter.op("Reshape", transpose(emitter, apart, order), emitter.ints(shape))

    near = emitter.constant(near_tiles(window).flatten())

    def gathered(name: str, other: str) -> str:
        found = emitter.op("Gather", tiled(name), near, axis=2)
        seen = emitter.op("Reshape", found, emitter.ints([0, 0, count, window.seen, head_dim]))
        return _with_text(emitter, seen, other, count, head_dim) if other else seen

    query, key, value_ = tensors
    seen = tiled(query), gathered(key, text[0]), gathered(value_, text[1])
    attended = attend(emitter, call, seen, scale, biases, rank=5)
    if biases:
        attended = or_zero(emitter, call, attended, biases)
    sizes = emitter.ints([-1, *window.counts, *window.tile, head_dim])
    apart = emitter.op("Reshape", attended, sizes)
    pairs = [axis for i in range(1, rank + 1) for axis in (i, rank + i)]
    raster = transpose(emitter, apart, [0, *pairs, 2 * rank + 1])
    return emitter.op("Reshape", raster, emitter.ints([-1, heads, window.tokens, head_dim]))


def _beside_text(
    emitter: Emitter,
    call: Call,
    tensors: Three,
    scale: float,
    tokens: int,
    text: tuple[int, int],
    mask: _Mask,
    image: Callable[[Three, tuple[str, str]], str],
) -> str:
    """Attend among the image's ``tokens`` by ``image``, and from the ``text`` around them to all.

    Where the text's tokens are keys alone, that is the image's attention.

    ``mask`` is added to the scores of the text's queries.
    """
    if not any(text):
        return image(tensors, ("", ""))
    before, after = text
    query, *keyed = tensors
    (key, value_), others = zip(
        *(_split_text(emitter, item, tokens, text) for item in keyed), strict=True
    )
    if not _text_queries(call):
        return image((query, key, value_), others)
    own, text_q = _split_text(emitter, query, tokens, text)
    middle = image((own, key, value_), others)
    hidden = _split_text(emitter, mask.bias, tokens, text)[1] if mask.by_query else mask.bias
    biases = [hidden] if hidden else []
    rows = attend(emitter, call, (text_q, *tensors[1:]), scale, biases)
    rows = or_zero(emitter, call, rows, biases) if biases else rows
    parts = [_tokens(emitter, rows, 0, before)] if before else []
    parts += [middle, *([_tokens(emitter, rows, before, None)] if after else [])]
    return emitter.op("Concat", *parts, axis=2, name=call.name)


def _split_text(emitter: Emitter, name: str, tokens: int, text: tuple[int, int]) -> tuple[str, str]:
    """Split ``[B, H, N, D]`` into the image's tokens and those around them."""
    before, after = text
    stop = before + tokens
    outside = [_tokens(emitter, name, 0, before)] if before else []
    outside += [_tokens(emitter, name, stop, None)] if after else []
    around = emitter.op("Concat", *outside, axis=2) if len(outside) > 1 else outside[0]
    return _tokens(emitter, name, before, stop), around


def _tokens(emitter: Emitter, name: str, start: int, stop: int | None) -> str:
    end = 2**31 - 1 if stop is None else stop
    return emitter.op("Slice", name, *(emitter.ints([number]) for number in (start, end, 2, 1)))


def _in_blocks(
    emitter: Emitter,
    call: Call,
    band: Band,
    scale: float,
    tensors: Three,
    text: tuple[str, str],
    mask: _Mask,
) -> str:
    """Attend within the band, and to the keys and values ``text`` of tokens outside it."""
    rest = band.blocks * band.block - band.tokens
    head_dim = call.first.shape[3]
    assert isinstance(head_dim, int)
    query, key, value_ = tensors
    if rest:
        query = emitter.op("Pad", query, emitter.ints([0, 0, 0, 0, 0, 0, rest, 0]))
    query = emitter.op("Reshape", query, emitter.ints([0, 0, band.blocks, band.block, head_dim]))
    start = torch.arange(band.blocks)[:, None] * band.block
    place = start + torch.arange(band.span) - band.window  # [blocks, span], of each block's keys
    index = emitter.constant(place.clamp(0, band.tokens - 1))
    keys, values = (emitter.op("Gather", item, index, axis=2) for item in (key, value_))
    if band.text:
        keys, values = (
            _with_text(emitter, item, other, band.blocks, head_dim)
            for item, other in ((keys, text[0]), (values, text[1]))
        )
    biases = _band_biases(emitter, band, place, call.dtype)
    biases += _bias_of_blocks(emitter, mask, block_tokens(band), seen_tokens(band))
    attended = attend(emitter, call, (query, keys, values), scale, biases, rank=5)
    if mask.bias:
        attended = or_zero(emitter, call, attended, biases)
    merged = emitter.op("Reshape", attended, emitter.ints([0, 0, -1, head_dim]))
    if not rest:
        return merged
    cut = [emitter.ints([number]) for number in (0, band.tokens, axis_of(2, 4), 1)]
    return emitter.op("Slice", merged, *cut, name=call.name)


def _band_biases(
    emitter: Emitter, band: Band, place: torch.Tensor, dtype: torch.dtype
) -> list[str]:
    """Return what hides keys outside the window, and outside the band: their sum is added.

    ``place`` holds the positions of each block's keys, ``[blocks, span]``.
    """
    near = torch.arange(band.block)[:, None] - (torch.arange(band.span) - band.window)
    inside = additive(near.abs() <= band.window, dtype)  # [block, span]
    edge = additive((place >= 0) & (place < band.tokens), dtype)[:, None]  # [blocks, 1, span]
    biases = (torch.nn.functional.pad(bias, (0, band.text)) for bias in (inside, edge))
    return [emitter.constant(bias) for bias in biases]


def _with_text(emitter: Emitter, near: str, text: str, blocks: int, head_dim: int) -> str:
    """Add the text's tokens to the keys, or values, of each block."""
    apart = emitter.op("Unsqueeze", text, emitter.ints([2]))
    every = emitter.op("Expand", apart, emitter.ints([1, 1, blocks, 1, head_dim]))
    return emitter.op("Concat", near, every, axis=3)


WINDOWS: dict[Any, Rule] = {
    WINDOW_ATTENTION: _window_attention,
    TILE_ATTENTION: _tile_attention,
}
