"""Define what a rule takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ditfastattn.export.batch import Shape
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.passes.graph.ir import aten

__all__ = ["Call", "Emitter", "Rule", "Value", "aten", "axis_of", "in_fp32"]


@dataclass(frozen=True)
class Call:
    """Describe one call: nodes among its arguments are ``Value``s, batch sizes ``BatchSize``s."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: Shape
    dtype: torch.dtype

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


def in_fp32(rule: Rule) -> Rule:
    """Return ``rule``, computed in fp32 around an operator that does not take bf16 in opset 20.

    Of several results, the first has the dtype of the call.
    """

    def wide(emitter: Emitter, call: Call) -> str | list[str]:
        if call.dtype != torch.bfloat16:
            return rule(emitter, call)
        args = tuple(_widened(emitter, item) for item in call.args)
        made = rule(emitter, replace(call, args=args, dtype=torch.float32))
        if isinstance(made, str):
            return emitter.cast(made, call.dtype)
        return [emitter.cast(made[0], call.dtype), *made[1:]]

    return wide


def _widened(emitter: Emitter, item: Any) -> Any:
    if isinstance(item, tuple):
        return tuple(_widened(emitter, part) for part in item)
    if not isinstance(item, Value) or item.dtype != torch.bfloat16:
        return item
    return Value(emitter.cast(emitter.use(item), torch.float32), item.shape, torch.float32)


def axis_of(axis: int, rank: int) -> int:
    """Return ``axis`` counted from the front."""
    return axis % rank if rank else 0
