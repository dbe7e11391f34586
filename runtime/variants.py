"""The compiled step variants of one captured graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditfastattn.passes.analysis.flops import Flops, count_flops
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.slots import Slot, read_slots, written_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.step_program import NOTHING, StepProgram
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.runtime.call_order import Call
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.hoisted import HoistedGraph
from ditfastattn.runtime.lowering import RunnableGraph, lower
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.unrolled import UnrolledPlan

_Key = tuple[tuple[str, ...], tuple[SiteAction, ...], CfgLayout]


@dataclass(frozen=True)
class CompiledVariant:
    """One lowered step variant, and the cache slots it reads and writes, in order."""

    run: RunnableGraph
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    flops: Flops


class CompiledVariants:
    """Run the steps of a graph; each distinct one is rewritten and lowered when first needed."""

    def __init__(
        self,
        captured: CapturedGraph,
        hoisted: HoistedGraph,
        options: BackendOptions,
    ) -> None:
        """Take the graph, and the graph of the values that are hoisted out of it."""
        self._captured, self._options = captured, options
        self._hoisted = hoisted.nodes
        self._results = len(outputs(captured.module.graph))
        self._lock = threading.RLock()
        self._known: dict[_Key, CompiledVariant] = {}

    def run_dense(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run one step in full on the flat ``tensors``."""
        dense = self._compiled(NOTHING, (), CfgLayout.NONE, tensors, lambda _: [])
        return tuple(dense.run(tensors))

    def run(
        self,
        plan: UnrolledPlan,
        generation: Generation,
        call: Call,
        hoisted: Mapping[Slot, Tensor],
        tensors: Sequence[Tensor],
    ) -> tuple[Any, ...]:
        """Run ``call`` by ``plan`` on the flat ``tensors``; its caches are of ``generation``."""

        def read(slots: Sequence[Slot]) -> list[Tensor]:
            return generation.read(call, slots, tensors[0].device, hoisted)

        phase = plan.phase(call.phase)
        program, layout = phase.programs[call.branch], phase.layout
        actions = program.variants[program.schedule[generation.step_in_phase(call)]]
        variant = self._compiled(program, actions, layout, tensors, read)
        returned = variant.run([*tensors, *read(variant.reads)])
        kept = dict(zip(variant.writes, returned[self._results :], strict=True))
        generation.write(call, kept, returned[0])
        return tuple(returned[: self._results])

    def _compiled(
        self,
        program: StepProgram,
        actions: tuple[SiteAction, ...],
        layout: CfgLayout,
        tensors: Sequence[Tensor],
        read: Callable[[Sequence[Slot]], list[Tensor]],
    ) -> CompiledVariant:
        """Return the variant of ``actions``; an example of its inputs is ``tensors``, then caches.

        ``read`` returns what cache slots hold.
        """
        key = (program.names, actions, layout)
        found = self._known.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._known:
                label = f"variant-{len(self._known):02d}"
                module = rewrite(
                    self._captured, program.sites, actions, layout, label, self._hoisted
                )
                reads, writes = read_slots(module.graph), written_slots(module.graph)
                example = [*tensors, *read(reads)]
                flops = count_flops(module.graph)
                options = self._options
                run = lower(module, example, options.lowering, options.inductor, options.outline)
                self._known[key] = CompiledVariant(run, reads, writes, flops)
            return self._known[key]

    def flops(self, unrolled: UnrolledPlan) -> list[Flops]:
        """Return the FLOPs of each call of a generation whose variant has been compiled."""
        keys = [
            (program.names, program.variants[variant], phase.layout)
            for phase in unrolled.phases
            for program in phase.programs
            for variant in program.schedule
        ]
        found = (self._known.get(key) for key in keys)
        return [variant.flops for variant in found if variant is not None]
