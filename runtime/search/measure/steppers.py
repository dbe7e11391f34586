"""Step a generation dense, or by a plan, with graphs run uncompiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.passes.analysis.flops import Flops, count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.slots import Slot, read_slots, written_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.step_program import StepProgram
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.pipeline import rewrite, unroll_available
from ditfastattn.passes.windows.lower_window_attention import WindowKernel
from ditfastattn.passes.windows.lower_windows import lower_windows
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.search.measure.session import Outputs, Session

Rows = Sequence[Sequence[Strategy]]


@dataclass(frozen=True)
class EagerVariant:
    """Hold a rewritten step variant, its cache slots in order, and its operations."""

    module: GraphModule
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    flops: Flops


class Variants:
    """Rewrite each step variant once, for all plans that a search tries."""

    def __init__(self, session: Session) -> None:
        """Take the session whose graph is rewritten."""
        self.session = session
        self.results = len(outputs(session.captured.module.graph))
        self._known: dict[tuple[Any, ...], EagerVariant] = {}

    def get(
        self, actions: tuple[SiteAction, ...], sites: Sequence[Site] | None = None
    ) -> EagerVariant:
        """Return the variant that does ``actions``, one per site of ``sites``.

        The sites are the session's where None.
        """
        sites = self.session.sites if sites is None else sites
        key = (actions, tuple((site.window, site.cache_dtype) for site in sites))
        if key not in self._known:
            captured = self.session.captured
            module = rewrite(captured, sites, actions, self.session.layout, "search")
            reads, writes = read_slots(module.graph), written_slots(module.graph)
            flops = count_flops(module.graph)  # before windows are lowered to plain products
            lower_windows(module, WindowKernel.BLOCKS)  # FlexAttention needs compiling
            module.recompile()
            self._known[key] = EagerVariant(module, reads, writes, flops)
        return self._known[key]

    def programs(self, rows: Rows, merge_variants: bool = False) -> tuple[StepProgram, ...]:
        """Unroll the plan ``rows``, for each of a step's calls."""
        captured, sites = self.session.captured, self.session.sites
        return tuple(
            unroll_available(rows, captured, sites, merge_variants, call)
            for call in calls_of(self.session.layout)
        )

    def flops(self, rows: Rows, merge_variants: bool = False) -> Flops:
        """Count a whole generation by the plan ``rows``."""
        counts = [
            self.get(program.variants[variant], program.sites).flops
            for program in self.programs(rows, merge_variants)
            for variant in program.schedule
        ]
        return sum(counts, Flops(0, 0))


class DenseStepper:
    """Run every step dense; keep the model's outputs."""

    def __init__(self, session: Session) -> None:
        """Take the session."""
        self._module = session.captured.module
        self.outputs: list[Tensor] = []

    def step(self, args: Sequence[Tensor]) -> Outputs:
        """Run one step."""
        results: tuple[Any, ...] = tuple(self._module(*args))
        self.outputs.append(results[0].clone())
        return results


class PlanStepper:
    """Run a plan.

    ``known`` holds the model's outputs at the first calls, where the plan is dense: they are
    returned instead of computed, unless later steps read what such a call caches. Where the model
    does not run at every step, ``runs`` are the steps at which it is called.
    """

    def __init__(
        self,
        variants: Variants,
        rows: Rows,
        known: Sequence[Tensor] = (),
        runs: Sequence[int] | None = None,
    ) -> None:
        """Unroll ``rows``."""
        self._variants = variants
        self._runs = range(len(rows)) if runs is None else runs
        self._programs = variants.programs(rows)
        self._known = known
        self._caches = [Caches() for _ in self._programs]
        self._call = 0

    def step(self, args: Sequence[Tensor]) -> Outputs:
        """Run one call of a step."""
        call, self._call = self._call, self._call + 1
        run, branch = divmod(call, len(self._programs))
        at = self._runs[run]
        program, following = self._programs[branch], self._programs[branch + 1 :]
        adopted = [other.slots.adopted_at(at) for other in following]
        if call < len(self._known) and not program.slots.live_after(at) and not any(adopted):
            return (self._known[call],)
        results = self._variants.results
        variant = self._variants.get(program.variants[program.schedule[at]], program.sites)
        caches = self._caches[branch].read(program.slots, at, variant.reads, args[0].device, {})
        returned = variant.module(*args, *caches)
        written = dict(zip(variant.writes, returned[results:], strict=True))
        self._caches[branch].write(program.slots, at, written)
        for other, state, slots in zip(following, self._caches[branch + 1 :], adopted, strict=True):
            state.adopt(other.slots, at, {slot: written[slot] for slot in slots})
        return tuple(returned[:results])
