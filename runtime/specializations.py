"""Everything for one captured graph and one set of options; equal ones are shared.

A ``Specialization`` holds the sites of its graph, the step programs of the plans in force and the
compiled variants. What changes during a generation belongs to a thread and a model, and is kept
apart, so that generations never share caches.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ditfastattn.core.env import read_knobs
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import (
    Fingerprint,
    fingerprint,
    hash_tensors,
)
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.latent import latent_candidates
from ditfastattn.passes.analysis.site import attentions
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import constant_tensors, graph_text, outputs
from ditfastattn.passes.graph.verify import verify
from ditfastattn.passes.plan.legality import declined_strategies
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.rewrites.hoist_invariants import HOIST_PER_GENERATION
from ditfastattn.passes.rewrites.pipeline import switches
from ditfastattn.runtime.call_order import FIRST, Call, OtherCallsError
from ditfastattn.runtime.calls import InterleavedError
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.current_generation import explicit_generation, named_generation, shown
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.halves import warn_of_unchecked_latents
from ditfastattn.runtime.hoisted import HoistedGraph
from ditfastattn.runtime.matching import (
    check_fingerprint,
    rows_of,
    split_as_planned,
    static_tensors,
    timestep_position,
    warn_of_unsampled_change,
)
from ditfastattn.runtime.model_state import ModelState, ModelStates
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.reports import RunReport, log_plan, run_report, summary
from ditfastattn.runtime.seen_weights import SeenWeights
from ditfastattn.runtime.self_calibration import SelfCalibration
from ditfastattn.runtime.unrolled import UnrolledPlan, unroll_plan
from ditfastattn.runtime.variants import CompiledVariants

log = logging.getLogger(__name__)

_registry: weakref.WeakSet[Specialization] = weakref.WeakSet()
_registry_lock = threading.Lock()


class Specialization:
    """Run one captured graph by plans, or calibrate them."""

    def __init__(self, captured: CapturedGraph, options: BackendOptions, identity: str) -> None:
        """Find the sites of ``captured``; programs and variants are made when first needed."""
        results = len(outputs(captured.module.graph))
        verify(captured.module, len(captured.inputs), results, "capture")
        whole = find_sites(captured)
        self._whole_sites = whole.sites  # of the model, whatever a plan splits
        self.captured = captured
        if options.plan is not None and not options.dense:
            self.captured = split_as_planned(options.plan, captured, whole.sites)
        self.identity = identity
        split = self.captured is not captured
        self.report: SiteReport = find_sites(self.captured) if split else whole
        self.options = options
        captured = self.captured
        # A dense run needs no clock.
        self._timestep = -1 if options.dense else timestep_position(captured, options.timestep)
        self._latents = latent_candidates(captured)
        varying = {self._timestep, *self._latents}
        self._conditions = [i for i in captured.dynamic_positions if i not in varying]
        disabled = self._runs_dense or HOIST_PER_GENERATION in switches().off
        self._hoisted = HoistedGraph(captured, varying, options, disabled)
        self._variants = CompiledVariants(captured, self._hoisted, options)
        self._plans: dict[Fingerprint, UnrolledPlan] = {}
        self._owner = next((i for i, entry in enumerate(captured.inputs) if entry.static), None)
        self._lock = threading.RLock()
        self.models = ModelStates()
        _log_sites(self.report)

    @property
    def _runs_dense(self) -> bool:
        """Return whether there is no plan to run by, and none to find."""
        return self.options.dense or not (self.report.sites or self.options.plan)

    def step(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run one step on the flat tensor inputs."""
        if self._runs_dense:
            return self._variants.run_dense(tensors)
        model = self._model(tensors)
        try:
            if model.plan is None:
                return self._calibrate(model, tensors)
            return self._run_planned(model, model.plan, tensors)
        except InterleavedError:
            raise  # the generation under way goes on
        except BaseException:
            self._forget(model)
            raise

    def _model(self, tensors: Sequence[Tensor]) -> ModelState:
        try:
            return self.models.of(self._owner_of(tensors), lambda: self._meet(tensors))
        except ConfigError:  # other rows may be the better reason
            self._check_phase(tensors, read_timestep(tensors[self._timestep]).value())
            raise

    def _owner_of(self, tensors: Sequence[Tensor]) -> Tensor | None:
        return None if self._owner is None else tensors[self._owner]

    def _meet(self, tensors: Sequence[Tensor]) -> ModelState:
        """Return a new state of the model whose parameters are in ``tensors``."""
        static = static_tensors(self.captured, tensors)
        identity = fingerprint(self.captured, self._whole_sites, static)
        model = ModelState(identity, SeenWeights(static, self.options.check_weights))
        known = self._plans.get(model.identity)
        plan = known.plan if known is not None else self.options.plan
        if plan is not None:
            self._take_plan(model, plan, self._owner_of(tensors))
        return model

    def _meet_again(self, model: ModelState, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Begin a generation of a ``model`` whose weights have changed, as with another model."""
        owner = self._owner_of(tensors)
        self.models.forget(owner)
        if self.models.of(owner, lambda: self._meet(tensors)).identity == model.identity:
            warn_of_unsampled_change()
        return self.step(tensors)

    def reset(self) -> None:
        """Forget the generations under way in this thread."""
        for model in self.models.here():
            self._forget(model)

    def _forget(self, model: ModelState) -> None:
        model.reset()
        if model.plan is not None:
            self._generation(model, model.plan).reset()

    def _generation(self, model: ModelState, plan: UnrolledPlan) -> Generation:
        """Return the state of the generation that the caller names, or of this thread's."""
        own, explicit = model.generation, explicit_generation()
        assert own is not None
        if explicit is None or own.on_trial:
            return own
        return explicit.state(plan.key, lambda: plan.generation(self._where))

    def _calibrate(self, model: ModelState, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        name = named_generation()
        anew = model.begins_anew(name)
        if model.calibration is None:
            sites = attentions(self.report.sites)
            model.calibration = SelfCalibration(self.captured, sites, self.options)
        now = read_timestep(tensors[self._timestep]).value()
        self._check_phase(tensors, now)
        latents = [tensors[index] for index in self._latents]
        if not model.calibration.is_complete(now, latents, anew, name is not None):
            return model.calibration.step(now, latents, tensors)
        plan = model.calibration.plan(model.identity)
        model.calibration = None
        log.warning("ditfastattn: calibrated: %s", summary(plan))
        taken = self._take_plan(model, plan, self._owner_of(tensors))
        return self._run_planned(model, taken, tensors)

    def _take_plan(self, model: ModelState, plan: Plan, owner: Tensor | None) -> UnrolledPlan:
        """Give ``model`` the plan; where several threads calibrate it, the first one's counts."""
        with self._lock:
            unrolled = self._plans.get(plan.model)
            if unrolled is None:
                unrolled = unroll_plan(plan, self.captured, self.report.sites, model.identity)
                unrolled = self._put_in_force(unrolled)
                log_plan(unrolled, self._hoisted_bytes(unrolled))
                if unrolled.shares_guidance and not self._latents:
                    warn_of_unchecked_latents(self.captured.dynamic_names)
            else:
                check_fingerprint(model.identity, plan.model)
        model.plan = unrolled
        shared = self._generation_elsewhere(unrolled, owner)
        on_trial = self.options.plan is None
        model.generation = shared or unrolled.generation(self._where, on_trial=on_trial)
        return unrolled

    def _check_phase(self, tensors: Sequence[Tensor], timestep: float) -> None:
        """Refuse a call that goes on with a generation that another graph of the model has begun.

        Raises:
            ConfigError: it does, with other rows than the plan's, or while that calibrates.
        """
        rows, name = rows_of(self.captured, tensors), named_generation()
        for other in self._others():
            state = other.models.find(self._owner_of(tensors))
            if state is None or not state.is_named(name):
                continue
            if state.generation is not None:
                wrong = state.generation.other_rows(timestep, rows)
            else:
                wrong = state.refuse_to_calibrate(timestep, rows)
            if wrong is not None:
                raise wrong

    def _put_in_force(self, unrolled: UnrolledPlan) -> UnrolledPlan:
        """Keep ``unrolled``; a plan with phases has one key in the graphs of all its phases."""
        identity = unrolled.plan.model
        with _registry_lock:
            for other in self._others():
                known = other._plans.get(identity)
                if known is not None and unrolled.plan.sampler.phases:
                    unrolled = replace(unrolled, key=known.key)
            self._plans[identity] = unrolled
        return unrolled

    def _others(self) -> list[Specialization]:
        """Return those of other graphs of the model: called with other rows, say."""
        found = list(_registry)  # other threads may add to it
        return [one for one in found if one is not self and one.options == self.options]

    def _generation_elsewhere(
        self, unrolled: UnrolledPlan, owner: Tensor | None
    ) -> Generation | None:
        """Return this thread's generation by ``unrolled``, if another graph has begun it."""
        states = [one.models.find(owner) for one in self._others()]
        return next(
            (
                state.generation
                for state in states
                if state is not None and state.plan is not None and state.plan.key is unrolled.key
            ),
            None,
        )

    @property
    def _where(self) -> str:
        return f"argument {self.options.timestep!r}"

    def _advance(
        self, model: ModelState, generation: Generation, tensors: Sequence[Tensor]
    ) -> Call:
        latents = [tensors[index] for index in self._latents]
        conditions = [tensors[index] for index in self._conditions]
        try:
            return generation.advance(
                read_timestep(tensors[self._timestep]),
                shown(latents, conditions),
                rows_of(self.captured, tensors),
            )
        except ConfigError as error:
            if not isinstance(error, (InterleavedError, OtherCallsError)):
                self._check_phase(tensors, read_timestep(tensors[self._timestep]).value())
            if not generation.on_trial:
                raise
            self._plans.pop(model.identity, None)
            model.plan = model.generation = None
            raise ConfigError(
                "this generation has other steps than the first one, which calibrated the plan",
                where=self._where,
                expected=f"the first generation's {generation.steps} steps; was it interrupted?",
                remedy="run the generation again: it calibrates again",
            ) from error

    def _run_planned(
        self, model: ModelState, plan: UnrolledPlan, tensors: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        model.begins_anew(named_generation())
        generation = self._generation(model, plan)
        call = self._advance(model, generation, tensors)
        if call == FIRST and not model.weights.equal(static_tensors(self.captured, tensors)):
            generation.reset()
            return self._meet_again(model, tensors)
        phase = plan.phase(call.phase)
        generation.follow(call, [each.slots for each in phase.programs])
        if generation.begins_phase(call) and phase.shares_guidance:
            # Once a phase, as on a device it waits.
            names = (self.captured.inputs[index].name for index in self._latents)
            latents = (tensors[index] for index in self._latents)
            generation.check_latents(call, dict(zip(names, latents, strict=True)))
        hoisted = generation.branch(call).hoisted.at(self._hoisted, tensors)
        return self._variants.run(plan, generation, call, hoisted, tensors)

    def reports(self) -> list[RunReport]:
        """Report each plan in force."""
        dense = count_flops(self.captured.module.graph)
        return [
            run_report(
                plan,
                self.report,
                dense=dense,
                hoisted=self._hoisted.flops,
                hoisted_bytes=self._hoisted_bytes(plan),
                calls=self._variants.flops(plan),
            )
            for plan in list(self._plans.values())
        ]

    def _hoisted_bytes(self, unrolled: UnrolledPlan) -> int:
        return unrolled.hoisted_bytes(self._hoisted.bytes)


def _log_sites(report: SiteReport) -> None:
    log.info("find-sites: %d found, %d declined", len(report.sites), len(report.declined))
    for declined in report.declined:
        log.debug("find-sites: declined %s: %s", declined.name, declined.reason)
    for site in report.sites:
        for strategy, reason in declined_strategies(site).items():
            log.debug("find-sites: %s: no %s: %s", site.name, strategy, reason)
    if not report.sites:
        log.warning("ditfastattn: no attention site was found: the model runs dense")


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


def reports() -> list[RunReport]:
    """Report every plan in force in this process, at each set of input shapes.

    Returns:
        A report for each, with the sites, what was declined and why, FLOPs, variants, and the
        bytes of caches.
    """
    return [report for found in list(_registry) for report in found.reports()]


def report_of(plan: Plan) -> RunReport | None:
    """Return the report of ``plan``, None where it is not in force."""
    return next((report for report in reports() if report.plan == plan), None)


def reset() -> None:
    """Forget the generations under way in this thread, for example after an interrupted one.

    Plans and what was compiled stay.
    """
    for found in list(_registry):
        found.reset()
