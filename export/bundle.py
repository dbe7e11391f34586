"""Export a pipeline's transformer, run by a plan, as a bundle of ONNX graphs."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.errors import ConfigError
from ditfastattn.export.capture_call import CapturedCall, RecordedCall, capture_call, record_call
from ditfastattn.export.emitter import OPSET
from ditfastattn.export.linear_scheduler import LinearSchedule, linear_schedule
from ditfastattn.export.lint import lint
from ditfastattn.export.loop import LATENTS, LOOP_FILE, LoopSource, write_loop
from ditfastattn.export.partial import WEIGHTS_FILE, PartialBundle, growing
from ditfastattn.export.step_graphs import (
    PROLOGUE_FILE,
    Captures,
    StepGraph,
    describe,
    dtype_name,
    prologue_graph,
    sizes,
    spec,
    variant_graph,
    write_graph,
)
from ditfastattn.passes.capture import GraphInput
from ditfastattn.passes.fingerprint import fingerprint
from ditfastattn.passes.hoist_invariants import find_invariants
from ditfastattn.passes.ir import graph_text
from ditfastattn.passes.pipeline import SiteAction
from ditfastattn.passes.plan import CfgLayout, Fingerprint, Plan, Sampler
from ditfastattn.passes.sites import AttentionSite, find_sites
from ditfastattn.passes.step_program import StepProgram, unroll
from ditfastattn.runtime.bundle.manifest import (
    FileSpec,
    LoopSpec,
    Manifest,
    ModelSpec,
    SlotSpec,
    VariantSpec,
    file_hash,
)
from ditfastattn.runtime.matching import (
    check_sampler,
    latent_position,
    planned_sites,
    static_tensors,
    timestep_position,
)
from ditfastattn.runtime.search.prompts import argument_of, split_prompts

PLAN_FILE = "plan.json"
Progress = Callable[[str, int, int], None]  # (what, done, of)


def _silent(what: str, done: int, of: int) -> None:
    pass


@dataclass(frozen=True)
class ExportOptions:
    """Say what a bundle is to be like.

    Attributes:
        dtype: of weights and activations; "" keeps the model's.
        dynamic_batch: whether it takes any batch.
        loop: whether the whole generation is written as one graph too.
        timestep: the name of the model's timestep argument.
        on_progress: is told what was written, and how many of how many.
    """

    dtype: str = ""
    dynamic_batch: bool = True
    loop: bool = False
    timestep: str = "timestep"
    on_progress: Progress = _silent


def export(
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
) -> Manifest:
    """Write the transformer of ``pipeline``, run by ``plan``, as a bundle of ONNX graphs.

    Args:
        pipeline: a diffusers pipeline, or one like it.
        call: what it is called with; its resolution and text length are the bundle's.
        plan: the plan, or its path; None exports the dense model.
        out: the bundle's folder. A bundle that is there is replaced once the new one is whole.
        options: see ``ExportOptions``.

    Raises:
        ConfigError: the plan is for another model or sampler; an operator has no ONNX form; there
            is something else at ``out``.
    """
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    prompt = split_prompts(call, 0)[0]
    if loaded is not None:
        check_sampler(
            loaded, pipeline.scheduler, argument_of(pipeline, prompt.call, "guidance_scale")
        )
    recorded = record_call(pipeline, prompt)
    chosen = options or ExportOptions()
    schedule = _schedule(pipeline.scheduler, loaded) if chosen.loop else None
    return export_model(pipeline.transformer, recorded, loaded, out, chosen, schedule)


def _schedule(scheduler: Any, plan: Plan | None) -> LinearSchedule:
    if plan is None:
        raise ConfigError(
            "a loop needs a plan, which fixes its steps",
            where="export(loop=True)",
            remedy="give a plan; one that is full everywhere is dense",
        )
    return linear_schedule(scheduler, plan.sampler.steps)


def export_model(
    model: nn.Module,
    call: RecordedCall,
    plan: Plan | None,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    schedule: LinearSchedule | None = None,
) -> Manifest:
    """Write ``model``, called with ``call`` at every step, as a bundle; see ``export``.

    With ``schedule``, what the scheduler does, the whole generation is written as one graph too.
    """
    plain: nn.Module = getattr(model, "_orig_mod", model)  # it may be compiled already
    with growing(Path(out)) as folder:
        exported = _Export(plain, call, plan, options or ExportOptions(), schedule)
        partial = PartialBundle(folder, exported.request)
        try:
            manifest = exported.write(partial)
        finally:
            partial.weights.close()
        partial.put_in_place(Path(out))
    return manifest


class _Export:
    """Hold what one export works on."""

    def __init__(
        self,
        model: nn.Module,
        call: RecordedCall,
        plan: Plan | None,
        options: ExportOptions,
        schedule: LinearSchedule | None,
    ) -> None:
        self.plan, self.options, self.schedule = plan, options, schedule
        self.model, self.call = model, call
        first = capture_call(model, call)
        static = static_tensors(first.graph, first.tensors)
        found = find_sites(first.graph).sites
        self.identity: Fingerprint = fingerprint(first.graph, found, static)
        self.sites = self._planned(first, found, self.identity)
        own = next((t.dtype for t in static if t.is_floating_point()), torch.float32)
        wanted: torch.dtype = getattr(torch, options.dtype) if options.dtype else own
        self.dtype = wanted
        if wanted != own:
            self.model = copy.deepcopy(model).to(wanted)
            self.call = RecordedCall(_cast(call.arguments, wanted))
            first = capture_call(self.model, self.call)
        second = first
        if options.dynamic_batch:
            second = capture_call(self.model, self.call.doubled())
        both = (self._again(first), self._again(second))
        batch = self.call.batch
        self.captures = Captures(first, second, (batch, batch * (1 + options.dynamic_batch)), both)
        graph = first.graph
        self.timestep = graph.inputs[timestep_position(graph, options.timestep)].name
        self.latent = latent_position(graph)
        varying = {self.latent, timestep_position(graph, options.timestep)}
        positions = {index for index in varying if index is not None}
        self.invariants = find_invariants(graph, positions) if plan is not None else ()
        rows = [[]] if plan is None else plan.strategies
        merge = plan is not None and plan.merge_variants
        self.program: StepProgram = unroll(rows, graph, self.captures.sites[0], merge)

    def _planned(
        self, captured: CapturedCall, found: tuple[AttentionSite, ...], identity: Fingerprint
    ) -> tuple[AttentionSite, ...]:
        if self.plan is None:
            return ()
        return planned_sites(self.plan, captured.graph, found, identity)

    def _again(self, captured: CapturedCall) -> tuple[AttentionSite, ...]:
        """Return the planned sites of another capture of the same model."""
        known = {site.name: site for site in find_sites(captured.graph).sites}
        return tuple(known[site.name] for site in self.sites)

    @property
    def layout(self) -> CfgLayout:
        """Return the order of the guidance halves."""
        return CfgLayout.NONE if self.plan is None else self.plan.sampler.cfg_layout

    @property
    def request(self) -> str:
        """Return what two exports must share to be one."""
        import ditfastattn

        options = replace(self.options, on_progress=_silent)
        shapes = [(e.name, t.shape) for e, t in self._arguments()]
        parts = (ditfastattn.__version__, self.identity, self.plan, options, self.schedule, shapes)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _arguments(self) -> list[tuple[GraphInput, Tensor]]:
        first = self.captures.first
        pairs = zip(first.graph.inputs, first.tensors, strict=True)
        return [(entry, tensor) for entry, tensor in pairs if not entry.static]

    def write(self, partial: PartialBundle) -> Manifest:
        """Write all files to the folder of ``partial``, the manifest last."""
        folder = partial.folder
        count = len(self.program.variants) + bool(self.invariants) + bool(self.schedule)
        loop = None
        variants: list[VariantSpec] = []
        graphs: list[StepGraph] = []
        for index, actions in enumerate(self.program.variants):
            file = f"variant_{index:02d}.onnx"
            graphs.append(self._variant(actions, file))
            variants.append(self._written(graphs[-1], partial, file))
            self.options.on_progress(file, index + 1, count)
        once = prologue_graph(self.captures, self.invariants) if self.invariants else None
        prologue = None
        if once is not None:
            prologue = self._written(once, partial, PROLOGUE_FILE)
            self.options.on_progress(PROLOGUE_FILE, len(variants) + 1, count)
        if self.schedule is not None:
            loop = self._loop(self.schedule, graphs, once, partial)
            self.options.on_progress(LOOP_FILE, count, count)
        partial.close()
        if self.plan is not None:
            self.plan.save(folder / PLAN_FILE)
        manifest = self._manifest(folder, graphs, variants, once, prologue, loop)
        manifest.save(folder)
        return manifest

    def _variant(self, actions: tuple[SiteAction, ...], label: str) -> StepGraph:
        return variant_graph(self.captures, actions, self.layout, self.invariants, label)

    def _written(self, graph: StepGraph, partial: PartialBundle, file: str) -> VariantSpec:
        key = hashlib.sha256(graph_text(graph.source.module.graph).encode()).hexdigest()
        if not partial.has(file, key):
            model = write_graph(graph, partial.weights, file.removesuffix(".onnx"))
            (partial.folder / file).write_bytes(model.SerializeToString())
            partial.weights.flush()
            lint(partial.folder / file)
            partial.keep(file, key)
        return describe(graph, file)

    def _loop(
        self,
        schedule: LinearSchedule,
        graphs: list[StepGraph],
        once: StepGraph | None,
        partial: PartialBundle,
    ) -> LoopSpec:
        plan, latent = self.plan, self.latent
        if plan is None or latent is None:
            raise ConfigError("the model's latent was not found", where="export(loop=True)")
        timestep: Tensor = self.call.arguments[self.timestep]
        scale = plan.sampler.guidance_scale or 1.0
        source = LoopSource(
            graphs=tuple(graphs),
            prologue=once,
            program=self.program,
            schedule=schedule,
            timesteps=tuple(torch.full_like(timestep, t) for t in plan.sampler.timesteps),
            latent=self.captures.first.graph.inputs[latent].name,
            timestep=self.timestep,
            layout=self.layout,
            guidance_scale=scale,
        )
        loop = write_loop(source, partial.weights)
        path = partial.folder / LOOP_FILE
        path.write_bytes(loop.model.SerializeToString())
        partial.weights.flush()
        lint(path)
        return LoopSpec(
            file=LOOP_FILE,
            noise=spec(loop.noise),
            noise_scale=schedule.noise_scale,
            conditions=tuple(map(spec, loop.conditions)),
            latents=LATENTS,
            guidance_scale=scale,
        )

    def _manifest(
        self,
        folder: Path,
        graphs: list[StepGraph],
        variants: list[VariantSpec],
        once: StepGraph | None,
        prologue: VariantSpec | None,
        loop: LoopSpec | None,
    ) -> Manifest:
        import ditfastattn

        plan = self.plan
        inputs = [v for v in graphs[0].inputs if v.name not in graphs[0].reads]
        program = self.program
        dense = Sampler(steps=1, timesteps=(0.0,), cfg_layout=CfgLayout.NONE)
        return Manifest(
            ditfastattn=ditfastattn.__version__,
            opset=OPSET,
            model=self._model_spec(),
            plan_sha256="" if plan is None else file_hash(folder / PLAN_FILE),
            sampler=dense if plan is None else plan.sampler,
            fixed_batch=self.call.batch if self.captures.fixed else 0,
            batch_multiple=_multiple(graphs),
            timestep=self.timestep,
            latent=""
            if self.latent is None
            else self.captures.first.graph.inputs[self.latent].name,
            shares_guidance=program.shares_cfg,
            inputs=tuple(map(spec, inputs)),
            outputs=tuple(map(spec, graphs[0].results)),
            variants=tuple(variants),
            schedule=program.schedule,
            slots=self._slots(graphs, once),
            distances=program.distances,
            prologue=prologue,
            loop=loop,
            weights=WEIGHTS_FILE,
            files={
                path.name: FileSpec(bytes=path.stat().st_size, sha256=file_hash(path))
                for path in sorted(folder.iterdir())
            },
        )

    def _model_spec(self) -> ModelSpec:
        config = dict(getattr(self.model, "config", {}))
        public = {key: item for key, item in config.items() if not key.startswith("_")}
        return ModelSpec(
            class_name=type(self.model).__name__,
            parameters=tuple(inspect.signature(self.model.forward).parameters),
            config=json.loads(json.dumps(public, default=str)),
            fingerprint=self.identity,
            dtype=dtype_name(self.dtype),
        )

    def _slots(self, graphs: list[StepGraph], once: StepGraph | None) -> tuple[SlotSpec, ...]:
        """Return the slots with their shapes, which follow from who writes them."""
        values = {
            v.name: v for graph in [*graphs, *([once] if once else [])] for v in graph.written
        }
        made = [
            SlotSpec(
                name=slot.name,
                shape=sizes(values[slot.source or slot.name].shape),
                dtype=dtype_name(values[slot.source or slot.name].dtype),
                lives=slot.lives,
                source=slot.source,
            )
            for slot in self.program.slots
        ]
        once_written = once.written if once else ()
        made += [
            SlotSpec(name=v.name, shape=sizes(v.shape), dtype=dtype_name(v.dtype), lives=())
            for v in once_written
        ]
        return tuple(made)


def _multiple(graphs: list[StepGraph]) -> int:
    """Return what a batch must be a multiple of for all sizes to be whole."""
    found = [
        size.factor.denominator
        for graph in graphs
        for shape in graph.source.symbols.shapes.values()
        for size in _flat(shape)
        if not isinstance(size, int)
    ]
    return math.lcm(1, *found)


def _flat(shape: Any) -> list[Any]:
    return [s for part in shape for s in _flat(part)] if isinstance(shape, tuple) else [shape]


def _cast(item: Any, dtype: torch.dtype) -> Any:
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() and item.dim() > 1 else item
    if isinstance(item, (tuple, list)):
        return type(item)(_cast(part, dtype) for part in item)
    if isinstance(item, dict):
        return {key: _cast(part, dtype) for key, part in item.items()}
    return item
