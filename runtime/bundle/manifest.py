"""Define a bundle's manifest: what each file is, and how the graphs work together.

A bundle is a folder. Its manifest is read strictly, and no file is opened before its name is known
to lie in the folder and its content to match the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import repr_path, standing, write_text_atomically
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import parse_json, read_text
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.passes.plan.text import PaddedText
from ditfastattn.runtime.bundle.guards import InputGuard, check_described
from ditfastattn.runtime.bundle.packages import PackagesSpec
from ditfastattn.runtime.bundle.specs import (
    CallSchedule,
    FileSpec,
    LoopSpec,
    ModelSpec,
    Natural,
    Positive,
    SlotName,
    SlotSpec,
    TensorSpec,
    VariantSpec,
)
from ditfastattn.runtime.bundle.stepping import Stepping

MANIFEST = "manifest.json"
PLAN_FILE = "plan.json"
STEP_SUFFIX = ".json"  # of a step that calls packages of regions
SCHEMA_VERSION = 6
# 3: without stepping and golden; 4: without second; 5: without phases
READABLE: Final = (3, 4, 5, SCHEMA_VERSION)
_MOST_BYTES: Final = 64 * 2**20
_LONGEST_NAME: Final = 255  # bytes
_SEAL: Final = "sha256"  # of all other entries
EXPORT_AGAIN: Final = "export the bundle again (`ditfastattn export`)"


class Format(StrEnum):
    """Name what a bundle's graphs are written as."""

    ONNX = "onnx"
    PT2 = "pt2"  # AOTInductor packages


