"""Prepare a model for export: capture it at two batch sizes, match its plan, find its caches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import FIX_BATCH
from ditfastattn.export.call_programs import CallProgram, Variant, call_programs
from ditfastattn.export.capture_call import (
    CapturedCall,
    RecordedCall,
    capture_call,
    capture_doubled,
)
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.second_call import second_inputs
from ditfastattn.export.step_graphs import Captures
from ditfastattn.export.weights import ONNX_TYPES
from ditfastattn.passes.analysis.coarse_sites import coarse_sites
from ditfastattn.passes.analysis.fingerprint import Fingerprint, fingerprint
from ditfastattn.passes.analysis.latent import latent_position
from ditfastattn.passes.analysis.site import Site, with_wholes
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.opaque_blocks import OPAQUE_BLOCK, block_named
from ditfastattn.passes.capture.plain_tensors import is_plain
from ditfastattn.passes.capture.routed_experts import form_of
from ditfastattn.passes.graph.ir import calls, value
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.rewrites.hoist_invariants import HOIST_PER_GENERATION, find_hoisted
from ditfastattn.passes.rewrites.pipeline import switches
from ditfastattn.runtime.bundle.guards import InputGuard, guard_of
from ditfastattn.runtime.matching import (
    mismatch,
    planned_sites,
    split_as_planned,
    static_tensors,
    timestep_position,
)


@dataclass(frozen=True)
class PreparedModel:
    """Hold a model that is ready for export.

    Attributes:
        model: in the dtype of the bundle.
        dtype: that dtype.
        call: the arguments of its call.
        plan: the plan that it runs by, or None.
        identity: of the model that the plan is for, before any change of dtype.
        captures: its graph at two batch sizes.
        programs: what each of a step's calls does, step by step, and its caches.
        guards: the content of the inputs that the model reads.
        other: the inputs of a step's second call by name, if there is one.
        per_generation: the nodes that are computed once per generation.
        timestep: the name of its timestep input.
        latent: the name of its latent input, "" if unknown.
    """

    model: nn.Module
    dtype: torch.dtype
    call: RecordedCall
    plan: Plan | None
    identity: Fingerprint
    captures: Captures
    programs: tuple[CallProgram, ...]
    guards: tuple[InputGuard, ...]
    other: Mapping[str, Tensor]
    per_generation: tuple[str, ...]
    timestep: str
    latent: str

    @property
    def layout(self) -> CfgLayout:
        """Return how guidance reaches the model where it is on."""
        return CfgLayout.NONE if self.plan is None else self.plan.sampler.cfg_layout

    @property
    def layouts(self) -> tuple[CfgLayout, ...]:
        """Return how guidance reaches the model at each step."""
        return (CfgLayout.NONE,) if self.plan is None else self.plan.sampler.layouts

    @property
    def halved(self) -> bool:
        """Return whether some steps have one half of a guided step's batch."""
        return self.layout.batched and CfgLayout.NONE in self.layouts

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Return the distinct steps of all calls, those of the first one first."""
        return tuple(dict.fromkeys(each for call in self.programs for each in call.variants))

    def schedule(self, program: CallProgram) -> tuple[int | None, ...]:
        """Return the schedule of ``program`` in numbers of ``variants``."""
        place = {variant: index for index, variant in enumerate(self.variants)}
        return tuple(None if each is None else place[each] for each in program.schedule)

    def arguments(self) -> list[tuple[GraphInput, Tensor]]:
        """Return the inputs of the graph that are the call's own, and their examples."""
        first = self.captures.first
        pairs = zip(first.graph.inputs, first.tensors, strict=True)
        return [(entry, tensor) for entry, tensor in pairs if not entry.static]


def _check_whole(captured: CapturedCall) -> None:
    """Refuse a graph that lacks parts of the model, and these are not routed experts."""
    if captured.traced is None:
        return
    for node in calls(captured.graph.module.graph, OPAQUE_BLOCK):
        name = str(node.args[1])
        path = block_named(name).path
        try:
            form_of(name)
        except ValueError as error:
            raise ConfigError(
                f"a part of the model reads what it denoises, and is not in the graph: {error}",
                where="export",
                got=f"{path}: {captured.traced.opaque[path]}",
                expected="experts that each compute tokens alone, whose results are added",
                remedy="run it in torch, by accelerate(pipeline, plan)",
            ) from error


def _check_real(captured: CapturedCall) -> None:
    """Refuse results that are complex: graphs would return pairs of real numbers."""
    for node in captured.graph.module.graph.output_node().all_input_nodes:
        if value(node).is_complex():
            raise ConfigError(
                "the model returns complex numbers",
                where="export",
                got=value(node).dtype,
                expected="real ones",
                remedy="return torch.view_as_real of them",
            )


def _guards(captured: CapturedCall, dynamic_batch: bool) -> tuple[InputGuard, ...]:
    """Return guards of the inputs that the model reads: the graph is for their content alone.

    Raises:
        ConfigError: the batch is free, so that other content is to come; or a manifest cannot hold
            an input's content.
    """
    reads = captured.traced.guards.reads if captured.traced else ()
    pairs = zip(captured.graph.inputs, captured.tensors, strict=True)
    guards = tuple(
        guard_of(entry.name, tensor, said)
        for entry, tensor in pairs
        if not entry.static and (said := [str(one) for one in reads if entry.name in one.inputs])
    )
    for guard in guards if dynamic_batch else ():
        raise ConfigError(
            "the graph holds only for what the model reads of its inputs, at one batch",
            where=f"argument {guard.name!r}",
            got=guard.reads[0],
            remedy=FIX_BATCH,
        )
    return guards


