"""Write operators in ONNX that read or write at indices which tensors hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import Shape, Size
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, axis_of, in_fp32
from ditfastattn.export.operators.elementwise import choose, operand
from ditfastattn.export.operators.shapes import expand, transpose
from ditfastattn.passes.graph.ir import aten


@dataclass(frozen=True)
class _Places:
    """Describe which elements of a tensor of ``rank`` several index tensors name.

    Attributes:
        axes: those that are indexed, the order that moves them to the front, and its inverse.
        index: the name of the places, ``[*shape, axes]``.
        shape: of the index tensors, broadcast together.
    """

    axes: tuple[int, ...]
    order: list[int]
    index: str
    shape: Shape

    @property
    def inverse(self) -> list[int]:
        """Return the order that moves the axes back."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    def selected(self, rank: int) -> list[int]:
        """Return the order from ``[*shape, *rest]`` to what torch selects.

        Torch puts the places where the axes were if these are neighbours, and first otherwise.
        """
        places, rest = len(self.shape), rank - len(self.axes)
        neighbours = self.axes[-1] - self.axes[0] == len(self.axes) - 1
        before = self.axes[0] if neighbours else 0
        return [
            *range(places, places + before),
            *range(places),
            *range(places + before, places + rest),
        ]


def _places(emitter: Emitter, call: Call) -> _Places:
    source, indices = call.first, call.args[1]
    used: list[tuple[int, Value]] = [(a, i) for a, i in enumerate(indices) if i is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in used):
        raise ConfigError(
            "what a mask selects has no fixed shape, and cannot be exported",
            where=f"node {call.name}",
        )
    axes = tuple(axis for axis, _ in used)
    shape = _broadcast([index.shape for _, index in used])
    index = _known_places(emitter, source, used)
    if not index:
        columns = [_column(emitter, source, axis, index, shape) for axis, index in used]
        index = columns[0] if len(columns) == 1 else emitter.op("Concat", *columns, axis=-1)
    return _Places(axes, [*axes, *(a for a in range(source.rank) if a not in axes)], index, shape)


def _known_places(emitter: Emitter, source: Value, used: list[tuple[int, Value]]) -> str:
    """Return the places as a constant, "" where they are not known at export."""
    found: list[torch.Tensor] = []
    for axis, index in used:
        size = source.shape[axis]
        if index.tensor is None or not isinstance(size, int):
            return ""
        found.append(index.tensor.long() % size)  # negative places count from the end
    spread = torch.broadcast_tensors(*found)  # type: ignore[no-untyped-call]  # torch
    return emitter.constant(torch.stack(spread, -1))


def _column(emitter: Emitter, source: Value, axis: int, index: Value, shape: Shape) -> str:
    """Return one index tensor as ``[*shape, 1]``, its negative places counted from the front."""
    name = operand(emitter, index, torch.int64)
    negative = emitter.op("Less", name, emitter.scalar(0, torch.int64))
    from_end = emitter.op("Add", name, emitter.size(source.shape[axis]))
    name = emitter.op("Where", negative, from_end, name)
    spread = expand(emitter, name, index.shape, shape)
    return emitter.op("Unsqueeze", spread, emitter.ints([-1]))


def _broadcast(shapes: list[Shape]) -> Shape:
    rank = max(map(len, shapes))
    aligned = [(*([1] * (rank - len(shape))), *shape) for shape in shapes]
    return tuple(
        next((size for size in sizes if size != 1), 1) for sizes in zip(*aligned, strict=True)
    )


def _index(emitter: Emitter, call: Call) -> str:
    """Write ``x[i]`` as ``Gather``, and ``x[i, j]`` as ``GatherND`` over the axes in front."""
    used = [(axis, index) for axis, index in enumerate(call.args[1]) if index is not None]
    if len(used) == 1 and used[0][1].dtype not in (torch.bool, torch.uint8):
        axis, index = used[0]
        return emitter.op("Gather", emitter.use(call.first), emitter.use(index), axis=axis)
    places = _places(emitter, call)
    front = transpose(emitter, emitter.use(call.first), places.order)
    found = emitter.op("GatherND", front, places.index)
    return transpose(emitter, found, places.selected(call.first.rank))