class Manifest(Record, frozen=True):
    """Describe a bundle.

    Attributes:
        schema_version: of this format.
        ditfastattn: the version that wrote it.
        opset: of the graphs; 0 if they are AOTInductor packages.
        model: the transformer that it stands in for.
        plan_sha256: of the plan's file, "" for a dense bundle.
        sampler: the schedule the plan is for.
        fixed_batch: the only batch it takes; 0 if the batch is free.
        batch_multiple: what a free batch must be a multiple of; with phases, that of a guided step.
        timestep: the name of the timestep input.
        latent: the name of the latent input, "" if unknown.
        text: to what the text is padded; a driver pads it, and so does ``load``.
        shares_guidance: whether some step computes the conditional half alone.
        inputs: of the model.
        guards: the content of the inputs that the model reads, where the graphs hold for it alone;
            the batch is then fixed.
        outputs: of the model.
        variants: the distinct steps.
        schedule: the variant of each step.
        slots: the caches.
        factors: the numbers that each step combines earlier outputs with, by slot.
        second: what the second call of each step does, where guidance takes two; ``schedule``,
            ``slots`` and ``factors`` are then the first one's.
        hoisted: what is computed once per generation.
        loop: the unrolled sampler.
        stepping: what the sampler does between the steps; absent where that is not linear.
        golden: the file of the golden sample, "" without one.
        weights: the file that holds all weights.
        packages: the AOTInductor packages, where the graphs are not ONNX.
        files: every file of the bundle.
    """

    schema_version: Literal[3, 4, 5, 6] = 6
    ditfastattn: str
    opset: Natural
    model: ModelSpec
    plan_sha256: str
    sampler: Sampler
    fixed_batch: Natural
    batch_multiple: Positive
    timestep: str
    latent: str = ""
    text: PaddedText | None = None
    shares_guidance: bool = False
    inputs: tuple[TensorSpec, ...]
    guards: tuple[InputGuard, ...] = ()
    outputs: tuple[TensorSpec, ...]
    variants: Annotated[tuple[VariantSpec, ...], Field(min_length=1)]
    schedule: tuple[Natural, ...]
    slots: tuple[SlotSpec, ...]
    factors: tuple[dict[SlotName, FiniteFloat], ...]
    second: CallSchedule | None = None
    hoisted: VariantSpec | None = None
    loop: LoopSpec | None = None
    stepping: Stepping | None = None
    golden: str = ""
    weights: str
    packages: PackagesSpec | None = None
    files: dict[str, FileSpec]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileSpec]) -> dict[str, FileSpec]:
        for name in files:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise ValueError(f"{name!r} is not inside the bundle")
            if not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
                raise ValueError(f"{name[:40]!a} is not the name of a file of a bundle")
        return files

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        named = [graph.file for graph in self.graphs] + [self.weights]
        named += [self.loop.file] if self.loop else []
        named += [self.golden] if self.golden else []
        for file in named:
            if file not in self.files:
                raise ValueError(f"{file!r} is not among the files")
        if len(self.calls) != self.sampler.cfg_layout.calls:
            raise ValueError(
                f"second: {self.sampler.cfg_layout} has {len(self.calls)} calls a step"
            )
        for call in self.calls:
            for each in (call.schedule, call.factors, call.adopted):
                if len(each) != self.sampler.steps:
                    raise ValueError(f"schedule: {len(each)} steps, not {self.sampler.steps}")
        if len(self.sampler.timesteps) != self.sampler.steps:
            raise ValueError(f"sampler.timesteps: {len(self.sampler.timesteps)} values")
        if any(variant >= len(self.variants) for variant in self.scheduled):
            raise ValueError(f"schedule: there are {len(self.variants)} variants")
        self._check_phases()
        stepped = self.stepping.steps if self.stepping else ()
        if stepped and tuple(how.timestep for how in stepped) != self.sampler.timesteps:
            raise ValueError("stepping: other timesteps than the sampler's")
        inputs = {spec.name for spec in self.inputs}
        if self.timestep not in inputs:
            raise ValueError(f"timestep: {self.timestep!r} is not an input")
        if self.latent and self.latent not in inputs:
            raise ValueError(f"latent: {self.latent!r} is not an input")
        if not any(spec.shape for spec in self.inputs):
            raise ValueError("inputs: none has a batch")
        if self.guards and not self.fixed_batch:
            raise ValueError("guards: the batch is not fixed")
        check_described(self.guards, {s.name: s.sizes(self.fixed_batch) for s in self.inputs})
        if self.plan_sha256 and self.plan_sha256 != self._hash_of(PLAN_FILE):
            raise ValueError(f"plan_sha256: {PLAN_FILE} is another file, or not among the files")
        for graph in self.graphs:
            if not inputs.issuperset(graph.inputs):
                raise ValueError(f"{graph.file}: inputs that the model lacks")
        self._check_packages()
        slots = {slot.name for slot in self.every_slot}
        for graph in self.graphs:
            for slot, _ in graph.writes:
                if slot not in slots:
                    raise ValueError(f"{graph.file} writes {slot!r}, which is not a slot")
        for call in self.calls:
            self._check_slots(call)
        return self

    def _check_phases(self) -> None:
        """Check that each step has the calls and rows of its phase."""
        sampler = self.sampler
        if sampler.phases and self.schema_version < SCHEMA_VERSION:
            raise ValueError(f"sampler.phases: they need schema version {SCHEMA_VERSION}")
        for number, call in enumerate(self.calls):
            for step, layout in enumerate(sampler.layouts):
                if (call.schedule[step] is None) != (number >= layout.calls):
                    raise ValueError(f"second: step {step} has {layout.calls} call(s)")
        if self.halved and self.fixed_batch:
            raise ValueError("sampler.phases: the batch is fixed")
        if self.halved and self.batch_multiple % 2:
            raise ValueError("batch_multiple: the batch has no halves")

    def _check_packages(self) -> None:
        for file in self.packages.files if self.packages else ():
            if file not in self.files:
                raise ValueError(f"packages: {file!r} is not among the files")
        for graph in self.graphs if self.packages else ():
            package = self.packages.files.get(graph.file) if self.packages else None
            if package is None and not graph.file.endswith(STEP_SUFFIX):
                raise ValueError(f"packages: {graph.file!r} is not among them")
            if (
                package is not None
                and tuple(spec.name for spec in package.inputs) != graph.graph_inputs
            ):
                raise ValueError(f"packages: {graph.file!r} takes other inputs")

    def _hash_of(self, file: str) -> str:
        return self.files[file].sha256 if file in self.files else ""

    def _check_slots(self, call: CallSchedule) -> None:
        """Check that every slot that is read, or taken over, was written before and is kept."""
        once = {slot for slot, _ in self.hoisted.writes} if self.hoisted else set()
        lives = {slot.name: slot.lives for slot in call.slots}
        for name, own in lives.items():
            late = [last for _, last in own if last >= len(call.schedule)]
            if late:
                raise ValueError(f"slots: {name!r} is read at step {late[0]}, after the last one")

        def kept(slot: str, step: int) -> bool:
            return any(began < step <= last for began, last in lives.get(slot, ()))

        for moved in call.slots:
            for began, _ in moved.lives if moved.source else ():
                if not kept(moved.source, began):
                    raise ValueError(f"slots: {moved.name!r} takes over a slot that is not kept")
        written = set(once)
        for step, index in enumerate(call.schedule):
            if index is None:
                continue
            for slot in call.adopted[step]:
                if slot not in {each for each, _ in self.variants[self.schedule[step]].writes}:
                    raise ValueError(f"step {step} adopts {slot!r}, which its first call lacks")
            written |= set(call.adopted[step])
            variant, given = self.variants[index], {*once, *call.factors[step]}
            for slot, _ in variant.reads:
                if slot not in given and not (slot in written and kept(slot, step)):
                    raise ValueError(f"step {step} reads {slot!r}, which no step has written")
            written |= {
                moved.name
                for moved in call.slots
                if moved.source in written and any(began == step for began, _ in moved.lives)
            }
            written |= {slot for slot, _ in variant.writes}

    @property
    def calls(self) -> tuple[CallSchedule, ...]:
        """Return what the one or two calls of each step do, in their order."""
        none = ((),) * len(self.schedule)
        first = CallSchedule(
            schedule=self.schedule, slots=self.slots, factors=self.factors, adopted=none
        )
        return (first,) if self.second is None else (first, self.second)

    @property
    def halved(self) -> bool:
        """Return whether some steps have one half of a guided step's batch."""
        sampler = self.sampler
        return sampler.cfg_layout.batched and CfgLayout.NONE in sampler.layouts

    @property
    def halved_graphs(self) -> frozenset[str]:
        """Return the files of the graphs that run with one half of a guided step's batch."""
        pairs = zip(self.schedule, self.sampler.layouts, strict=True)
        run = [self.variants[index].file for index, at in pairs if at is CfgLayout.NONE]
        run += [self.hoisted.file] if self.hoisted else []
        return frozenset(run if self.halved else ())

    @property
    def scheduled(self) -> tuple[int, ...]:
        """Return the variant of each call of a generation, in their order."""
        steps = zip(*(call.schedule for call in self.calls), strict=True)
        return tuple(variant for step in steps for variant in step if variant is not None)

    @property
    def every_slot(self) -> tuple[SlotSpec, ...]:
        """Return the slots of both calls, each once; their lives are one call's."""
        found = {slot.name: slot for call in reversed(self.calls) for slot in call.slots}
        return tuple(found.values())

    @property
    def format(self) -> Format:
        """Return what the graphs are written as."""
        return Format.PT2 if self.packages else Format.ONNX

    @property
    def graphs(self) -> tuple[VariantSpec, ...]:
        """Return the graphs of the variants, and that of the hoisted values if there are any."""
        return (*self.variants, *([self.hoisted] if self.hoisted else []))

    def graph_outputs(self, graph: VariantSpec) -> tuple[str, ...]:
        """Return the names of a graph's outputs, in order; hoisted values are slots alone."""
        results = () if graph is self.hoisted else self.outputs
        return (*(spec.name for spec in results), *(name for _, name in graph.writes))

    def save(self, folder: Path) -> None:
        """Write the manifest, the last file of a bundle: without it there is no bundle."""
        write_text_atomically(folder / MANIFEST, manifest_text(json.loads(self.model_dump_json())))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the bundle in ``folder``; the other files are not touched.

    Raises:
        ConfigError: there is none, it is of another version, or it is not valid.
    """
    root = standing(Path(folder))
    return parse_manifest(read_manifest_text(root), repr_path(root / MANIFEST))


def read_manifest_text(root: Path) -> str:
    """Return the text of the manifest in ``root``.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    path = root / MANIFEST
    if not os.path.lexists(path):
        raise ConfigError("there is no bundle", where=repr_path(path), remedy=EXPORT_AGAIN)
    return read_text(path, "the manifest", EXPORT_AGAIN, most_bytes=_MOST_BYTES)


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest that ``text`` holds; errors as in ``read_manifest``."""
    data = parse_json(text, where, "the manifest", EXPORT_AGAIN)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in READABLE or isinstance(version, (bool, float)):
        raise ConfigError(
            "the bundle is of another schema version",
            where=f"{where}: schema_version",
            got=repr(version)[:80],
            expected=" or ".join(map(str, READABLE)),
            remedy=f"{EXPORT_AGAIN}, or use the ditfastattn that wrote it",
        )
    if data.pop(_SEAL, None) != _seal(data):
        raise ConfigError(
            "the manifest has changed since it was exported", where=where, remedy=EXPORT_AGAIN
        )
    return Manifest.from_json(data, where, EXPORT_AGAIN)


def manifest_text(data: Mapping[str, Any]) -> str:
    """Return the text of a manifest of this ``data``, with a hash that tells of any change."""
    rest = {key: item for key, item in data.items() if key != _SEAL}
    return json.dumps({**rest, _SEAL: _seal(rest)}, indent=1) + "\n"


def manifest_schema() -> str:
    """Return the JSON schema of a manifest, as docs/bundle-manifest.schema.json has it."""
    schema = Manifest.model_json_schema()
    seal = {"description": "Of all other entries.", "pattern": "^[0-9a-f]{64}$", "type": "string"}
    schema["properties"][_SEAL] = seal
    schema["required"].append(_SEAL)
    return json.dumps(schema, indent=1) + "\n"


def _seal(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
