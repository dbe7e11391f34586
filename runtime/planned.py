"""Run a model by a plan: what ``torch.compile`` calls in place of the model's graph.

One ``PlannedFunction`` stands for one graph that Dynamo made. It specializes on the shapes it is
called with; each ``Specialization`` holds a step program and its compiled variants. What changes
during a generation (clock, caches) lives in a ``Generation``, one per thread and model, so that
generations never share caches.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.core.env import read_knobs
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import fingerprint, hash_tensors
from ditfastattn.passes.analysis.flops import Flops, count_flops
from ditfastattn.passes.analysis.sites import SiteReport, attentions, find_sites
from ditfastattn.passes.capture.dynamo import (
    CapturedGraph,
    GraphInput,
    capture,
    describe_inputs,
    latent_position,
    plain_numbers,
)
from ditfastattn.passes.graph.ir import constant_tensors, graph_text, outputs, value
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.graph.verify import verify
from ditfastattn.passes.plan.schedule import NOTHING, StepProgram, lanes_of, unroll
from ditfastattn.passes.plan.schema import (
    Calibration,
    CfgLayout,
    Fingerprint,
    Plan,
    Sampler,
    Strategy,
)
from ditfastattn.passes.rewrites.hoist_invariants import FOLD_TIMESTEPS, HOIST_INVARIANTS
from ditfastattn.passes.rewrites.pipeline import SiteAction, rewrite, switches
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.clock import StepClock, read_timestep
from ditfastattn.runtime.invariants import FoldedTimesteps, Hoisted, Prologue
from ditfastattn.runtime.lowering import RunnableGraph, lower
from ditfastattn.runtime.matching import (
    check_lanes,
    input_shapes,
    planned_sites,
    split_as_planned,
    static_tensors,
    timestep_position,
)
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator

log = logging.getLogger(__name__)

_VariantKey = tuple[tuple[str, ...], tuple[SiteAction, ...], CfgLayout]
_registry: weakref.WeakSet[Specialization] = weakref.WeakSet()
_registry_lock = threading.Lock()


@dataclass(frozen=True)
class CompiledVariant:
    """Hold one lowered step variant and the cache slots it reads and writes, in order."""

    run: RunnableGraph
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flops: Flops


@dataclass(frozen=True)
class RunReport:
    """Report what a plan does to a model at one set of shapes.

    ``planned`` covers one generation, bookkeeping included; it is None until every variant of the
    plan has been compiled, which the first generation does. ``ahead_bytes`` are those of what the
    exact passes compute ahead and keep: of the generation, and of each of its timesteps.
    """

    plan: Plan
    sites: SiteReport
    variants: int
    peak_cache_bytes: int
    ahead_bytes: int
    dense: Flops
    planned: Flops | None


@dataclass
class LaneState:
    """Hold what one of a step's calls keeps between steps."""

    program: StepProgram
    caches: Caches = field(default_factory=Caches)
    hoisted: Hoisted = field(default_factory=Hoisted)

    def clear(self) -> None:
        """Forget the generation under way."""
        self.caches.clear()
        self.hoisted.clear()


@dataclass
class Generation:
    """Hold what changes during a generation: clock, caches of each lane, or a calibration.

    There are no lanes until there is a plan; two where guidance calls the model twice a step.
    """

    owner: weakref.ref[Tensor] | None
    identity: Fingerprint
    lanes: tuple[LaneState, ...] = ()
    clock: StepClock | None = None
    calibrator: GreedyCalibrator | None = None
    timesteps: list[float] = field(default_factory=list)
    folded: FoldedTimesteps = field(default_factory=FoldedTimesteps)
    latent: Tensor | None = None  # of the first call of the first step, where guidance is shared

    def reset(self) -> None:
        """Forget the generation under way; a calibration under way begins anew."""
        for lane in self.lanes:
            lane.clear()
        self.latent = None
        self.timesteps.clear()
        self.calibrator = None
        if self.clock is not None:
            self.clock.reset()


