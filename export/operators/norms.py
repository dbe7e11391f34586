"""Write normalizations and reductions in ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.emitter import Emitter
from ditfastattn.export.operators.base import Call, Rule, axis_of, in_int32
from ditfastattn.export.operators.elementwise import operand
from ditfastattn.passes.graph.ir import aten


def _layer_norm(emitter: Emitter, call: Call) -> str:
    normalized: tuple[int, ...] = call.args[1]
    weight, bias = call.get(2, "weight"), call.get(3, "bias")
    epsilon = call.get(4, "eps", 1e-5)
    ones = torch.ones(normalized, dtype=call.dtype)
    scale = emitter.use(weight) if weight is not None else emitter.constant(ones)
    inputs = [emitter.use(call.first), scale]
    if bias is not None:
        inputs.append(emitter.use(bias))
    axis = -len(normalized)
    return emitter.op(
        "LayerNormalization", *inputs, name=call.name, axis=axis, epsilon=float(epsilon)
    )


def _rms_norm(emitter: Emitter, call: Call) -> str:
    """Compute in fp32, as torch does."""
    axes = list(range(-len(call.args[1]), 0))
    weight, epsilon = call.get(2, "weight"), call.get(3, "eps")
    x = operand(emitter, call.first, torch.float32)
    square = emitter.op("Mul", x, x)
    mean = emitter.op("ReduceMean", square, emitter.ints(axes), keepdims=1)
    least = torch.finfo(call.dtype).eps if epsilon is None else epsilon
    spread = emitter.op("Sqrt", emitter.op("Add", mean, emitter.scalar(least, torch.float32)))
    result = emitter.op("Div", x, spread)
    if weight is not None:
        result = emitter.op("Mul", result, operand(emitter, weight, torch.float32))
    return result if call.dtype == torch.float32 else emitter.cast(result, call.dtype)


def _group_norm(emitter: Emitter, call: Call) -> str:
    """Normalize each group as one row, then scale the channels (opset 21 has an operator)."""
    source, groups = call.first, call.args[1]
    weight, bias, epsilon = call.get(2, "weight"), call.get(3, "bias"), call.get(4, "eps", 1e-5)
    flat = emitter.op("Reshape", emitter.use(source), emitter.ints([0, groups, -1]))
    mean = emitter.op("ReduceMean", flat, emitter.ints([-1]), keepdims=1)
    centred = emitter.op("Sub", flat, mean)
    square = emitter.op("Mul", centred, centred)
    variance = emitter.op("ReduceMean", square, emitter.ints([-1]), keepdims=1)
    spread = emitter.op("Sqrt", emitter.op("Add", variance, emitter.scalar(epsilon, call.dtype)))
    result = emitter.reshape(emitter.op("Div", centred, spread), source.shape)
    column = [-1, *([1] * (source.rank - 2))]
    for kind, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            shaped = emitter.op("Reshape", emitter.use(parameter), emitter.ints(column))
            result = emitter.op(kind, result, shaped)
    return result


def _softmax(emitter: Emitter, call: Call) -> str:
    axis = axis_of(call.args[1], call.first.rank)
    source = operand(emitter, call.first, call.dtype)
    return emitter.op("Softmax", source, name=call.name, axis=axis)


def reduction(kind: str) -> Rule:
    """Return the rule of a reduction over ``dim``."""

    def rule(emitter: Emitter, call: Call) -> str:
        dims: Any = call.get(1, "dim")
        axes = [dims] if isinstance(dims, int) else list(dims or range(call.first.rank))
        source = operand(emitter, call.first, call.dtype)
        kept = int(bool(call.get(2, "keepdim", False)))
        return emitter.op(kind, source, emitter.ints(axes), name=call.name, keepdims=kept)

    return rule


def _variance(emitter: Emitter, call: Call) -> str:
    dims: Any = call.get(1, "dim")
    axes = [dims] if isinstance(dims, int) else list(dims or range(call.first.rank))
    kept = int(bool(call.kwargs.get("keepdim", False)))
    correction: Any = call.kwargs.get("correction", 1)
    count = 1
    for axis in axes:
        size = call.first.shape[axis]
        count *= size if isinstance(size, int) else 1
    source = emitter.use(call.first)
    mean = emitter.op("ReduceMean", source, emitter.ints(axes), keepdims=1)
    centred = emitter.op("Sub", source, mean)
    square = emitter.op("Mul", centred, centred)
    total = emitter.op("ReduceSum", square, emitter.ints(axes), keepdims=kept)
    return emitter.op("Div", total, emitter.scalar(count - (correction or 0), call.dtype))


def _vector_norm(emitter: Emitter, call: Call) -> str:
    """Compute in fp32 at least, as torch does: squares overflow half precision."""
    wide = torch.promote_types(call.dtype, torch.float32)
    dims = call.get(2, "dim")
    axes = [dims] if isinstance(dims, int) else list(dims or range(call.first.rank))
    source, over = operand(emitter, call.first, wide), emitter.ints(axes)
    kept = int(bool(call.get(3, "keepdim", False)))
    order = float(call.get(1, "ord", 2))
    if order == 0:
        raise ConfigError("a norm of order 0 cannot be exported", where=f"node {call.name}")
    if order in (1, 2):
        result = emitter.op(f"ReduceL{order:.0f}", source, over, name=call.name, keepdims=kept)
    elif math.isinf(order):
        kind = "ReduceMax" if order > 0 else "ReduceMin"
        sizes = emitter.op("Abs", source)
        result = emitter.op(kind, sizes, over, name=call.name, keepdims=kept)
    else:
        powers = emitter.op("Pow", emitter.op("Abs", source), emitter.scalar(order, wide))
        total = emitter.op("ReduceSum", powers, over, keepdims=kept)
        result = emitter.op("Pow", total, emitter.scalar(1 / order, wide), name=call.name)
    return result if wide == call.dtype else emitter.cast(result, call.dtype)


def _truth(kind: str) -> Rule:
    """Return the rule of ``any``, by ``ReduceMax``, or ``all``, by ``ReduceMin``."""

    def rule(emitter: Emitter, call: Call) -> str:
        dims: Any = call.get(1, "dim")
        axes = [dims] if isinstance(dims, int) else list(dims or range(call.first.rank))
        kept = int(bool(call.get(2, "keepdim", False)))
        flags = operand(emitter, call.first, torch.bool)
        found = emitter.op(
            kind, emitter.cast(flags, torch.int32), emitter.ints(axes), keepdims=kept
        )
        return emitter.cast(found, torch.bool)

    return rule


def _running_sum(emitter: Emitter, call: Call) -> str:
    axis = torch.tensor(axis_of(call.args[1], call.first.rank))
    source = operand(emitter, call.first, call.dtype)
    return emitter.op("CumSum", source, emitter.constant(axis), name=call.name)


NORMS: dict[Any, Rule] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: reduction("ReduceMean"),
    aten.mean.default: reduction("ReduceMean"),
    aten.sum.dim_IntList: reduction("ReduceSum"),
    aten.sum.default: reduction("ReduceSum"),
    aten.amax.default: in_int32(reduction("ReduceMax")),
    aten.amin.default: in_int32(reduction("ReduceMin")),
    aten.var.correction: _variance,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.any.default: _truth("ReduceMax"),
    aten.any.dim: _truth("ReduceMax"),
    aten.all.default: _truth("ReduceMin"),
    aten.all.dim: _truth("ReduceMin"),
    aten.cumsum.default: _running_sum,
}
