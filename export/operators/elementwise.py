"""Write elementwise operators in ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch

from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, in_fp32, in_int32, without_double
from ditfastattn.passes.graph.ir import aten


def operand(emitter: Emitter, item: Any, dtype: torch.dtype) -> str:
    """Return ``item``, a value or a number, as a value of ``dtype``."""
    if not isinstance(item, Value):
        return emitter.scalar(item, dtype)
    name = emitter.use(item)
    return name if item.dtype == dtype else emitter.cast(name, dtype)


def common_dtype(call: Call) -> torch.dtype:
    """Return the dtype that torch computes a binary operator in."""
    left, right = call.args[:2]
    both = [_sample(item) for item in (left, right)]
    return torch.result_type(both[0], both[1])


def _sample(item: Any) -> Any:
    if not isinstance(item, Value):
        return item
    return torch.empty((1,) * item.rank, dtype=item.dtype)


def _finished(emitter: Emitter, call: Call, name: str, dtype: torch.dtype) -> str:
    return name if dtype == call.dtype else emitter.cast(name, call.dtype)


_OF_FLAGS = {"Mul": "And", "Add": "Or", "Max": "Or", "Min": "And"}


def binary(kind: str) -> Rule:
    """Return the rule of an operator of two operands; ``alpha`` scales the second."""

    def rule(emitter: Emitter, call: Call) -> str:
        dtype = common_dtype(call)
        if kind == "Div" and not dtype.is_floating_point:
            dtype = call.dtype
        left, right = (operand(emitter, item, dtype) for item in call.args[:2])
        alpha = call.kwargs.get("alpha", 1)
        if alpha != 1:
            right = emitter.op("Mul", right, emitter.scalar(alpha, dtype))
        named = _OF_FLAGS.get(kind, kind) if dtype == torch.bool else kind
        return _finished(emitter, call, emitter.op(named, left, right, name=call.name), dtype)

    return rule


def reversed_subtraction(emitter: Emitter, call: Call) -> str:
    """Write ``rsub``: the second less the first."""
    dtype = common_dtype(call)
    left, right = (operand(emitter, item, dtype) for item in call.args[:2])
    alpha = call.get(2, "alpha", 1)
    if alpha != 1:
        left = emitter.op("Mul", left, emitter.scalar(alpha, dtype))
    return emitter.op("Sub", right, left, name=call.name)


def unary(kind: str, **attributes: Any) -> Rule:
    """Return the rule of an operator of one operand."""

    def rule(emitter: Emitter, call: Call) -> str:
        return emitter.op(
            kind, operand(emitter, call.first, call.dtype), name=call.name, **attributes
        )

    return rule


def rounding(kind: str) -> Rule:
    """Return the rule of an operator that leaves integers as they are, and has none of them."""

    def rule(emitter: Emitter, call: Call) -> str:
        source = emitter.use(call.first)
        return emitter.op(kind if call.dtype.is_floating_point else "Identity", source)

    return rule


def _log1p(emitter: Emitter, call: Call) -> str:
    one = emitter.scalar(1.0, call.dtype)
    source = operand(emitter, call.first, call.dtype)
    return emitter.op("Log", emitter.op("Add", source, one), name=call.name)


def _relu(emitter: Emitter, call: Call) -> str:
    """Write ``relu``, which ONNX Runtime has of floating point and int32 alone."""
    source = emitter.use(call.first)
    if call.dtype.is_floating_point:
        return emitter.op("Relu", source, name=call.name)
    return emitter.op("Max", source, emitter.scalar(0, call.dtype), name=call.name)


def _remainder(emitter: Emitter, call: Call) -> str:
    """Write ``remainder``, which takes the divisor's sign as ONNX's integer ``Mod`` does."""
    dtype = common_dtype(call)
    left, right = (operand(emitter, item, dtype) for item in call.args[:2])
    if not dtype.is_floating_point:
        return emitter.op("Mod", left, right, name=call.name)
    whole = emitter.op("Floor", emitter.op("Div", left, right))
    return emitter.op("Sub", left, emitter.op("Mul", whole, right), name=call.name)


def _silu(emitter: Emitter, call: Call) -> str:
    x = emitter.use(call.first)
    return emitter.op("Mul", x, emitter.op("Sigmoid", x), name=call.name)


def _gelu(emitter: Emitter, call: Call) -> str:
    return emitter.op(
        "Gelu",
        emitter.use(call.first),
        name=call.name,
        approximate=call.kwargs.get("approximate", "none"),
    )


def _rsqrt(emitter: Emitter, call: Call) -> str:
    root = emitter.op("Sqrt", operand(emitter, call.first, call.dtype))
    return emitter.op("Reciprocal", root, name=call.name)


def _power(emitter: Emitter, call: Call) -> str:
    base, exponent = call.args[:2]
    dtype = call.dtype
    left = operand(emitter, base, dtype)
    if exponent == 2:
        return emitter.op("Mul", left, left, name=call.name)
    return emitter.op("Pow", left, operand(emitter, exponent, dtype), name=call.name)


def _clamp(emitter: Emitter, call: Call) -> str:
    low, high = call.get(1, "min"), call.get(2, "max")
    bounds = ["" if bound is None else operand(emitter, bound, call.dtype) for bound in (low, high)]
    return emitter.op("Clip", operand(emitter, call.first, call.dtype), *bounds, name=call.name)


def _where(emitter: Emitter, call: Call) -> str:
    chosen, left, right = call.args[:3]
    one, other = (operand(emitter, item, call.dtype) for item in (left, right))
    return choose(emitter, call, emitter.use(chosen), one, other)


def choose(emitter: Emitter, call: Call, chosen: str, one: str, other: str) -> str:
    """Return ``one`` where ``chosen``, else ``other``; ONNX Runtime has no ``Where`` of bools."""
    if call.dtype != torch.bool:
        return emitter.op("Where", chosen, one, other, name=call.name)
    left = emitter.op("And", chosen, one)
    right = emitter.op("And", emitter.op("Not", chosen), other)
    return emitter.op("Or", left, right, name=call.name)


def _masked_fill(emitter: Emitter, call: Call) -> str:
    source, mask, filling = call.args[:3]
    if not isinstance(filling, Value) and not math.isfinite(filling):
        filling = math.copysign(finite_minimum(call.dtype), -filling)
    fill = operand(emitter, filling, call.dtype)
    return choose(emitter, call, emitter.use(mask), fill, emitter.use(source))


def finite_minimum(dtype: torch.dtype) -> float:
    """Return a stand-in for minus infinity, which TensorRT's fp16 softmax turns into NaN."""
    return -6e4 if dtype == torch.float16 else -1e30


