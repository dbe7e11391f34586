"""Make the manifest of a bundle's files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditfastattn.core.version import __version__
from ditfastattn.export.call_programs import CallProgram
from ditfastattn.export.emitter import OPSET, Value
from ditfastattn.export.prepare import PreparedModel
from ditfastattn.export.step_graphs import StepGraph, dtype_name, sizes, spec
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.bundle.manifest import PLAN_FILE, Manifest, file_hash
from ditfastattn.runtime.bundle.packages import PackagesSpec
from ditfastattn.runtime.bundle.settings import settings_of
from ditfastattn.runtime.bundle.specs import (
    CallSchedule,
    FileSpec,
    LoopSpec,
    ModelSpec,
    SlotSpec,
    VariantSpec,
    public_config,
)
from ditfastattn.runtime.bundle.stepping import Stepping

_NO_SCHEDULE = Sampler(steps=1, timesteps=(0.0,), cfg_layout=CfgLayout.NONE)  # of a dense bundle


@dataclass(frozen=True)
class Contents:
    """Hold the graphs that were written, and their entries in the manifest."""

    graphs: tuple[StepGraph, ...]
    variants: tuple[VariantSpec, ...]
    once: StepGraph | None
    hoisted: VariantSpec | None
    loop: LoopSpec | None
    stepping: Stepping | None
    golden: str
    packages: PackagesSpec | None = None


def make_manifest(
    prepared: PreparedModel, contents: Contents, folder: Path, weights: str
) -> Manifest:
    """Return the manifest of the files in ``folder``, which are complete."""
    plan, first = prepared.plan, contents.graphs[0]
    program, *others = prepared.programs
    return Manifest(
        ditfastattn=__version__,
        opset=0 if contents.packages else OPSET,
        model=_model(prepared),
        plan_sha256="" if plan is None else file_hash(folder / PLAN_FILE),
        sampler=_NO_SCHEDULE if plan is None else plan.sampler,
        fixed_batch=prepared.call.batch if prepared.captures.fixed else 0,
        batch_multiple=_multiple(prepared, contents.graphs),
        timestep=prepared.timestep,
        latent=prepared.latent,
        text=prepared.plan.text if prepared.plan else None,
        shares_guidance=program.shares_guidance,  # where the second call does, so does the first
        inputs=tuple(spec(v) for v in first.inputs if v.name not in first.reads),
        guards=prepared.guards,
        outputs=tuple(map(spec, first.results)),
        variants=contents.variants,
        schedule=tuple(each for each in prepared.schedule(program) if each is not None),
        slots=(*_slots(program, contents), *_hoisted_slots(contents)),
        factors=_by_name(program),
        second=_second(prepared, others[0], contents) if others else None,
        hoisted=contents.hoisted,
        loop=contents.loop,
        stepping=contents.stepping,
        golden=contents.golden,
        weights=weights,
        packages=contents.packages,
        files=_files(folder, contents, weights, plan is not None),
    )


def _files(folder: Path, contents: Contents, weights: str, planned: bool) -> dict[str, FileSpec]:
    """Describe what was written; what else lies in ``folder`` is not the bundle's."""
    names = {weights, *(variant.file for variant in contents.variants)}
    names |= {made.file for made in (contents.hoisted, contents.loop) if made is not None}
    names |= ({PLAN_FILE} if planned else set()) | ({contents.golden} - {""})
    names |= set(contents.packages.files) if contents.packages else set()
    return {
        name: FileSpec(bytes=(folder / name).stat().st_size, sha256=file_hash(folder / name))
        for name in sorted(names)
    }


def _model(prepared: PreparedModel) -> ModelSpec:
    parameters = inspect.signature(prepared.model.forward).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    return ModelSpec(
        class_name=type(prepared.model).__name__,
        parameters=tuple(parameters),
        config=public_config(prepared.model),
        fingerprint=prepared.identity,
        dtype=dtype_name(prepared.dtype),
        settings=settings_of({**defaults, **prepared.call.arguments}),
    )


def _slots(program: CallProgram, contents: Contents) -> tuple[SlotSpec, ...]:
    """Return the slots of a call; their shapes are those of the values written to them."""
    values = {v.name: v for graph in contents.graphs for v in graph.written}
    return tuple(
        _slot(
            str(each.slot), values[str(each.slot.latest)], each.lives, str(each.slot.source or "")
        )
        for each in program.slots.slots
    )


def _hoisted_slots(contents: Contents) -> tuple[SlotSpec, ...]:
    once = contents.once.written if contents.once else ()
    return tuple(_slot(value.name, value, ()) for value in once)


def _slot(
    name: str, value: Value, lives: tuple[tuple[int, int], ...], source: str = ""
) -> SlotSpec:
    shape, dtype = sizes(value.shape), dtype_name(value.dtype)
    return SlotSpec(name=name, shape=shape, dtype=dtype, lives=lives, source=source)


def _second(prepared: PreparedModel, program: CallProgram, contents: Contents) -> CallSchedule:
    """Return what the second call of each step does."""
    return CallSchedule(
        schedule=prepared.schedule(program),
        slots=_slots(program, contents),
        factors=_by_name(program),
        adopted=tuple(tuple(sorted(map(str, slots))) for slots in program.slots.adopted),
    )


def _by_name(program: CallProgram) -> tuple[dict[str, float], ...]:
    factors = program.slots.factors or ({},) * len(program.schedule)
    return tuple({str(slot): number for slot, number in each.items()} for each in factors)


def _multiple(prepared: PreparedModel, graphs: Sequence[StepGraph]) -> int:
    """Return what a batch must be a multiple of for all sizes to be whole.

    Where a phase has one half of the guided batch, both halves must be whole.
    """
    found = [
        size.factor.denominator
        for graph in graphs
        for shape in graph.source.symbols.shapes.values()
        for size in _flat(shape)
        if not isinstance(size, int)
    ]
    return math.lcm(2 if prepared.halved else 1, *found)


def _flat(shape: Any) -> list[Any]:
    return [s for part in shape for s in _flat(part)] if isinstance(shape, tuple) else [shape]
