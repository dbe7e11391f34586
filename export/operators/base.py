"""Define what a rule takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ditfastattn.export.batch import Shape
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.passes.graph.ir import aten

__all__ = [
    "Call",
    "Emitter",
    "Rule",
    "Value",
    "aten",
    "axis_of",
    "computed_in",
    "in_fp32",
    "in_int32",
    "without_double",
]


@dataclass(frozen=True)
class Call:
    """Describe one call: nodes among its arguments are ``Value``s, batch sizes ``BatchSize``s.

    ``dtype`` is that of the first result, ``dtypes`` are those of all.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: Shape
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]

    def get(self, position: int, keyword: str, default: Any = None) -> Any:
        """Return an argument given by position or keyword, or its default."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)

    @property
    def first(self) -> Value:
        """Return the first argument, a value."""
        value: Value = self.args[0]
        return value


# The name of the result, or of each of several.
Rule = Callable[[Emitter, Call], str | list[str]]

# What ONNX Runtime's CPU provider, or ONNX, lacks; and what to compute in instead.
_FP32: Final = {torch.bfloat16: torch.float32}
_INT32: Final = {torch.int8: torch.int32, torch.uint8: torch.int32, torch.int16: torch.int32}
_NO_DOUBLE: Final = {**_FP32, torch.float64: torch.float32}


def in_fp32(rule: Rule) -> Rule:
    """Return ``rule``, computed in fp32 around an operator that does not take bf16 in opset 20."""
    return computed_in(_FP32, rule)


def in_int32(rule: Rule) -> Rule:
    """Return ``rule``, computed in int32 where ONNX Runtime has no kernel for smaller integers.

    Exact: results are cut to their low bits, as torch does.
    """
    return computed_in(_INT32, rule)


def without_double(rule: Rule) -> Rule:
    """Return ``rule``, computed in fp32 where ONNX Runtime has no kernel for fp64."""
    return computed_in(_NO_DOUBLE, rule)


def computed_in(instead: Mapping[torch.dtype, torch.dtype], rule: Rule) -> Rule:
    """Return ``rule``, whose values of a dtype of ``instead`` are computed in the dtype there.

    Results are rounded to the dtypes that the call has.
    """

    def other(emitter: Emitter, call: Call) -> str | list[str]:
        args, kwargs = (_cast(emitter, item, instead) for item in (call.args, call.kwargs))
        dtype = instead.get(call.dtype, call.dtype)
        made = rule(emitter, replace(call, args=args, kwargs=kwargs, dtype=dtype))
        names = [made] if isinstance(made, str) else made
        cast = [
            emitter.cast(name, own) if own in instead else name
            for name, own in zip(names, call.dtypes, strict=True)
        ]
        return cast[0] if isinstance(made, str) else cast

    return other


def _cast(emitter: Emitter, item: Any, instead: Mapping[torch.dtype, torch.dtype]) -> Any:
    if isinstance(item, (tuple, list)):
        return tuple(_cast(emitter, part, instead) for part in item)
    if isinstance(item, dict):
        return {key: _cast(emitter, part, instead) for key, part in item.items()}
    if not isinstance(item, Value) or item.dtype not in instead:
        return item
    dtype = instead[item.dtype]
    return Value(emitter.cast(emitter.use(item), dtype), item.shape, dtype)


def axis_of(axis: int, rank: int) -> int:
    """Return ``axis`` counted from the front."""
    return axis % rank if rank else 0