def _to(emitter: Emitter, call: Call) -> str:
    if call.first.dtype == call.dtype:
        return emitter.op("Identity", emitter.use(call.first), name=call.name)
    return emitter.cast(emitter.use(call.first), call.dtype)


def _same(emitter: Emitter, call: Call) -> str:
    return emitter.use(call.first)


def _leaky_relu(emitter: Emitter, call: Call) -> str:
    slope = float(call.get(1, "negative_slope", 0.01))
    return emitter.op("LeakyRelu", emitter.use(call.first), name=call.name, alpha=slope)


ELEMENTWISE: dict[Any, Rule] = {
    aten.add.Tensor: binary("Add"),
    aten.add.Scalar: binary("Add"),
    aten.sub.Tensor: binary("Sub"),
    aten.sub.Scalar: binary("Sub"),
    aten.rsub.Scalar: reversed_subtraction,
    aten.rsub.Tensor: reversed_subtraction,
    aten.mul.Tensor: binary("Mul"),
    aten.mul.Scalar: binary("Mul"),
    aten.div.Tensor: binary("Div"),
    aten.div.Scalar: binary("Div"),
    aten.maximum.default: in_int32(binary("Max")),
    aten.minimum.default: in_int32(binary("Min")),
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.log1p.default: _log1p,
    aten.neg.default: in_int32(unary("Neg")),
    aten.abs.default: unary("Abs"),
    aten.exp.default: unary("Exp"),
    aten.log.default: unary("Log"),
    aten.sqrt.default: unary("Sqrt"),
    aten.sin.default: in_fp32(unary("Sin")),
    aten.cos.default: in_fp32(unary("Cos")),
    aten.asin.default: without_double(unary("Asin")),
    aten.acos.default: without_double(unary("Acos")),
    aten.atan.default: without_double(unary("Atan")),
    aten.tanh.default: unary("Tanh"),
    aten.sigmoid.default: unary("Sigmoid"),
    aten.relu.default: in_int32(_relu),
    aten.leaky_relu.default: without_double(_leaky_relu),
    aten.reciprocal.default: unary("Reciprocal"),
    aten.floor.default: rounding("Floor"),
    aten.round.default: in_fp32(rounding("Round")),
    aten.rsqrt.default: _rsqrt,
    aten.silu.default: _silu,
    aten.gelu.default: without_double(_gelu),
    aten.pow.Tensor_Scalar: in_int32(_power),
    aten.pow.Tensor_Tensor: in_int32(_power),
    aten.pow.Scalar: in_int32(_power),
    aten.clamp.default: in_int32(_clamp),
    aten.where.self: in_int32(_where),
    aten.where.ScalarOther: in_int32(_where),
    aten.where.ScalarSelf: in_int32(_where),
    aten.where.Scalar: in_int32(_where),
    aten.masked_fill.Scalar: in_int32(_masked_fill),
    aten.masked_fill.Tensor: in_int32(_masked_fill),
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten._to_copy.default: _to,
    aten.type_as.default: _to,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
}
