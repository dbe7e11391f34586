"""Compute the step-invariant part of a model once per generation, and notice when it must be again.

The pipelines hand over the same prompt embeddings at every step. Should they not, or should they
have been written to, what depends on them is computed anew: the result is exact either way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ditfastattn.passes.caches import written_slots
from ditfastattn.passes.capture import CapturedGraph
from ditfastattn.passes.hoist_invariants import find_invariants, prologue
from ditfastattn.runtime.lowering import Lowering, RunnableGraph, lower


@dataclass
class Hoisted:
    """Hold a generation's step-invariant values, and the inputs that they were computed from."""

    values: dict[str, Tensor] = field(default_factory=dict)
    sources: list[tuple[Tensor, int]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget them."""
        self.values.clear()
        self.sources.clear()


class Prologue:
    """Compute step-invariant values: of one captured graph, for any generation."""

    def __init__(
        self,
        captured: CapturedGraph,
        varying: Collection[int],
        lowering: Lowering,
        inductor: dict[str, Any],
    ) -> None:
        """Find what to hoist; it is lowered when first needed."""
        self.nodes = find_invariants(captured, varying)
        self._captured, self._lowering, self._inductor = captured, lowering, inductor
        self._watched = [
            index
            for index, entry in enumerate(captured.inputs)
            if index not in varying and not entry.static
        ]
        self._slots: tuple[str, ...] = ()
        self._run: RunnableGraph | None = None

    def values(self, hoisted: Hoisted, tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Return the values for a step on ``tensors``, computed unless ``hoisted`` has them."""
        if not self.nodes:
            return hoisted.values
        now = [(tensors[index], _version(tensors[index])) for index in self._watched]
        if hoisted.sources and all(
            before is after and version == was and was >= 0
            for (before, was), (after, version) in zip(hoisted.sources, now, strict=True)
        ):
            return hoisted.values
        if self._run is None:
            module = prologue(self._captured, self.nodes)
            self._slots = written_slots(module.graph)
            self._run = lower(module, tensors, self._lowering, self._inductor)
        hoisted.values = dict(zip(self._slots, self._run(tensors), strict=True))
        hoisted.sources = now
        return hoisted.values


def _version(tensor: Tensor) -> int:
    """Return the count of writes to ``tensor``; -1 in inference mode, which does not count them."""
    return -1 if tensor.is_inference() else tensor._version
