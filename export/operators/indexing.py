"""Write operators that slice, split and join in ONNX, and write parts of tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import BatchSize, Size
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, axis_of
from ditfastattn.export.operators.elementwise import operand
from ditfastattn.passes.graph.ir import aten


def _slice(emitter: Emitter, call: Call) -> str:
    source = call.first
    axis = axis_of(call.get(1, "dim", 0), source.rank)
    start, end, step = call.get(2, "start"), call.get(3, "end"), call.get(4, "step", 1)
    size = source.shape[axis]
    begin: Size = 0 if start is None else start
    stop: Size = size if end is None or end == sys.maxsize else end
    if isinstance(begin, int) and isinstance(size, int) and begin < 0:
        begin = max(0, begin + size)
    if begin == 0 and stop == size and step == 1:
        return emitter.use(source)
    half = _half(size)
    if step == 1 and half is not None and (begin, stop) in ((0, half), (half, size)):
        halves = emitter.halves(emitter.use(source), axis)
        return halves[0 if begin == 0 else 1]
    ends = emitter.size(stop)
    return emitter.op(
        "Slice",
        emitter.use(source),
        emitter.size(begin),
        ends,
        emitter.ints([axis]),
        emitter.ints([step]),
        name=call.name,
    )


def _half(size: Size) -> BatchSize | None:
    return BatchSize(size.factor / 2) if isinstance(size, BatchSize) else None


def _split(emitter: Emitter, call: Call) -> list[str]:
    """Write ``chunk`` or ``split``, by the shapes of the results."""
    axis = axis_of(call.get(2, "dim", 0), call.first.rank)
    parts: Any = call.shape
    sizes: list[Size] = [part[axis] for part in parts]
    return _cut(emitter, call, axis, sizes)


def _cut(emitter: Emitter, call: Call, axis: int, sizes: list[Size]) -> list[str]:
    name = emitter.use(call.first)
    count = len(sizes)
    if count == 1:
        return [name]
    if any(isinstance(size, BatchSize) for size in sizes):
        if len(set(sizes)) > 1:
            raise ConfigError("the batch is cut into unequal parts", where=f"node {call.name}")
        return emitter.split(
            "Split", name, count=count, name=call.name, axis=axis, num_outputs=count
        )
    cuts = emitter.ints([size for size in sizes if isinstance(size, int)])
    return emitter.split("Split", name, cuts, count=count, name=call.name, axis=axis)


def _unbind(emitter: Emitter, call: Call) -> list[str]:
    axis = axis_of(call.get(1, "dim", 0), call.first.rank)
    parts: Any = call.shape
    ones: list[Size] = [1] * len(parts)
    axes = emitter.ints([axis])
    return [emitter.op("Squeeze", part, axes) for part in _cut(emitter, call, axis, ones)]


def _select(emitter: Emitter, call: Call) -> str:
    axis = axis_of(call.args[1], call.first.rank)
    index = emitter.ints([call.args[2]])
    taken = emitter.op("Gather", emitter.use(call.first), index, axis=axis)
    return emitter.op("Squeeze", taken, emitter.ints([axis]), name=call.name)


def _cat(emitter: Emitter, call: Call) -> str:
    parts: tuple[Value, ...] = call.args[0]
    full = [part for part in parts if part.shape != (0,)]  # torch ignores such tensors
    axis = axis_of(call.get(1, "dim", 0), full[0].rank)
    names = [operand(emitter, part, call.dtype) for part in full]
    return emitter.op("Concat", *names, name=call.name, axis=axis)


def _stack(emitter: Emitter, call: Call) -> str:
    parts: tuple[Value, ...] = call.args[0]
    axis = axis_of(call.get(1, "dim", 0), parts[0].rank + 1)
    axes = emitter.ints([axis])
    names = [emitter.op("Unsqueeze", operand(emitter, part, call.dtype), axes) for part in parts]
    return emitter.op("Concat", *names, name=call.name, axis=axis)


def _pad(emitter: Emitter, call: Call) -> str:
    flat: tuple[int, ...] = call.args[1]
    rank = call.first.rank
    before, after = [0] * rank, [0] * rank
    for place in range(len(flat) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = flat[2 * place : 2 * place + 2]
    filling = emitter.scalar(call.get(2, "value", 0) or 0, call.dtype)
    return emitter.op("Pad", emitter.use(call.first), emitter.ints([*before, *after]), filling)


def _flip(emitter: Emitter, call: Call) -> str:
    axes = [axis_of(axis, call.first.rank) for axis in call.args[1]]
    return emitter.op(
        "Slice",
        emitter.use(call.first),
        emitter.ints([-1] * len(axes)),
        emitter.ints([-sys.maxsize] * len(axes)),
        emitter.ints(axes),
        emitter.ints([-1] * len(axes)),
        name=call.name,
    )


def _embedding(emitter: Emitter, call: Call) -> str:
    table, index = call.args[:2]
    return emitter.op("Gather", emitter.use(table), emitter.use(index), name=call.name, axis=0)


def _index_select(emitter: Emitter, call: Call) -> str:
    axis = axis_of(call.args[1], call.first.rank)
    index = emitter.use(call.args[2])
    return emitter.op("Gather", emitter.use(call.first), index, name=call.name, axis=axis)


def _slice_scatter(emitter: Emitter, call: Call) -> str:
    """Take each index from the source or from the base, by one gather of both."""
    base, source = call.args[:2]
    axis = axis_of(call.get(2, "dim", 0), base.rank)
    size, written = base.shape[axis], source.shape[axis]
    start, step = call.get(3, "start") or 0, call.get(5, "step", 1)
    return _scattered(emitter, call, emitter.use(source), axis, (size, written, start, step))


def _select_scatter(emitter: Emitter, call: Call) -> str:
    base, source = call.args[:2]
    axis = axis_of(call.args[2], base.rank)
    part = emitter.op("Unsqueeze", emitter.use(source), emitter.ints([axis]))
    return _scattered(emitter, call, part, axis, (base.shape[axis], 1, call.args[3], 1))


def _scattered(
    emitter: Emitter, call: Call, source: str, axis: int, place: tuple[Any, Any, Any, Any]
) -> str:
    size, written, start, step = place
    if not isinstance(size, int) or not isinstance(written, int):
        raise ConfigError("a part of the batch is written", where=f"node {call.name}")
    index = torch.arange(size)
    first = start + size if start < 0 else start
    index[first : first + step * written : step] = size + torch.arange(written)
    both = emitter.op("Concat", emitter.use(call.first), source, axis=axis)
    return emitter.op("Gather", both, emitter.constant(index), name=call.name, axis=axis)


INDEXING: dict[Any, Rule] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.chunk.default: _split,
    aten.split.Tensor: _split,
    aten.split.sizes: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.stack.default: _stack,
    aten.constant_pad_nd.default: _pad,
    aten.flip.default: _flip,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
}
