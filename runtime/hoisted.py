"""Hoist values out of the step loop: compute them once per generation, or once per timestep.

Pipelines hand over the same prompt embeddings at every step. If they do not, or if an embedding was
written to, the values that depend on it are computed again. Values that depend on the timestep
alone are the same in every generation of a schedule, until the weights they are computed from
change. Either way the result is exact.
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
from ditfastattn.passes.rewrites.hoist_invariants import (
    find_hoisted,
    hoisted_graph,
)
from ditfastattn.runtime.lowering import RunnableGraph, lower
from ditfastattn.runtime.options import BackendOptions

Values = Mapping[Slot, Tensor]
NO_VALUES: Values = MappingProxyType({})


class HoistedGraph:
    """Compute the values of one captured graph that do not depend on the ``varying`` inputs."""

    def __init__(
        self,
        captured: CapturedGraph,
        varying: Collection[int],
        options: BackendOptions,
        disabled: bool = False,
    ) -> None:
        """Find the values to hoist; the graph is lowered when first needed."""
        self.nodes = () if disabled else find_hoisted(captured, varying)
        self._options = options
        self._module = hoisted_graph(captured, self.nodes)
        self._slots = written_slots(self._module.graph)
        self._run: RunnableGraph | None = None
        self.flops: Flops = count_flops(self._module.graph)
        #: the memory that the values take
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
            # A CUDA graph would overwrite what its last run has returned, and that is kept.
            options = self._options
            inductor = {k: v for k, v in options.inductor.items() if k != "triton.cudagraphs"}
            self._run = lower(self._module, tensors, options.lowering, inductor, options.outline)
        return dict(zip(self._slots, self._run(tensors), strict=True))


@dataclass
class HoistedPerGeneration:
    """Values hoisted for one generation, and the inputs that they were computed from."""

    values: Values = field(default_factory=dict)
    sources: list[tuple[Tensor, int]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget them."""
        self.values, self.sources = NO_VALUES, []

    def at(self, graph: HoistedGraph, tensors: Sequence[Tensor]) -> Values:
        """Return the values for a step on ``tensors``, computed unless they are known."""
        if not graph.nodes:
            return NO_VALUES
        return self.of([tensors[i] for i in graph.arguments], lambda: graph(tensors))

    def of(self, arguments: Sequence[Tensor], compute: Callable[[], Values]) -> Values:
        """Return the values for ``arguments``; compute them where those are new or changed."""
        now = [(tensor, _version(tensor)) for tensor in arguments]
        unchanged = len(self.sources) == len(now) > 0 and all(
            before is after and version == was and was >= 0
            for (before, was), (after, version) in zip(self.sources, now, strict=True)
        )
        if not unchanged:
            self.values, self.sources = compute(), now
        return self.values


@dataclass
class HoistedPerTimestep:
    """Values hoisted for each timestep of a schedule, for all generations of one model."""

    steps: dict[int, tuple[Tensor, Values]] = field(default_factory=dict)
    weights: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)

    def at(
        self, graph: HoistedGraph, step: int, timestep: Tensor, tensors: Sequence[Tensor]
    ) -> Values:
        """Return the values of ``step``, computed unless they are known for ``timestep``."""
        if not graph.nodes:
            return NO_VALUES
        if step == 0 and not self._same_weights(graph, tensors):
            self.steps.clear()
            weights = (tensors[index] for index in graph.weights)
            self.weights = [(weakref.ref(weight), _version(weight)) for weight in weights]
        known = self.steps.get(step)
        if known is None or not _same_timestep(known[0], timestep):
            known = self.steps[step] = timestep.clone(), graph(tensors)
        return known[1]

    def _same_weights(self, graph: HoistedGraph, tensors: Sequence[Tensor]) -> bool:
        weights = [tensors[index] for index in graph.weights]
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
