"""Export a pipeline's transformer, run by a plan, as a bundle of ONNX graphs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.version import __version__
from ditfastattn.export.capture_call import RecordedCall, record_call
from ditfastattn.export.contents import Contents, make_manifest
from ditfastattn.export.graph_files import GraphFiles, OnnxFiles
from ditfastattn.export.linear_scheduler import WITHOUT_LOOP, LinearSchedule, linear_schedule
from ditfastattn.export.loop import LATENTS, LOOP_FILE, LoopSource, write_loop
from ditfastattn.export.partial import PartialBundle, partial_folder
from ditfastattn.export.prepare import ExportOptions, PreparedModel, prepare, silent
from ditfastattn.export.step_graphs import (
    StepGraph,
    hoisted_graph_of,
    size_of,
    spec,
    variant_graph,
)
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.manifest import MANIFEST, PLAN_FILE, Format, Manifest
from ditfastattn.runtime.bundle.specs import LoopSpec, VariantSpec
from ditfastattn.runtime.clock import tolerances
from ditfastattn.runtime.pipeline.guidance import guidance_argument
from ditfastattn.runtime.pipeline.prompts import argument_of, split_prompts
from ditfastattn.runtime.pipeline.sampler import check_sampler

__all__ = ["ExportOptions", "export", "export_model"]


def export(
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
) -> Manifest:
    """Write the transformer of ``pipeline``, run by ``plan``, as a bundle of graphs.

    Args:
        pipeline: a diffusers pipeline, or one like it.
        call: what it is called with; its resolution and text length are the bundle's.
        plan: the plan, or its path; None exports the dense model.
        out: the bundle's folder. An existing bundle is replaced once the new one is complete.
        options: see ``ExportOptions``.

    Raises:
        ConfigError: the plan does not match the model or sampler; an operator has no ONNX form;
            what is at ``out`` is not a bundle.
    """
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    prompt = split_prompts(call, 0)[0]
    chosen = options or ExportOptions()
    _check_loop(chosen, None)
    if loaded is not None:
        guidance = argument_of(pipeline, prompt.call, guidance_argument(pipeline, prompt.call))
        check_sampler(loaded, pipeline.scheduler, guidance)
    recorded = record_call(pipeline, prompt)
    schedule = _schedule(pipeline.scheduler, loaded) if chosen.loop else None
    return export_model(pipeline.transformer, recorded, loaded, out, chosen, schedule)


def _schedule(scheduler: Any, plan: Plan | None) -> LinearSchedule:
    if plan is None:
        raise ConfigError(
            "a loop needs a plan, which fixes its steps",
            where="export(loop=True)",
            remedy="give a plan; one that is full everywhere is dense",
        )
    found = linear_schedule(scheduler, plan.sampler.steps)
    timesteps = tuple(step.timestep for step in found.steps)
    planned = plan.sampler.timesteps
    allowed = tolerances(planned)
    if any(abs(a - b) > most for a, b, most in zip(timesteps, planned, allowed, strict=True)):
        raise ConfigError(
            "the pipeline's timesteps differ from those that its scheduler sets by itself",
            where="export(loop=True)",
            got=", ".join(f"{timestep:g}" for timestep in plan.sampler.timesteps[:6]),
            expected=", ".join(f"{timestep:g}" for timestep in timesteps[:6]),
            remedy=WITHOUT_LOOP,
        )
    return found


def export_model(
    model: nn.Module,
    call: RecordedCall,
    plan: Plan | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    schedule: LinearSchedule | None = None,
) -> Manifest:
    """Write ``model``, called with ``call`` at every step, as a bundle; see ``export``.

    With the scheduler's ``schedule``, the whole generation is written as one graph too.
    """
    chosen = options or ExportOptions()
    _check_loop(chosen, schedule)
    if chosen.regions and chosen.dynamic_batch:
        # Half a batch of two is one row, which is contiguous however it lies in memory: regions
        # would be cut as no larger batch allows.
        call = call.doubled()
    plain: nn.Module = getattr(model, "_orig_mod", model)  # it may be compiled already
    with partial_folder(Path(out)) as folder:
        prepared = prepare(plain, call, plan, chosen)
        partial = PartialBundle(folder, _request(prepared, chosen, schedule))
        try:
            manifest = _Writer(prepared, partial, chosen, schedule).write()
        finally:
            partial.weights.close()
        partial.put_in_place(Path(out), {*manifest.files, MANIFEST})
    return manifest


def _request(
    prepared: PreparedModel, options: ExportOptions, schedule: LinearSchedule | None
) -> str:
    """Return a hash of all that determines the content of the bundle."""
    shapes = [(entry.name, tensor.shape) for entry, tensor in prepared.arguments()]
    plain = replace(options, on_progress=silent)
    parts = (__version__, prepared.identity, prepared.plan, plain, schedule, shapes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_loop(options: ExportOptions, schedule: LinearSchedule | None) -> None:
    if (options.loop or schedule) and options.format is not Format.ONNX:
        raise ConfigError(
            "a loop is one ONNX graph",
            where="export(loop=True)",
            got=f"format={options.format}",
            remedy="export without a loop, or with format='onnx'",
        )


def _files(prepared: PreparedModel, partial: PartialBundle, options: ExportOptions) -> GraphFiles:
    if options.format is Format.ONNX:
        return OnnxFiles(partial)
    from ditfastattn.export.aoti.files import PackageFiles
    from ditfastattn.export.aoti.options import compile_for
    from ditfastattn.export.aoti.region_files import RegionFiles

    device = prepared.captures.first.tensors[0].device
    batches = prepared.captures.batches
    kind = RegionFiles if options.regions else PackageFiles
    return kind(partial, batches, compile_for(device, options.isa))


class _Writer:
    """Write the files of one bundle."""

    def __init__(
        self,
        prepared: PreparedModel,
        partial: PartialBundle,
        options: ExportOptions,
        schedule: LinearSchedule | None,
    ) -> None:
        self._prepared, self._partial, self._schedule = prepared, partial, schedule
        self._files = _files(prepared, partial, options)
        self._on_progress = options.on_progress
        self._done = 0
        self._count = (
            len(prepared.program.variants) + bool(prepared.per_generation) + bool(schedule)
        )

    def write(self) -> Manifest:
        """Write all files, the manifest last."""
        prepared, partial = self._prepared, self._partial
        captures, layout, per_generation = (
            prepared.captures,
            prepared.layout,
            prepared.per_generation,
        )
        suffix, form = self._files.suffix, self._files.form
        variants: list[VariantSpec] = []
        graphs: list[StepGraph] = []
        for index, actions in enumerate(prepared.program.variants):
            file = f"variant_{index:02d}.{suffix}"
            graphs.append(variant_graph(captures, actions, layout, per_generation, file, form))
            variants.append(self._graph(graphs[-1], file))
        once = hoisted_graph_of(captures, per_generation, form) if per_generation else None
        hoisted = self._graph(once, f"hoisted.{suffix}") if once else None
        loop = self._loop(self._schedule, graphs, once) if self._schedule else None
        weights = self._files.close()
        if prepared.plan is not None:
            prepared.plan.save(partial.folder / PLAN_FILE)
        packages = self._files.packages()
        contents = Contents(tuple(graphs), tuple(variants), once, hoisted, loop, packages)
        manifest = make_manifest(prepared, contents, partial.folder, weights)
        manifest.save(partial.folder)
        return manifest

    def _graph(self, graph: StepGraph, file: str) -> VariantSpec:
        described = self._files.write(graph, file)
        self._report(file)
        return described

    def _report(self, file: str) -> None:
        self._done += 1
        self._on_progress(file, self._done, self._count)

    def _loop(
        self, schedule: LinearSchedule, graphs: list[StepGraph], once: StepGraph | None
    ) -> LoopSpec:
        prepared, plan = self._prepared, self._prepared.plan
        if plan is None or not prepared.latent:
            raise ConfigError("the model's latent was not found", where="export(loop=True)")
        timestep: Tensor = prepared.call.arguments[prepared.timestep]
        scale = plan.sampler.guidance_scale or 1.0
        source = LoopSource(
            graphs=tuple(graphs),
            hoisted=once,
            program=prepared.program,
            schedule=schedule,
            timesteps=tuple(torch.full_like(timestep, t) for t in plan.sampler.timesteps),
            latent=prepared.latent,
            timestep=prepared.timestep,
            layout=prepared.layout,
            guidance_scale=scale,
        )
        loop = write_loop(source, self._partial.weights)
        assert isinstance(self._files, OnnxFiles)  # others have no loop: see _check_loop
        self._files.save(loop.model, LOOP_FILE)
        self._report(LOOP_FILE)
        return LoopSpec(
            file=LOOP_FILE,
            size=size_of(self._partial.folder / LOOP_FILE, (loop.noise, *loop.conditions)),
            noise=spec(loop.noise),
            noise_scale=schedule.noise_scale,
            conditions=tuple(map(spec, loop.conditions)),
            latents=LATENTS,
            guidance_scale=scale,
        )
