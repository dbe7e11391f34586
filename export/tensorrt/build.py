"""Build a bundle's TensorRT engines; existing ones are kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import onnx
import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import make_folder, naming_faults, sweep, temporary_beside
from ditfastattn.core.locks import sole_writer
from ditfastattn.export.lint import lint, nodes_of
from ditfastattn.export.tensorrt.build_log import BuildLog, read_log
from ditfastattn.export.tensorrt.job import WORKER, Job, Profile, run_job
from ditfastattn.export.tensorrt.options import BuildOptions, choose_layout, rows_of
from ditfastattn.export.tensorrt.switch import make_switch
from ditfastattn.export.to_onnx import content_hash
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.manifest import Manifest, file_hash
from ditfastattn.runtime.bundle.specs import FileSpec, TensorSpec, VariantSpec
from ditfastattn.runtime.tensorrt.engines import (
    ENGINES_FOLDER,
    SWITCH_FILE,
    Engines,
    EngineSpec,
    Layout,
    SwitchSpec,
    read_engine,
    read_engines,
)
from ditfastattn.runtime.tensorrt.library import CURRENT, Library, find_library

__all__ = ["BuildOptions", "Layout", "build"]

_LARGEST: Final = 1.2  # size of a switch's engine, relative to the weights
_SHOWN: Final = 3  # errors and warnings of one build


def build(folder: str | os.PathLike[str], options: BuildOptions | None = None) -> Engines:
    """Build engines from the bundle in ``folder``, into its folder ``engines/<target>``.

    Returns:
        What was built, as ``engines.json`` holds it; each engine's log lies beside it.

    Raises:
        ConfigError: the bundle is incomplete; TensorRT is absent, or cannot build for the target.
        EngineError: a build failed; engines built before are kept.
    """
    chosen = options or BuildOptions()
    bundle = open_bundle(folder)
    root, manifest = bundle.root, bundle.manifest
    library = find_library(chosen.library)
    _check_target(library, chosen.target)
    layout, reason = choose_layout(root, manifest, chosen)
    out = root / ENGINES_FOLDER / chosen.target
    make_folder(out)
    what, remedy = "another build is writing these engines", "wait for it, or stop it"
    with sole_writer(out / ".lock", out, what, remedy) as lock:
        sweep(out)
        builder = _Builder(bundle, library, chosen, out, lock)
        several = len(manifest.variants) > 1
        if several and chosen.layout is Layout.AUTO and layout is Layout.VARIANTS:
            first = builder.first()
            layout, reason = choose_layout(root, manifest, chosen, first)
        return builder.build(layout, reason)


def _check_target(library: Library, target: str) -> None:
    if target not in library.targets:
        raise ConfigError(
            f"{library.name} cannot build for this target",
            got=target,
            expected=", ".join(library.targets),
        )
    if target == CURRENT and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here to build for",
            got=CURRENT,
            expected=", ".join(name for name in library.targets if name != CURRENT)
            or "a machine with a GPU",
            remedy="name the target's compute capability (--target sm89), or build on its machine",
        )


@dataclass(frozen=True)
class _Graph:
    """Hold a graph to build from, and its inputs whose shapes may depend on the batch."""

    name: str
    path: Path
    inputs: Mapping[str, TensorSpec]


@contextmanager
def _graphs(
    root: Path, manifest: Manifest, layout: Layout, rows: int
) -> Generator[tuple[list[_Graph], SwitchSpec | None]]:
    """Yield the graphs that the layout's engines are built from."""
    specs: dict[str, TensorSpec] = {slot.name: slot for slot in manifest.every_slot}
    specs |= {spec.name: spec for spec in manifest.inputs}

    def of(variant: VariantSpec) -> _Graph:
        inputs = {name: specs[name] for name in variant.inputs}
        inputs |= {name: specs[slot] for slot, name in variant.reads if slot in specs}
        return _Graph(variant.file, root / variant.file, inputs)

    if layout is Layout.LOOP:
        assert manifest.loop is not None  # the layout was checked
        given = {spec.name: spec for spec in (manifest.loop.noise, *manifest.loop.conditions)}
        yield [_Graph(manifest.loop.file, root / manifest.loop.file, given)], None
        return
    once = [] if manifest.hoisted is None else [of(manifest.hoisted)]
    if layout is Layout.VARIANTS:
        yield [*map(of, manifest.variants), *once], None
        return
    made = make_switch(root, manifest, rows)
    # Beside the weights, which the graph names by a relative path.
    with temporary_beside(root / SWITCH_FILE) as path:
        with naming_faults(path):
            path.write_bytes(made.model.SerializeToString())
        yield [_Graph(SWITCH_FILE, path, {}), *once], made.spec  # its batch is fixed


