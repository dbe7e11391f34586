"""Find the grid that a sequence of tokens was flattened from, by following the tokens' axis back.

A convolution embeds patches as an image. A linear layer instead takes tokens that were packed
outside of the model; the grid then shows in their positions only, tables or coordinates
``[t, h, w]`` that the graph flattens before it combines them with the tokens::

    %7 = aten.expand.default(%6, [3, 4, 8, 12]): float32[3, 4, 8, 12]
    %9 = aten.reshape.default(%7, [96, 12]): float32[96, 12]       96 tokens are 3 x 4 x 8
    %12 = aten.mul.Tensor(%11, %9): float32[2, 6, 96, 12]          the queries

Positions that are an input are data, which the graph does not hold; then no grid is found.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, value

Axis = tuple[Node, int]
_MOST_AXES = 3  # time, height, width
_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
_KEEPS_AXES = (  # those of the first argument, or of all arguments broadcast to the result
    *(aten.to.dtype, aten.to.device, aten.type_as.default, aten._to_copy.default),
    *(aten.contiguous.default, aten.clone.default, aten.expand.default, aten.repeat.default),
    *(aten.masked_fill.Scalar, aten.slice.Tensor, aten.slice_scatter.default),
    *(aten.constant_pad_nd.default, aten.pad.default, aten.roll.default),
    *(aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int),
    *(aten.repeat_interleave.self_int, ATTENTION),
)
_CHANNELS = (
    aten.view_as_complex.default,
    aten.view_as_real.default,
)  # split, or merge, the last
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


@dataclass
class GridFinder:
    """Find grids in one graph; sequences of as many tokens have the same grid."""

    _known: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _dead_ends: dict[int, set[Axis]] = field(default_factory=dict)  # axes that lead to no grid

    def find(self, query: Node, tokens: int) -> tuple[int, ...]:
        """Return the grid ``(h, w)`` or ``(t, h, w)`` of ``tokens`` of ``[B, H, N, D]``, or ().

        ``tokens`` counts those meant, in joint attention the image's.
        """
        if tokens in self._known:
            return self._known[tokens]
        dead_ends = self._dead_ends.setdefault(tokens, set())
        start = (query, value(query).dim() - 2)
        walked: set[Axis] = set()
        for found in _walk(start, tokens, dead_ends):
            walked.add(found)
            merged = _merged(*found) if _size(found) == tokens else []
            if merged:
                grid = _grid(merged)
                self._known[tokens] = grid if len(grid) <= _MOST_AXES else ()
                return self._known[tokens]
        dead_ends |= walked
        return ()

    def inputs(self, tokens: int) -> tuple[Node, ...]:
        """Return the graph's inputs that the axis of ``tokens`` was followed to, in their order."""
        walked = self._dead_ends.get(tokens, set())
        ends = {node for node, _ in walked if node.op == "placeholder"}
        return tuple(node for end in list(ends)[:1] for node in end.graph.nodes if node in ends)


def _walk(start: Axis, tokens: int, dead_ends: Collection[Axis] = ()) -> Iterator[Axis]:
    """Walk back from ``start`` along its axis, the nearest first, but not into ``dead_ends``."""
    seen, pending = {start}, deque([start])
    while pending:
        found = pending.popleft()
        if found in dead_ends:
            continue
        yield found
        sources = [axis for axis in _sources(*found, tokens) if axis not in seen]
        seen.update(sources)
        pending.extend(sources)


def _grid(axes: list[Axis]) -> tuple[int, ...]:
    """Return the sizes of ``axes``, or of the axes that each was flattened from in turn."""
    sizes: list[int] = []
    for axis in axes:
        walk = _walk(axis, _size(axis))
        inner = next((merged for found in walk if (merged := _merged(*found))), [])
        sizes += _grid(inner) if inner else [_size(axis)]
    return tuple(sizes)


def _size(axis: Axis) -> int:
    node, dim = axis
    return int(value(node).shape[dim])


def _merged(node: Node, dim: int) -> list[Axis]:
    """Return the axes larger than 1 that ``node`` flattens into dimension ``dim``, if several."""
    if node.target not in _RESHAPES:
        return []
    covered = _covered(node, dim)
    return covered if len(covered) > 1 else []


