"""Write comparisons, and operators of flags and bits, in ONNX."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, aten
from ditfastattn.export.operators.elementwise import common_dtype, operand, unary


def logical(kind: str) -> Rule:
    """Return the rule of an operator of flags; a number is one that is not 0."""

    def rule(emitter: Emitter, call: Call) -> str:
        left, right = (operand(emitter, item, torch.bool) for item in call.args[:2])
        return emitter.op(kind, left, right, name=call.name)

    return rule


def bitwise(kind: str, of_flags: str) -> Rule:
    """Return the rule of an operator of bits, which of flags is another one in ONNX."""

    def rule(emitter: Emitter, call: Call) -> str:
        numbers = [item for item in call.args if isinstance(item, (Value, int))]
        operands = [operand(emitter, item, call.dtype) for item in numbers]
        named = of_flags if call.dtype == torch.bool else kind
        return emitter.op(named, *operands, name=call.name)

    return rule


def comparison(kind: str) -> Rule:
    """Return the rule of a comparison; ``NotEqual`` is the negation of ``Equal``."""

    def rule(emitter: Emitter, call: Call) -> str:
        dtype = common_dtype(call)
        dtype = torch.int32 if dtype == torch.bool else dtype  # flags have no order in ONNX
        left, right = (operand(emitter, item, dtype) for item in call.args[:2])
        if kind == "NotEqual":
            return emitter.op("Not", emitter.op("Equal", left, right), name=call.name)
        return emitter.op(kind, left, right, name=call.name)

    return rule


def _isnan(emitter: Emitter, call: Call) -> str:
    floating = call.first.dtype.is_floating_point
    dtype = call.first.dtype if floating else torch.float32
    return emitter.op("IsNaN", operand(emitter, call.first, dtype), name=call.name)


FLAGS: dict[Any, Rule] = {
    aten.gt.Tensor: comparison("Greater"),
    aten.gt.Scalar: comparison("Greater"),
    aten.ge.Tensor: comparison("GreaterOrEqual"),
    aten.ge.Scalar: comparison("GreaterOrEqual"),
    aten.lt.Tensor: comparison("Less"),
    aten.lt.Scalar: comparison("Less"),
    aten.le.Tensor: comparison("LessOrEqual"),
    aten.le.Scalar: comparison("LessOrEqual"),
    aten.eq.Tensor: comparison("Equal"),
    aten.eq.Scalar: comparison("Equal"),
    aten.ne.Tensor: comparison("NotEqual"),
    aten.ne.Scalar: comparison("NotEqual"),
    aten.logical_and.default: logical("And"),
    aten.logical_or.default: logical("Or"),
    aten.bitwise_and.Tensor: bitwise("BitwiseAnd", "And"),
    aten.bitwise_and.Scalar: bitwise("BitwiseAnd", "And"),
    aten.__and__.Tensor: bitwise("BitwiseAnd", "And"),
    aten.__and__.Scalar: bitwise("BitwiseAnd", "And"),
    aten.bitwise_or.Tensor: bitwise("BitwiseOr", "Or"),
    aten.bitwise_or.Scalar: bitwise("BitwiseOr", "Or"),
    aten.__or__.Tensor: bitwise("BitwiseOr", "Or"),
    aten.__or__.Scalar: bitwise("BitwiseOr", "Or"),
    aten.bitwise_xor.Tensor: bitwise("BitwiseXor", "Xor"),
    aten.bitwise_xor.Scalar: bitwise("BitwiseXor", "Xor"),
    aten.logical_not.default: unary("Not"),
    aten.bitwise_not.default: bitwise("BitwiseNot", "Not"),
    aten.isnan.default: _isnan,
}
