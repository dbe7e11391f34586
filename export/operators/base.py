"""Define what a rule takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ditfastattn.export.batch import Shape
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.passes.graph.ir import aten

__all__ = ["Call", "Emitter", "Rule", "Value", "aten", "axis_of"]


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


def axis_of(axis: int, rank: int) -> int:
    """Return ``axis`` counted from the front."""
    return axis % rank if rank else 0