class PlannedFunction:
    """Run the graph that Dynamo captured by a plan, or calibrate one while running."""

    def __init__(self, module: GraphModule, options: BackendOptions) -> None:
        """Take the graph as Dynamo hands it to a backend."""
        self._module = module
        self._inputs: tuple[GraphInput, ...] = describe_inputs(module)
        self._dynamic = tuple(i for i, entry in enumerate(self._inputs) if not entry.static)
        self._numbers = any(entry.number for entry in self._inputs)
        self._options = options
        self._lock = threading.RLock()
        self._specializations: dict[tuple[Any, ...], Specialization] = {}

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run one step on the flat inputs of the graph."""
        plain = plain_numbers(self._inputs, args) if self._numbers else args
        tensors = [argument for argument in plain if isinstance(argument, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ConfigError(
                "the ditfastattn backend runs inference only",
                where="a call with gradients enabled",
                remedy="call the model under torch.no_grad()",
            )
        return self._specialize(plain).step(tensors)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """Return what has been specialized so far."""
        return tuple(self._specializations.values())

    def _specialize(self, args: Sequence[Any]) -> Specialization:
        # Dynamo guards the static inputs; only the call's own tensors tell shapes apart.
        key = tuple(
            (argument.shape, argument.dtype, argument.device)
            if isinstance(argument, Tensor)
            else argument
            for argument in (args[index] for index in self._dynamic)
        )
        found = self._specializations.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._specializations:
                captured = capture(self._module, self._inputs, args)
                self._specializations[key] = specialization_of(captured, self._options)
            return self._specializations[key]


class Specialization:
    """Hold everything for one set of input shapes."""

    def __init__(self, captured: CapturedGraph, options: BackendOptions, identity: str) -> None:
        """Find the sites of ``captured``; programs and variants are made when first needed."""
        self._results = len(outputs(captured.module.graph))
        verify(captured.module, len(captured.inputs), self._results, "capture")
        whole = find_sites(captured)
        self._whole_sites = whole.sites  # of the model, whatever a plan splits
        self.captured = captured
        if options.plan is not None and not options.dense:
            self.captured = split_as_planned(options.plan, captured, whole.sites)
        self.identity = identity
        split = self.captured is not captured
        self.report: SiteReport = find_sites(self.captured) if split else whole
        self.options = options
        self.plans: dict[Fingerprint, Plan] = {}
        # A dense run needs no clock.
        captured = self.captured
        self.timestep = -1 if options.dense else timestep_position(captured, options.timestep)
        self._latent = latent_position(captured)
        self._prologue = self._make_prologue(HOIST_INVARIANTS, {self.timestep, self._latent})
        arguments = {i for i, entry in enumerate(captured.inputs) if not entry.static}
        self._timestep_prologue = self._make_prologue(FOLD_TIMESTEPS, arguments - {self.timestep})
        self._attentions = attentions(self.report.sites)
        self._variants: dict[_VariantKey, CompiledVariant] = {}
        self._programs: dict[Fingerprint, tuple[StepProgram, ...]] = {}
        self._owner = next((i for i, entry in enumerate(captured.inputs) if entry.static), None)
        self._lock = threading.RLock()
        self._threads = threading.local()
        self._log_sites()

    def _make_prologue(self, name: str, varying: Collection[int | None]) -> Prologue:
        """Return the prologue of the pass ``name``, which hoists nothing where it is disabled."""
        runs_dense = self.options.dense or not self.report.sites
        disabled = runs_dense or name in switches().off
        positions = {index for index in varying if index is not None}
        return Prologue(self.captured, positions, self.options, disabled)

    def step(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run one step on the flat tensor inputs."""
        if self.options.dense or not self.report.sites:
            dense = self._variant(NOTHING, (), CfgLayout.NONE, tensors, lambda _: [])
            return tuple(dense.run(tensors))
        generation = self.generation(tensors)
        try:
            if not generation.lanes:
                return self._calibrate(generation, tensors)
            return self._run_planned(generation, tensors)
        except BaseException:
            generation.reset()
            raise

    def generation(self, tensors: Sequence[Tensor]) -> Generation:
        """Return this thread's generation of the model whose parameters are in ``tensors``."""
        owner = None if self._owner is None else tensors[self._owner]
        known = self._generations()
        found = known.get(id(owner))
        if found is not None and (found.owner is None or found.owner() is owner):
            return found
        static = static_tensors(self.captured, tensors)
        identity = fingerprint(self.captured, self._whole_sites, static)
        made = Generation(None if owner is None else weakref.ref(owner), identity)
        plan = self.options.plan or self.plans.get(identity)
        if plan is not None:
            self._begin_plan(made, plan)
        known[id(owner)] = made
        return made

    def _generations(self) -> dict[int, Generation]:
        known: dict[int, Generation] = self._threads.__dict__.setdefault("generations", {})
        return known

    def reset(self) -> None:
        """Forget the generations under way in this thread."""
        for generation in self._generations().values():
            generation.reset()

    def reports(self) -> list[RunReport]:
        """Report each plan in force."""
        items = list(self._programs.items())
        return [self._report(self.plans[model], programs) for model, programs in items]

    def _report(self, plan: Plan, programs: Sequence[StepProgram]) -> RunReport:
        layout, calls = plan.sampler.cfg_layout, plan.sampler.steps * len(programs)
        keys = [(p.names, p.variants[v], layout) for p in programs for v in p.schedule]
        counts = [self._variants.get(key) for key in keys]
        flops = [variant.flops for variant in counts if variant is not None]
        once = self._prologue.flops.times(len(programs))
        return RunReport(
            plan=plan,
            sites=self.report,
            variants=len({row for program in programs for row in program.variants}),
            peak_cache_bytes=sum(program.peak_cache_bytes for program in programs),
            ahead_bytes=self._ahead_bytes(plan, programs),
            dense=count_flops(self.captured.module.graph).times(calls),
            planned=sum(flops, once) if len(flops) == calls else None,
        )

    def _ahead_bytes(self, plan: Plan, programs: Sequence[StepProgram]) -> int:
        once, each = self._prologue.bytes, self._timestep_prologue.bytes
        return len(programs) * once + plan.sampler.steps * each

    def calibrating(self) -> Generation:
        """Return this thread's generation under calibration."""
        for generation in self._generations().values():
            if generation.calibrator is not None:
                return generation
        raise ConfigError(
            "nothing was calibrated",
            where="calibrate(pipeline)",
            got=f"{len(self._attentions)} attention sites",
            remedy="see the log for the attention nodes that were declined, and why",
        )

    def finish(
        self, generation: Generation, sampler: Sampler | None = None, seed: int | None = None
    ) -> Plan:
        """End a calibration; keep and return its plan."""
        calibrator = generation.calibrator
        if calibrator is None or not calibrator.strategies:
            raise ConfigError("no step has been calibrated", remedy="run a generation first")
        plan = Plan(
            model=generation.identity,
            inputs=input_shapes(self.captured),
            sampler=sampler or self._plain_sampler(generation),
            sites=tuple(site.planned() for site in self._attentions),
            strategies=tuple(calibrator.strategies),
            calibration=Calibration(
                method="greedy",
                strength=self.options.threshold,
                seed=seed,
                batch=value(outputs(self.captured.module.graph)[0]).shape[0],
                forwards=round(calibrator.forwards, 1),
                seconds=round(calibrator.seconds, 1),
                versions={"torch": torch.__version__},
            ),
        )
        self.plans[generation.identity] = plan
        generation.reset()
        return plan

    def _plain_sampler(self, generation: Generation) -> Sampler:
        return Sampler(
            steps=len(generation.timesteps),
            timesteps=tuple(generation.timesteps),
            cfg_layout=self.options.cfg_layout,
        )

    def _calibrate(self, generation: Generation, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        now = read_timestep(tensors[self.timestep]).value()
        if generation.timesteps == [now]:
            raise ConfigError(
                "two calls in a row came with the first timestep",
                where=f"argument {self.options.timestep!r}",
                got=now,
                expected="one call per step, and more than one step",
                remedy="batch the guidance in one call; options={'dense': True} where there is "
                "one step only",
            )
        if generation.timesteps and _begins_anew(now, generation.timesteps):
            plan = self.finish(generation)
            log.warning("ditfastattn: calibrated: %s", summary(plan))
            self._begin_plan(generation, plan)
            return self._run_planned(generation, tensors)
        if generation.calibrator is None:
            self._announce_calibration()
            generation.calibrator = GreedyCalibrator(
                self.captured,
                self._attentions,
                self.options.cfg_layout,
                self.options.threshold,
                self.options.steps,
                self.options.on_progress,
            )
        generation.timesteps.append(now)
        return generation.calibrator.step(tensors)

    def _announce_calibration(self) -> None:
        if self.options.on_progress is not None:
            return
        guidance = (
            "guidance is not shared, since options={'cfg_layout': ...} does not say its order"
            if self.options.cfg_layout is CfgLayout.NONE
            else f"guidance is batched, {self.options.cfg_layout}"
        )
        log.warning(
            "ditfastattn: no plan was given: this first generation calibrates one at threshold %g "
            "and is slower; %s",
            self.options.threshold,
            guidance,
        )

    def _begin_plan(self, generation: Generation, plan: Plan) -> None:
        lanes = lanes_of(plan.sampler.cfg_layout)
        with self._lock:
            programs = self._programs.get(generation.identity)
            if programs is None:
                sites = planned_sites(plan, self.captured, self.report.sites, generation.identity)
                programs = tuple(
                    unroll(plan.strategies, self.captured, sites, plan.merge_variants, lane)
                    for lane in lanes
                )
                self._programs[generation.identity] = programs
                self._log_program(plan, programs)
        generation.lanes = tuple(map(LaneState, programs))
        calls = [timestep for timestep in plan.sampler.timesteps for _ in lanes]
        generation.clock = StepClock(calls, f"argument {self.options.timestep!r}")
        self.plans[generation.identity] = plan

    def _run_planned(self, generation: Generation, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        assert generation.clock is not None
        call = generation.clock.tick(read_timestep(tensors[self.timestep]))
        step, number = divmod(call, len(generation.lanes))
        lane, following = generation.lanes[number], generation.lanes[number + 1 :]
        program, caches = lane.program, lane.caches
        if step == 0:
            lane.clear()
            self._check_latents(generation, tensors, number)
        layout = self.plans[generation.identity].sampler.cfg_layout
        actions = program.variants[program.schedule[step]]

        hoisted = lane.hoisted.at(self._prologue, tensors)
        timestep = tensors[self.timestep]
        folded = generation.folded.at(self._timestep_prologue, step, timestep, tensors)
        invariants = {**hoisted, **folded}

        def read(slots: Sequence[str]) -> list[Tensor]:
            return caches.read(program, step, slots, tensors[0].device, invariants)

        variant = self._variant(program, actions, layout, tensors, read)
        returned = variant.run([*tensors, *read(variant.reads)])
        written = dict(zip(variant.writes, returned[self._results :], strict=True))
        caches.write(program, step, written)
        for other in following:
            adopted = other.program.adopted_at(step)
            other.caches.adopt(other.program, step, {slot: written[slot] for slot in adopted})
        return tuple(returned[: self._results])

    def _check_latents(
        self, generation: Generation, tensors: Sequence[Tensor], number: int
    ) -> None:
        """Refuse to share guidance between different images; once a generation, as it may wait."""
        if self._latent is None or not generation.lanes[0].program.shares_cfg:
            return
        latent, name = tensors[self._latent], self.captured.inputs[self._latent].name
        if len(generation.lanes) == 1:
            first, second = latent.tensor_split(2)
            check_lanes(first, second, name)
        elif number == 0:
            generation.latent = latent.clone()
        else:
            assert generation.latent is not None
            check_lanes(generation.latent, latent, name)
            generation.latent = None

    def _variant(
        self,
        program: StepProgram,
        actions: tuple[SiteAction, ...],
        layout: CfgLayout,
        tensors: Sequence[Tensor],
        read: Callable[[Sequence[str]], list[Tensor]],
    ) -> CompiledVariant:
        key = (program.names, actions, layout)
        found = self._variants.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._variants:
                label = f"variant-{len(self._variants):02d}"
                once, folded = self._prologue.nodes, self._timestep_prologue.nodes
                module = rewrite(self.captured, program.sites, actions, layout, label, once, folded)
                reads, writes = read_slots(module.graph), written_slots(module.graph)
                example = [*tensors, *read(reads)]
                flops = count_flops(module.graph)
                options = self.options
                run = lower(module, example, options.lowering, options.inductor, options.outline)
                self._variants[key] = CompiledVariant(run, reads, writes, flops)
            return self._variants[key]

    def _log_sites(self) -> None:
        log.info(
            "find-sites: %d found, %d declined", len(self.report.sites), len(self.report.declined)
        )
        for declined in self.report.declined:
            log.debug("find-sites: declined %s: %s", declined.name, declined.reason)
        for site in self.report.sites:
            for strategy, reason in site.declined.items():
                log.debug("find-sites: %s: no %s: %s", site.name, strategy, reason)
        if not self.report.sites:
            log.warning("ditfastattn: no attention site was found: the model runs dense")

    def _log_program(self, plan: Plan, programs: Sequence[StepProgram]) -> None:
        log.info(
            "unroll: %d steps, %d variants, %d cache slots, at most %.1f MiB of caches, "
            "%.1f MiB computed ahead",
            plan.sampler.steps,
            sum(len(program.variants) for program in programs),
            sum(len(program.slots) for program in programs),
            sum(program.peak_cache_bytes for program in programs) / 2**20,
            self._ahead_bytes(plan, programs) / 2**20,
        )
        log.info("plan: %s", summary(plan))
        if plan.changed == 0:
            log.warning("ditfastattn: the plan changes nothing: every step runs full attention")


def specialization_of(captured: CapturedGraph, options: BackendOptions) -> Specialization:
    """Return the specialization of this very graph and options, if there is one already.

    Dynamo makes another graph when a batch size changes; at equal shapes both are the same, and a
    generation may be handed from one to the other.
    """
    constants = hash_tensors(constant_tensors(captured.module))
    text = graph_text(captured.module.graph)
    identity = f"{captured.inputs}\n{constants}\n{read_knobs()}\n{text}"
    with _registry_lock:
        for found in list(_registry):
            if found.identity == identity and found.options == options:
                return found
        made = Specialization(captured, options, identity)
        _registry.add(made)
        return made


def summary(plan: Plan) -> str:
    """Count the strategies of ``plan`` in one line."""
    counts = Counter(strategy for row in plan.strategies for strategy in row)
    parts = [f"{counts[strategy]} {strategy}" for strategy in Strategy if counts[strategy]]
    return f"{plan.sampler.steps} steps x {len(plan.sites)} sites: {', '.join(parts)}"


def reports() -> list[RunReport]:
    """Report every plan in force in this process, at each set of input shapes."""
    return [report for found in list(_registry) for report in found.reports()]


def reset() -> None:
    """Forget the generations under way in this thread, for example after an interrupted one."""
    for found in list(_registry):
        found.reset()


def _begins_anew(now: float, earlier: Sequence[float]) -> bool:
    return now == earlier[0] or now > earlier[-1]