class _Builder:
    def __init__(
        self,
        bundle: OpenBundle,
        library: Library,
        options: BuildOptions,
        out: Path,
        lock: int,
    ) -> None:
        self._bundle, self._lock = bundle, lock
        self._root, self._manifest, self._library = bundle.root, bundle.manifest, library
        self._options, self._out = options, out
        self._known = _known(out)

    def first(self) -> int:
        """Build the first variant's engine alone; return its size in bytes."""
        layout = Layout.VARIANTS
        engines = self._described(layout, "the first of them is measured", None)
        with _graphs(self._root, self._manifest, layout, engines.rows[1]) as (graphs, _):
            made = self._engine(graphs[0], engines)
        self._known[made.key] = made
        return made.content.bytes

    def build(self, layout: Layout, reason: str) -> Engines:
        """Build one engine after another, and list each in ``engines.json``."""
        rows = rows_of(self._manifest, self._options.images, layout)
        with _graphs(self._root, self._manifest, layout, rows[1]) as (graphs, switch):
            engines = self._described(layout, reason, switch)
            for graph in graphs:
                made = self._engine(graph, engines)
                engines = engines.model_copy(update={"engines": (*engines.engines, made)})
                engines.save(self._out)
        kept = {spec.file for spec in engines.engines}
        for path in self._out.glob("*.engine"):
            if path.name not in kept:
                path.unlink()
                path.with_suffix(".log").unlink(missing_ok=True)
        for path in self._out.glob("*.engine.partial"):
            path.unlink()  # of workers that were killed
        return engines

    def _described(self, layout: Layout, reason: str, switch: SwitchSpec | None) -> Engines:
        """Return the description of engines, of which none is built yet."""
        target = self._options.target
        return Engines(
            library=self._library.name,
            version=self._library.version,
            target=target,
            device=torch.cuda.get_device_name() if target == CURRENT else "",
            layout=layout,
            reason=reason,
            rows=rows_of(self._manifest, self._options.images, layout),
            manifest_sha256=self._bundle.manifest_sha256,
            switch=switch,
        )

    def _engine(self, graph: _Graph, engines: Engines) -> EngineSpec:
        lint(graph.path)
        options = self._options
        profiles = self._profiles(graph, engines.rows)
        key = self._key(graph, engines, profiles)
        if key in self._known:
            options.on_progress(graph.name, "exists already", 1.0)
            return self._known[key]
        file = f"{Path(graph.name).stem}-{key[:12]}.engine"
        engine = self._out / file
        log = engine.with_suffix(".log")
        job = Job(engines.library, graph.path, engine, log, engines.target, profiles)
        began = time.monotonic()
        self._bundle.check_in_place()  # the builder opens files by their names
        run_job(job, options.time_limit, partial(options.on_progress, graph.name), self._lock)
        self._bundle.check_in_place()
        content = FileSpec(bytes=engine.stat().st_size, sha256=file_hash(engine))
        found = read_log(log)
        model = onnx.load(str(graph.path), load_external_data=False)
        # Every softmax of an exported graph is an attention's.
        wanted = [node.name for node in nodes_of(model.graph) if node.op_type == "Softmax"]
        return EngineSpec(
            file=file,
            graph=graph.name,
            key=key,
            content=content,
            seconds=round(time.monotonic() - began, 1),
            attentions=len(wanted),
            fused=len(found.attentions),
            findings=tuple(self._findings(wanted, found, content.bytes, engines.layout)),
        )

    def _profiles(self, graph: _Graph, rows: tuple[int, int, int]) -> dict[str, Profile]:
        """Return the shapes of the inputs that depend on the batch."""
        if self._manifest.fixed_batch:
            return {}
        least, usual, most = rows
        if graph.name in self._manifest.halved_graphs:
            least //= 2
        return {
            name: (spec.sizes(least), spec.sizes(usual), spec.sizes(most))
            for name, spec in graph.inputs.items()
            if any(not isinstance(size, int) for size in spec.shape)
        }

    def _key(self, graph: _Graph, engines: Engines, profiles: Mapping[str, Profile]) -> str:
        parts = {
            "builder": file_hash(WORKER),  # it sets the builder's flags
            "graph": content_hash(graph.path),
            "weights": self._manifest.files[self._manifest.weights].sha256,
            "library": [engines.library, engines.version],
            "target": [engines.target, engines.device],
            "profiles": profiles,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _findings(self, wanted: list[str], found: BuildLog, size: int, layout: Layout) -> list[str]:
        lines = [f"error: {message}" for message in found.errors[:_SHOWN]]
        lines += [f"warning: {message}" for message in dict.fromkeys(found.warnings[:_SHOWN])]
        missing = len(wanted) - len(found.attentions)
        if missing > 0:
            why = self._manifest.model.dtype == "float32"
            remedy = ": fp32 is not fused, export in float16 or bfloat16" if why else ""
            lines.append(
                f"{missing} of {len(wanted)} attentions are not one fused kernel each{remedy}"
            )
        weights = self._manifest.files[self._manifest.weights].bytes
        if layout is Layout.SWITCH and size > _LARGEST * weights:
            lines.append(f"the engine is {size / weights:.2f} times as large as the weights")
        return lines


def _known(out: Path) -> dict[str, EngineSpec]:
    """Return the engines in ``out`` that are complete, by their keys."""
    try:
        before = read_engines(out).engines
    except ConfigError:
        return {}
    found: dict[str, EngineSpec] = {}
    for spec in before:
        try:
            read_engine(out, spec)
        except ConfigError:
            continue
        found[spec.key] = spec
    return found