def _index_put(emitter: Emitter, call: Call) -> str:
    """Write ``x[i, j] = y`` as ``ScatterND``, and ``x[mask] = number`` as ``Where``."""
    base, indices, values = call.args[:3]
    mask = next((index for index in indices if index is not None), None)
    if mask is not None and mask.dtype == torch.bool and _is_one_row(base, indices, mask, values):
        return _masked(emitter, call, mask)
    places = _places(emitter, call)
    front = transpose(emitter, emitter.use(base), places.order)
    rest: Shape = tuple(base.shape[axis] for axis in places.order[len(places.axes) :])
    whole: Shape = (*places.shape, *rest)
    order = places.selected(base.rank)
    selected: Shape = tuple(whole[axis] for axis in order)
    given = operand(emitter, values, call.dtype)
    updates = expand(emitter, given, values.shape, selected)
    back = sorted(range(len(order)), key=order.__getitem__)
    summed = {"reduction": "add"} if call.get(3, "accumulate", False) else {}
    written = emitter.op(
        "ScatterND", front, places.index, transpose(emitter, updates, back), **summed
    )
    return transpose(emitter, written, places.inverse)


def _is_one_row(base: Value, indices: Sequence[Any], mask: Value, values: Value) -> bool:
    """Return whether ``values`` are the same for all that ``mask`` chooses."""
    axis = next(place for place, index in enumerate(indices) if index is not None)
    rest = base.rank - axis - mask.rank
    return values.rank <= rest or (values.rank == rest + 1 and values.shape[0] == 1)


def _masked(emitter: Emitter, call: Call, mask: Value) -> str:
    base, indices, values = call.args[:3]
    if call.get(3, "accumulate", False) or len([i for i in indices if i is not None]) > 1:
        raise ConfigError("such a masked write cannot be exported", where=f"node {call.name}")
    axis = next(place for place, index in enumerate(indices) if index is not None)
    sizes: list[Size] = [*mask.shape, *([1] * (base.rank - axis - mask.rank))]
    chosen = emitter.use(mask)
    if len(sizes) > mask.rank:
        chosen = emitter.reshape(chosen, tuple(sizes))
    filling = operand(emitter, values, call.dtype)
    if values.rank > len(sizes) - mask.rank:  # one row for all that are chosen
        filling = emitter.reshape(filling, tuple(values.shape[1:]))
    return choose(emitter, call, chosen, filling, emitter.use(base))


def _gather(emitter: Emitter, call: Call) -> str:
    axis = axis_of(call.args[1], call.first.rank)
    index = operand(emitter, call.args[2], torch.int64)
    return emitter.op("GatherElements", emitter.use(call.first), index, name=call.name, axis=axis)


def _scatter(reduction: str) -> Rule:
    """Return the rule of ``scatter``, which writes, or ``scatter_add``, which adds."""

    def rule(emitter: Emitter, call: Call) -> str:
        base, _, index, values = call.args[:4]
        axis = axis_of(call.args[1], base.rank)
        if values.shape != index.shape:
            raise ConfigError("a part of a tensor is scattered", where=f"node {call.name}")
        names = [emitter.use(base), operand(emitter, index, torch.int64)]
        return emitter.op(
            "ScatterElements",
            *names,
            operand(emitter, values, call.dtype),
            name=call.name,
            axis=axis,
            reduction=reduction,
        )

    return rule


def _top(emitter: Emitter, call: Call) -> list[str]:
    axis = axis_of(call.get(2, "dim", -1), call.first.rank)
    largest, ordered = int(call.get(3, "largest", True)), int(call.get(4, "sorted", True))
    return emitter.split(
        "TopK",
        emitter.use(call.first),
        emitter.ints([call.args[1]]),
        count=2,
        name=call.name,
        axis=axis,
        largest=largest,
        sorted=ordered,
    )


GATHERS: dict[Any, Rule] = {
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter("none"),
    aten.scatter_add.default: _scatter("add"),
    aten.topk.default: in_fp32(_top),
}
