"""Compute ahead what a step need not: once per generation, or once per timestep and model.

The pipelines hand over the same prompt embeddings at every step. Should they not, or should they
have been written to, what depends on them is computed anew. What depends on the timestep alone is
the same in every generation of a schedule, until the weights it is computed from change. Either
way the result is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ditfastattn.passes.analysis.flops import Flops, count_flops
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs, value
from ditfastattn.passes.graph.slots import Slot, written_slots
from ditfastattn.passes.rewrites.hoist_invariants import find_invariants, prologue
from ditfastattn.runtime.lowering import RunnableGraph, lower
from ditfastattn.runtime.options import BackendOptions

Values = Mapping[Slot, Tensor]
NO_VALUES: Values = MappingProxyType({})


class Prologue:
    """Compute the values of one captured graph that do not depend on the ``varying`` inputs."""

    def __init__(
        self,
        captured: CapturedGraph,
        varying: Collection[int],
        options: BackendOptions,
        disabled: bool = False,
    ) -> None:
        """Find what to compute ahead; it is lowered when first needed."""
        self.nodes = () if disabled else find_invariants(captured, varying)
        self._options = options
        self._module = prologue(captured, self.nodes)
        self._slots = written_slots(self._module.graph)
        self._run: RunnableGraph | None = None
        self.flops: Flops = count_flops(self._module.graph)
        #: how much memory the values take
        self.bytes = sum(value(node).nbytes for node in outputs(self._module.graph))
        used = [bool(node.users) for node in self._module.graph.find_nodes(op="placeholder")]
        entries = list(enumerate(captured.inputs))
        self.weights = [index for index, entry in entries if entry.static and used[index]]
        self.arguments = [
            index for index, entry in entries if not entry.static and index not in varying
        ]

    def __call__(self, tensors: Sequence[Tensor]) -> Values:
        """Return the value of each slot for a step on the flat ``tensors``."""
        if self._run is None:
            # A CUDA graph would write over what its last run has returned, and that is kept.
            options = self._options
            inductor = {k: v for k, v in options.inductor.items() if k != "triton.cudagraphs"}
            self._run = lower(self._module, tensors, options.lowering, inductor, options.outline)
        return dict(zip(self._slots, self._run(tensors), strict=True))


@dataclass
class Hoisted:
    """Hold a generation's step-invariant values, and the inputs that they were computed from."""

    values: Values = field(default_factory=dict)
    sources: list[tuple[Tensor, int]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget them."""
        self.values, self.sources = NO_VALUES, []

    def at(self, prologue: Prologue, tensors: Sequence[Tensor]) -> Values:
        """Return the values for a step on ``tensors``, computed unless they are known."""
        if not prologue.nodes:
            return NO_VALUES
        return self.of([tensors[i] for i in prologue.arguments], lambda: prologue(tensors))

    def of(self, arguments: Sequence[Tensor], compute: Callable[[], Values]) -> Values:
        """Return what was computed of ``arguments``, anew where they are others or changed."""
        now = [(tensor, _version(tensor)) for tensor in arguments]
        unchanged = len(self.sources) == len(now) > 0 and all(
            before is after and version == was and was >= 0
            for (before, was), (after, version) in zip(self.sources, now, strict=True)
        )
        if not unchanged:
            self.values, self.sources = compute(), now
        return self.values


@dataclass
class FoldedTimesteps:
    """Hold what each timestep alone decides, for all generations of one model."""

    steps: dict[int, tuple[Tensor, Values]] = field(default_factory=dict)
    weights: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)

    def at(
        self, prologue: Prologue, step: int, timestep: Tensor, tensors: Sequence[Tensor]
    ) -> Values:
        """Return the values of ``step``, computed unless they are known for ``timestep``."""
        if not prologue.nodes:
            return NO_VALUES
        if step == 0 and not self._same_weights(prologue, tensors):
            self.steps.clear()
            weights = (tensors[index] for index in prologue.weights)
            self.weights = [(weakref.ref(weight), _version(weight)) for weight in weights]
        known = self.steps.get(step)
        if known is None or not _same_timestep(known[0], timestep):
            known = self.steps[step] = timestep.clone(), prologue(tensors)
        return known[1]

    def _same_weights(self, prologue: Prologue, tensors: Sequence[Tensor]) -> bool:
        weights = [tensors[index] for index in prologue.weights]
        return len(weights) == len(self.weights) and all(
            reference() is weight and was == _version(weight) >= 0
            for (reference, was), weight in zip(self.weights, weights, strict=True)
        )


def _same_timestep(known: Tensor, timestep: Tensor) -> bool:
    """Compare on the host; on a device, where that would wait, trust the clock for one number."""
    if timestep.device.type == "cpu":
        return torch.equal(known, timestep)
    return timestep.dim() == 0 or timestep.numel() == 1 or not any(timestep.stride())


def _version(tensor: Tensor) -> int:
    """Return the count of writes to ``tensor``; -1 in inference mode, which does not count them."""
    return -1 if tensor.is_inference() else tensor._version