def prepare(
    model: nn.Module,
    call: RecordedCall,
    plan: Plan | None,
    options: ExportOptions,
    other_weights: bool = False,
    second_call: RecordedCall | None = None,
) -> PreparedModel:
    """Capture ``model`` and match ``plan``.

    With ``other_weights``, the plan is taken over for a model of the same structure. The
    ``second_call`` of a step is that of a plan whose guidance takes two.

    Raises:
        ConfigError: the plan does not match the model or calls; there is no such dtype.
    """
    dtype = _dtype(options.dtype) if options.dtype else None
    if dtype is not None:
        _check_not_quantized(model, dtype)
    captured = capture_call(model, call, options.timestep)
    _check_whole(captured)
    _check_real(captured)
    static = static_tensors(captured.graph, captured.tensors)
    identity = fingerprint(captured.graph, find_sites(captured.graph).sites, static)
    if other_weights and plan is not None:
        plan = _taken_over(plan, identity)
    first, sites = _matched(captured, identity, plan)
    floats = (t.dtype for t in static if t.is_floating_point() and t.dtype in ONNX_TYPES)
    own = next(floats, torch.float32)
    dtype = dtype or own
    if dtype != own:  # the plan was matched before: it is for the model's own dtype
        model, call = copy.deepcopy(model).to(dtype), RecordedCall(_cast(call.arguments, dtype))
        first = _split(capture_call(model, call, options.timestep), plan)
        second_call = second_call and RecordedCall(_cast(second_call.arguments, dtype))
    guards = _guards(first, options.dynamic_batch)
    second = first
    if options.dynamic_batch:
        second = _split(capture_doubled(model, call, options.timestep), plan)
    both = _again(sites, first), _again(sites, second)
    batches = call.batch, call.batch * (1 + options.dynamic_batch)
    timestep = timestep_position(first.graph, options.timestep)
    latent = latent_position(first.graph)
    varying = {timestep} if latent is None else {timestep, latent}
    programs = call_programs(plan, first.graph, both[0])
    hoists = plan is not None and HOIST_PER_GENERATION not in switches().off
    return PreparedModel(
        model=model,
        dtype=dtype,
        call=call,
        plan=plan,
        identity=identity,
        captures=Captures(first, second, batches, (with_wholes(both[0]), with_wholes(both[1]))),
        programs=programs,
        guards=guards,
        other=second_inputs(first, call, second_call, guards) if len(programs) > 1 else {},
        per_generation=find_hoisted(first.graph, varying) if hoists else (),
        timestep=first.graph.inputs[timestep].name,
        latent="" if latent is None else first.graph.inputs[latent].name,
    )


def _taken_over(plan: Plan, identity: Fingerprint) -> Plan:
    """Return ``plan`` for the model ``identity``, which differs from the plan's in weights."""
    for field in ("structure", "dtype"):
        got, expected = getattr(identity, field), getattr(plan.model, field)
        if got != expected:
            raise mismatch(f"model.{field}", got, expected)
    return plan.model_copy(update={"model": identity})


def _matched(
    call: CapturedCall, identity: Fingerprint, plan: Plan | None
) -> tuple[CapturedCall, tuple[Site, ...]]:
    """Return ``call`` with its heads split, and the sites of the plan."""
    split = _split(call, plan)
    if plan is None:
        return split, ()
    found = find_sites(split.graph).sites
    return split, planned_sites(plan, split.graph, found, identity)


def _split(call: CapturedCall, plan: Plan | None) -> CapturedCall:
    """Return ``call`` with its heads split as ``plan`` does."""
    if plan is None or not plan.head_groups:
        return call
    sites = find_sites(call.graph).sites
    return replace(call, graph=split_as_planned(plan, call.graph, sites))


def _again(sites: tuple[Site, ...], captured: CapturedCall) -> tuple[Site, ...]:
    """Return the planned sites of another capture of the same model."""
    every = find_sites(captured.graph).sites
    coarse = coarse_sites(sites, captured.graph, every)
    known = {site.name: site for site in (*every, *coarse)}

    def found(site: Site) -> Site:
        chosen = replace(known[site.name], window=site.window, coefficients=site.coefficients)
        return chosen.with_caches_in(site.cache_dtype)

    return tuple(map(found, sites))


def _dtype(name: str) -> torch.dtype:
    known = {str(d).removeprefix("torch."): d for d in ONNX_TYPES if d.is_floating_point}
    if name not in known:
        raise ConfigError(
            "there is no such dtype to export", where="dtype", got=name, expected=", ".join(known)
        )
    return known[name]


def _check_not_quantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ``ConfigError`` if ``model`` has quantized weights, and computes in another dtype."""
    weights = dict(model.named_parameters())
    quantized = [name for name, weight in weights.items() if not is_plain(weight)]
    own = {str(weights[name].dtype) for name in weights.keys() - set(quantized)}
    if quantized and own - {str(dtype)}:
        raise ConfigError(
            "a quantized model is exported in the dtype that it computes in",
            where=quantized[0],
            got=f"dtype {str(dtype).removeprefix('torch.')}",
            expected=", ".join(sorted(own)).replace("torch.", ""),
            remedy="export without a dtype, or cast the model before it is quantized",
        )


def _cast(item: Any, dtype: torch.dtype) -> Any:
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() and item.dim() > 1 else item
    if isinstance(item, (tuple, list)):
        return type(item)(_cast(part, dtype) for part in item)
    if isinstance(item, dict):
        return {key: _cast(part, dtype) for key, part in item.items()}
    return item
