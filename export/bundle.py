"""Export a pipeline's transformer, run by a plan, as a bundle of ONNX graphs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.tensor_files import write_tensors
from ditfastattn.core.version import __version__
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.contents import Contents, make_manifest
from ditfastattn.export.formats import files_of
from ditfastattn.export.golden import golden_sample
from ditfastattn.export.graph_files import GraphFiles, OnnxFiles
from ditfastattn.export.loop import LATENTS, LOOP_FILE, LoopSource, write_loop
from ditfastattn.export.options import ExportOptions, silent
from ditfastattn.export.partial import PartialBundle, partial_folder
from ditfastattn.export.prepare import PreparedModel, prepare
from ditfastattn.export.step_graphs import (
    StepGraph,
    hoisted_graph_of,
    size_of,
    spec,
    variant_graph,
)
from ditfastattn.export.watch_sampler import WatchedGeneration, find_stepping, watch_sampler
from ditfastattn.export.watched_phases import guided_calls
from ditfastattn.passes.plan.phases import in_runs
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.golden import GOLDEN_FILE
from ditfastattn.runtime.bundle.manifest import MANIFEST, PLAN_FILE, Format, Manifest, file_hash
from ditfastattn.runtime.bundle.specs import LoopSpec, VariantSpec
from ditfastattn.runtime.bundle.stepping import Stepping
from ditfastattn.runtime.pipeline.denoiser import plain_module
from ditfastattn.runtime.pipeline.guidance import guidance_of
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.pipeline.text_padding import text_padded

__all__ = ["ExportOptions", "export", "export_model"]

log = logging.getLogger(__name__)

_MOST_OF_ONE_ROW = 2  # the largest batch of which guidance's half is one row

FindStepping = Callable[[PreparedModel], Stepping | None]
Accept = Callable[[Manifest, Plan | None], None]


def no_stepping(prepared: PreparedModel) -> None:
    """Return what is known of a sampler where there is none."""


def export(
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    accept: Accept | None = None,
) -> Manifest:
    """Write the transformer of ``pipeline``, run by ``plan``, as a bundle of graphs.

    Args:
        pipeline: a diffusers pipeline, or one like it.
        call: what it is called with; its resolution and text length are the bundle's.
        plan: the plan, or its path; None exports the dense model.
        out: the bundle's folder. An existing bundle is replaced once the new one is complete.
        options: see ``ExportOptions``.
        accept: where the plan is taken over for a model of other weights; it may still refuse the
            new bundle, before that takes the place of the old one.

    Raises:
        ConfigError: the plan does not match the model, sampler or phases; an operator has no ONNX
            form; what is at ``out`` is not a bundle.
    """
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    prompt = split_prompts(call, 0)[0]
    chosen = options or ExportOptions()
    _check_loop(chosen)
    if loaded is not None:
        check_sampler(loaded, pipeline.scheduler, guidance_of(pipeline, prompt.call))
    if chosen.loop and loaded is None:
        raise ConfigError(
            "a loop needs a plan, which fixes its steps",
            where="export(loop=True)",
            remedy="give a plan; one that is full everywhere is dense",
        )
    with text_padded(pipeline, None if loaded is None else loaded.text):
        return _exported(pipeline, prompt, loaded, out, chosen, accept)


def _exported(
    pipeline: Any,
    prompt: Prompt,
    plan: Plan | None,
    out: str | os.PathLike[str],
    chosen: ExportOptions,
    accept: Accept | None,
) -> Manifest:
    """Export the transformer of ``pipeline`` as ``prompt`` calls it."""
    watched = watch_sampler(pipeline, prompt, whole=plan is not None)

    def stepping(prepared: PreparedModel) -> Stepping | None:
        return _stepping(watched, prepared, chosen.loop)

    calls = guided_calls(watched.calls, None if plan is None else plan.sampler)
    return export_model(
        pipeline.transformer, calls[0], plan, out, chosen, stepping, accept, *calls[1:]
    )


def _check_batch(plan: Plan | None, options: ExportOptions) -> None:
    """Refuse a fixed batch where some steps have one half of it."""
    if plan is None or options.dynamic_batch:
        return
    sampler = plan.sampler
    if sampler.phases and sampler.cfg_layout.batched:
        raise ConfigError(
            "a bundle of one batch needs a plan that calls the model with it at each step",
            where="plan.sampler.phases",
            got=in_runs([f"guidance {layout}" for layout in sampler.layouts]),
            expected="no phases, or guidance in two calls",
            remedy="export with a free batch, or run the plan in torch, by "
            "accelerate(pipeline, plan)",
        )


def _stepping(watched: WatchedGeneration, prepared: PreparedModel, needed: bool) -> Stepping | None:
    """Return what the sampler does between the steps, None where that is not known in numbers."""
    if prepared.plan is None:
        return None
    try:
        return find_stepping(watched, prepared.plan, prepared.latent, prepared.timestep)
    except ConfigError as error:
        if needed:
            raise
        log.warning("the manifest does not say what the sampler does between the steps: %s", error)
        return None


def export_model(
    model: nn.Module,
    call: RecordedCall,
    plan: Plan | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    stepping_of: FindStepping = no_stepping,
    accept: Accept | None = None,
    second: RecordedCall | None = None,
) -> Manifest:
    """Write ``model``, called with ``call`` at every guided step, as a bundle; see ``export``.

    ``stepping_of`` says what the sampler does between the steps; a loop needs that. Where the
    plan's guidance calls the model twice a step, ``second`` is the second call.
    """
    chosen = options or ExportOptions()
    _check_loop(chosen)
    _check_batch(plan, chosen)
    if chosen.format is Format.PT2 and chosen.dynamic_batch and call.batch <= _MOST_OF_ONE_ROW:
        # One row is contiguous however it lies in memory: its graph is no larger batch's.
        call, second = call.doubled(), second and second.doubled()
    plain = plain_module(model)  # it may be compiled already
    with partial_folder(Path(out)) as folder:
        prepared = prepare(plain, call, plan, chosen, accept is not None, second)
        stepping = stepping_of(prepared)
        partial = PartialBundle(folder, _request(prepared, chosen, stepping))
        report = _Progress(prepared, chosen)
        try:
            with files_of(prepared, partial, chosen, report, Path(out)) as files:
                manifest = _Writer(prepared, partial, chosen, stepping, files, report).write()
        finally:
            partial.weights.close()
        if accept is not None:
            accept(manifest, prepared.plan)
        partial.put_in_place(Path(out), {*manifest.files, MANIFEST})
    return manifest


def _request(prepared: PreparedModel, options: ExportOptions, stepping: Stepping | None) -> str:
    """Return a hash of all that determines the content of the bundle."""
    shapes = [(entry.name, tensor.shape) for entry, tensor in prepared.arguments()]
    plain = replace(options, on_progress=silent)
    parts = (__version__, prepared.identity, prepared.plan, plain, stepping, shapes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_loop(options: ExportOptions) -> None:
    if options.loop and options.format is not Format.ONNX:
        raise ConfigError(
            "a loop is one ONNX graph",
            where="export(loop=True)",
            got=f"format={options.format}",
            remedy="export without a loop, or with format='onnx'",
        )


class _Progress:
    """Count the files that are written."""

    def __init__(self, prepared: PreparedModel, options: ExportOptions) -> None:
        self._on_progress, self._done = options.on_progress, 0
        self._count = (
            len(prepared.variants) + bool(prepared.per_generation) + options.loop + options.golden
        )

    def __call__(self, file: str) -> None:
        """Report that ``file`` is written."""
        self._done += 1
        self._on_progress(file, self._done, self._count)


class _Writer:
    """Write the files of one bundle."""

    def __init__(
        self,
        prepared: PreparedModel,
        partial: PartialBundle,
        options: ExportOptions,
        stepping: Stepping | None,
        files: GraphFiles,
        report: _Progress,
    ) -> None:
        self._prepared, self._partial, self._stepping = prepared, partial, stepping
        self._files, self._report = files, report
        self._with_loop, self._with_golden = options.loop, options.golden

    def write(self) -> Manifest:
        """Write all files, the manifest last."""
        prepared, partial = self._prepared, self._partial
        captures, per_generation = prepared.captures, prepared.per_generation
        suffix, form = self._files.suffix, self._files.form
        if prepared.plan is not None:
            prepared.plan.save(partial.folder / PLAN_FILE)
        variants: list[VariantSpec] = []
        graphs: list[StepGraph] = []
        schedules = [prepared.schedule(program) for program in prepared.programs]
        for index, variant in enumerate(prepared.variants):
            file = f"variant_{index:02d}.{suffix}"
            graphs.append(
                variant_graph(captures, variant.actions, variant.layout, per_generation, file, form)
            )
            at = zip(*schedules, strict=True)
            steps = [step for step, used in enumerate(at) if index in used]
            variants.append(self._graph(graphs[-1], file, steps))
        once = hoisted_graph_of(captures, per_generation, form) if per_generation else None
        hoisted = self._graph(once, f"hoisted.{suffix}") if once else None
        loop = self._loop(graphs, once) if self._with_loop else None
        weights = self._files.close()
        golden = self._golden(graphs, once) if self._with_golden else ""
        contents = Contents(
            graphs=tuple(graphs),
            variants=tuple(variants),
            once=once,
            hoisted=hoisted,
            loop=loop,
            stepping=self._stepping,
            golden=golden,
            packages=self._files.packages(),
        )
        manifest = make_manifest(prepared, contents, partial.folder, weights)
        manifest.save(partial.folder)
        return manifest

    def _about(self, steps: Sequence[int]) -> dict[str, str]:
        """Return what a graph's metadata says of it."""
        planned = self._prepared.plan is not None
        return {
            "plan_sha256": file_hash(self._partial.folder / PLAN_FILE) if planned else "",
            "steps": ",".join(map(str, steps)) if planned else "",
        }

    def _graph(self, graph: StepGraph, file: str, steps: Sequence[int] = ()) -> VariantSpec:
        return self._files.write(graph, file, self._about(steps))

    def _golden(self, graphs: list[StepGraph], once: StepGraph | None) -> str:
        try:
            sample = golden_sample(self._prepared, graphs, once, self._stepping)
        except ConfigError as error:
            log.warning("the bundle has no golden sample: %s", error)
            return ""
        write_tensors(self._partial.folder / GOLDEN_FILE, sample)
        self._report(GOLDEN_FILE)
        return GOLDEN_FILE

    def _loop(self, graphs: list[StepGraph], once: StepGraph | None) -> LoopSpec:
        prepared, plan, stepping = self._prepared, self._prepared.plan, self._stepping
        if plan is None or stepping is None:
            raise ConfigError("what the sampler does is not known", where="export(loop=True)")
        timestep: Tensor = prepared.call.arguments[prepared.timestep]
        source = LoopSource(
            graphs=tuple(graphs),
            hoisted=once,
            programs=prepared.programs,
            schedules=tuple(map(prepared.schedule, prepared.programs)),
            stepping=stepping,
            timesteps=tuple(torch.full_like(timestep, t) for t in plan.sampler.timesteps),
            latent=prepared.latent,
            timestep=prepared.timestep,
            layouts=prepared.layouts,
            layout=prepared.layout,
            about=self._about(range(plan.sampler.steps)),
        )
        loop = write_loop(source, self._partial.weights)
        assert isinstance(self._files, OnnxFiles)  # others have no loop: see _check_loop
        self._files.save(loop.model, LOOP_FILE)
        self._report(LOOP_FILE)
        return LoopSpec(
            file=LOOP_FILE,
            size=size_of(self._partial.folder / LOOP_FILE, (loop.noise, *loop.conditions)),
            noise=spec(loop.noise),
            noise_scale=stepping.noise_scale,
            conditions=tuple(map(spec, loop.conditions)),
            latents=LATENTS,
            guidance_scale=stepping.guidance_scale,
        )
