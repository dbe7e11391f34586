"""Write operators that reshape, permute, repeat and fill in ONNX."""

from __future__ import annotations

from typing import Any

from ditfastattn.export.batch import Shape, Size
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, axis_of, in_fp32
from ditfastattn.export.operators.elementwise import operand
from ditfastattn.passes.graph.ir import aten


def _reshape(emitter: Emitter, call: Call) -> str:
    name = emitter.use(call.first)
    return name if call.first.shape == call.shape else emitter.reshape(name, call.shape)


def transpose(emitter: Emitter, name: str, order: list[int]) -> str:
    """Move the axes of the value called ``name``."""
    return name if order == sorted(order) else emitter.op("Transpose", name, perm=order)


def _transpose(emitter: Emitter, call: Call) -> str:
    rank = call.first.rank
    one, other = (axis_of(axis, rank) for axis in call.args[1:3])
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return transpose(emitter, emitter.use(call.first), order)


def _matrix_transpose(emitter: Emitter, call: Call) -> str:
    return transpose(emitter, emitter.use(call.first), list(range(call.first.rank))[::-1])


def _permute(emitter: Emitter, call: Call) -> str:
    order = [axis_of(axis, call.first.rank) for axis in call.args[1]]
    return transpose(emitter, emitter.use(call.first), order)


def _einsum(emitter: Emitter, call: Call) -> str | list[str]:
    """Write ``einsum``, a permutation as ``Transpose``."""
    equation = str(call.args[0]).replace(" ", "")
    operands: tuple[Value, ...] = call.args[1]
    left, arrow, right = equation.partition("->")
    if arrow and len(operands) == 1 and sorted(left) == sorted(right) and len({*left}) == len(left):
        return transpose(emitter, emitter.use(operands[0]), [left.index(axis) for axis in right])
    return in_fp32(_sum_of_products)(emitter, call)


def _sum_of_products(emitter: Emitter, call: Call) -> str:
    names = [emitter.use(item) for item in call.args[1]]
    equation = str(call.args[0]).replace(" ", "")
    return emitter.op("Einsum", *names, name=call.name, equation=equation)


def _unsqueeze(emitter: Emitter, call: Call) -> str:
    axis = axis_of(call.args[1], call.first.rank + 1)
    return emitter.op("Unsqueeze", emitter.use(call.first), emitter.ints([axis]), name=call.name)


def _squeeze(emitter: Emitter, call: Call) -> str:
    return _reshape(emitter, call)


def expand(emitter: Emitter, name: str, shape: Shape, target: Shape) -> str:
    """Broadcast the value called ``name`` from ``shape`` to ``target``."""
    aligned = (*([1] * (len(target) - len(shape))), *shape)
    wanted = tuple(1 if was == now else now for was, now in zip(aligned, target, strict=True))
    if len(shape) == len(target) and all(size == 1 for size in wanted):
        return name
    return emitter.op("Expand", name, emitter.sizes(wanted))


def _expand(emitter: Emitter, call: Call) -> str:
    return expand(emitter, emitter.use(call.first), call.first.shape, call.shape)


def _copy(emitter: Emitter, call: Call) -> str:
    """Write ``copy``: the second, in the shape and dtype of the first."""
    source: Value = call.args[1]
    return expand(emitter, operand(emitter, source, call.dtype), source.shape, call.shape)


def _repeat(emitter: Emitter, call: Call) -> str:
    times: tuple[Size, ...] = call.args[1]
    source = emitter.use(call.first)
    if len(times) > call.first.rank:
        padded = (*([1] * (len(times) - call.first.rank)), *call.first.shape)
        source = emitter.reshape(source, padded)
    return emitter.op("Tile", source, emitter.sizes(times), name=call.name)


def _repeat_interleave(emitter: Emitter, call: Call) -> str:
    times: int = call.args[1]
    axis = axis_of(call.get(2, "dim", 0), call.first.rank)
    apart = emitter.op("Unsqueeze", emitter.use(call.first), emitter.ints([axis + 1]))
    counts = [1] * (call.first.rank + 1)
    counts[axis + 1] = times
    return emitter.reshape(emitter.op("Expand", apart, emitter.ints(counts)), call.shape)


def _filled(number_at: int | None, number: float = 0.0) -> Rule:
    def rule(emitter: Emitter, call: Call) -> str:
        content = number if number_at is None else call.args[number_at]
        filling = operand(emitter, content, call.dtype)
        return expand(emitter, filling, (), call.shape)

    return rule


def _range(emitter: Emitter, call: Call) -> str:
    """Write ``arange``: up to an end, from a start, or in steps."""
    bounds = (0, *call.args, 1) if len(call.args) == 1 else (*call.args, 1)[:3]
    names = [emitter.op("Squeeze", emitter.size(bound), emitter.ints([0])) for bound in bounds]
    return emitter.cast(emitter.op("Range", *names, name=call.name), call.dtype)


def _pixel_shuffle(emitter: Emitter, call: Call) -> str:
    source, factor = emitter.use(call.first), call.args[1]
    return emitter.op("DepthToSpace", source, name=call.name, blocksize=factor, mode="CRD")


SHAPES: dict[Any, Rule] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.t.default: _matrix_transpose,
    aten.numpy_T.default: _matrix_transpose,
    aten.permute.default: _permute,
    aten.einsum.default: _einsum,
    aten.expand.default: _expand,
    aten.copy.default: _copy,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.zeros.default: _filled(None, 0.0),
    aten.ones.default: _filled(None, 1.0),
    aten.full.default: _filled(1),
    aten.zeros_like.default: _filled(None, 0.0),
    aten.empty_like.default: _filled(None, 0.0),  # to be overwritten
    aten.ones_like.default: _filled(None, 1.0),
    aten.full_like.default: _filled(1),
    aten.new_zeros.default: _filled(None, 0.0),
    aten.new_ones.default: _filled(None, 1.0),
    aten.arange.default: _range,
    aten.arange.start: _range,
    aten.arange.start_step: _range,
    aten.pixel_shuffle.default: _pixel_shuffle,
}