def _covered(node: Node, dim: int) -> list[Axis]:
    """Return the source axes larger than 1 that dimension ``dim`` of a reshape consists of.

    Empty where the dimension is a part of one axis.
    """
    source = node.all_input_nodes[0]
    shape, before = value(node).shape, value(source).shape
    first, last = math.prod(shape[:dim]), math.prod(shape[: dim + 1])
    inside = [
        axis
        for axis, size in enumerate(before)
        if size > 1 and first <= math.prod(before[:axis]) and math.prod(before[: axis + 1]) <= last
    ]
    whole = math.prod(before[axis] for axis in inside) == shape[dim]
    return [(source, axis) for axis in inside] if whole else []


def _sources(node: Node, dim: int, tokens: int) -> Iterator[Axis]:
    """Return the axes that ``dim`` of ``node`` comes from, if of its size or of ``tokens``."""
    sizes = (_size((node, dim)), tokens)
    for source, axis in _origins(node, dim):
        shape = value(source).shape
        if 0 <= axis < len(shape) and shape[axis] in sizes:
            yield source, axis


def _origins(node: Node, dim: int) -> Iterator[Axis]:
    rank, target = value(node).dim(), node.target
    first = node.all_input_nodes[0] if node.all_input_nodes else node
    if target in _RESHAPES:
        yield from _covered(node, dim)
    elif target in _CHANNELS:
        yield first, dim
    elif target in _KEEPS_AXES or torch.Tag.pointwise in getattr(target, "tags", ()):
        single = target in (aten.linear.default, aten.type_as.default, ATTENTION)
        for source in [first] if single else node.all_input_nodes:
            yield source, dim - rank + value(source).dim()
    elif target in (aten.transpose.int, aten.permute.default):
        yield first, _order(node, rank)[dim]
    elif target in (aten.unsqueeze.default, aten.stack.default):
        new = int(argument(node, 1, "dim", 0)) % rank
        for source in node.all_input_nodes if dim != new else ():
            yield source, dim - (dim > new)
    elif target in (aten.select.int, aten.squeeze.dim):
        gone = int(argument(node, 1, "dim")) % value(first).dim()
        yield first, dim + (dim >= gone and value(first).dim() > rank)
    elif target is aten.cat.default:
        for source in node.all_input_nodes:
            yield source, dim
    elif target is operator.getitem and first.target in _SPLITS:
        source = first.all_input_nodes[0]
        gone = int(argument(first, 2 - (first.target is aten.unbind.int), "dim", 0))
        later = first.target is aten.unbind.int and dim >= gone % value(source).dim()
        yield source, dim + later
    elif target is aten.outer.default:
        yield _factors(node)[dim], 0
    elif target in (aten.matmul.default, aten.bmm.default):
        left, right = _factors(node)
        source = right if dim == rank - 1 else left
        yield source, dim - rank + value(source).dim()


def _order(node: Node, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in argument(node, 1, "dims")]
    order = list(range(rank))
    one, other = (int(argument(node, place, f"dim{place - 1}")) % rank for place in (1, 2))
    order[one], order[other] = other, one
    return order


def _factors(node: Node) -> tuple[Node, Node]:
    left: Any = node.args[0]
    right: Any = node.args[1]
    return left, right


def embedded_grid(node: Node, tokens: int, folded: int) -> tuple[int, ...]:
    """Return the size of the patch embedding that made these tokens, or ().

    Time comes first if each frame is embedded on its own and the tokens are those of all frames. If
    each position of a frame is ``folded`` into the batch, the tokens are frames.
    """
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop(0)
        if current.target in (aten.conv2d.default, aten.conv3d.default):
            size = tuple(value(current).shape[2:])
            frames, rest = divmod(tokens, math.prod(size))
            whole = rest == 0 and frames > 0 and math.prod(size) > 1
            if whole and (frames == 1 or len(size) == 2):
                return size if frames == 1 else (frames, *size)
            if math.prod(size) == folded > 1:
                return (tokens,)
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return ()
