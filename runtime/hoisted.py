"""Hoist values out of the step loop: compute them once per generation.

Pipelines hand over the same prompt embeddings at every step. If they do not, or if an embedding or
a weight was written to, the values that depend on it are computed again, so the result is exact.

No value that depends on a weight outlives its generation: no counter sees what is written through
``parameter.data``, so only the next generation is sure to compute with what the model then holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.flops import Flops, count_flops
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs, value
from ditfastattn.passes.graph.slots import Slot, written_slots
from ditfastattn.passes.rewrites.hoist_invariants import (
    find_hoisted,
    hoisted_graph,
)
from ditfastattn.runtime.clock import TimestepReader, read_timestep
from ditfastattn.runtime.lowering import RunnableGraph, lower
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.writes import counted_writes

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


class _Source:
    """Notice another tensor in the place of one, and writes to it.

    Inference mode does not count writes: there the content is compared, if it is ``copied``.
    """

    def __init__(self, tensor: Tensor, copied: bool) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = counted_writes(tensor), tensor.data_ptr()  # `parameter.data = other` moves it
        self._copy = tensor.clone() if copied and tensor.is_inference() else None

    def is_known(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` is the one known, and no counted write has changed it."""
        state = counted_writes(tensor), tensor.data_ptr()
        return self._tensor() is tensor and self._state == state

    def differs(self, tensor: Tensor) -> TimestepReader | None:
        """Begin to compare the content; None where counting writes is enough."""
        if self._copy is None:
            return None
        bits = _BITS.get(tensor.dtype.itemsize, tensor.dtype)  # NaN is like itself
        return read_timestep((self._copy.view(bits) != tensor.view(bits)).any())


@dataclass
class HoistedPerGeneration:
    """Values hoisted for one generation, and what they were computed from."""

    values: Values = field(default_factory=dict)
    _arguments: list[_Source] = field(default_factory=list)
    _weights: list[_Source] = field(default_factory=list)
    _comparing: list[TimestepReader] = field(default_factory=list)  # on a device, not to wait

    def clear(self) -> None:
        """Forget them."""
        self.values, self._arguments, self._weights = NO_VALUES, [], []

    def at(self, graph: HoistedGraph, tensors: Sequence[Tensor]) -> Values:
        """Return the values for a step on ``tensors``, computed unless they are known."""
        if not graph.nodes:
            return NO_VALUES
        arguments = [tensors[i] for i in graph.arguments]
        weights = [tensors[i] for i in graph.weights]
        return self.of(arguments, lambda: graph(tensors), weights)

    def of(
        self,
        arguments: Sequence[Tensor],
        compute: Callable[[], Values],
        weights: Sequence[Tensor] = (),
    ) -> Values:
        """Return the values for ``arguments``; compute them where any tensor is new or changed.

        Raises:
            ConfigError: on a device, an argument was written to in inference mode.
        """
        self._check_compared()
        if not self._are_known(arguments, weights):
            self.values = compute()
            self._arguments = [_Source(tensor, copied=True) for tensor in arguments]
            self._weights = [_Source(tensor, copied=False) for tensor in weights]
        return self.values

    def _are_known(self, arguments: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
        known = [*self._arguments, *self._weights]
        now = [*arguments, *weights]
        if not self._arguments or len(known) != len(now):
            return False
        pairs = list(zip(known, now, strict=True))
        if not all(source.is_known(tensor) for source, tensor in pairs):
            return False
        found = [source.differs(tensor) for source, tensor in pairs]
        compared = [reader for reader in found if reader is not None]
        if any(reader.ready() and reader.value() for reader in compared):
            return False
        self._comparing += [reader for reader in compared if not reader.ready()]
        return True

    def _check_compared(self) -> None:
        while self._comparing and self._comparing[0].ready():
            if self._comparing.pop(0).value():
                self._comparing.clear()
                raise ConfigError(
                    "a condition was written to in the middle of a generation",
                    where="a call in inference mode, which does not count writes",
                    remedy="hand over a new tensor, or use torch.no_grad()",
                )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
