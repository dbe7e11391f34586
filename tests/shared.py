"""What tests share by content, each made once: plans, bundles, engines, captures, rewritten graphs.

Plans, bundles and engines lie in a folder that the processes of one run share; the process that
needs one first makes it, the others wait for it. Captures and rewritten graphs are shared within a
process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.fx import GraphModule

from ditfastattn.core.env import read_knobs
from ditfastattn.export.capture_call import CapturedCall, RecordedCall
from ditfastattn.export.tensorrt.job import WORKER, Job, run_job
from ditfastattn.export.to_onnx import content_hash
from ditfastattn.export.weights import raw_bytes
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.plain_tensors import parts, settings_of
from ditfastattn.passes.graph.ir import clone, constant_tensors, graph_text
from ditfastattn.runtime.bundle.manifest import file_hash
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.steppers import EagerVariant, Variants

store = Path()  # the processes' folder, which conftest names

_SMALL: Final = 2_000_000  # parameters of a model whose captures are kept in memory

Progress = Callable[[str, float], None]


def made_once(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of ``key``, which ``make`` fills where no process of this run has."""
    folder = store / kind / hashlib.sha256(key.encode()).hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            growing = folder.with_name(folder.name + ".partial")
            shutil.rmtree(growing, ignore_errors=True)
            growing.mkdir()
            make(growing)
            growing.rename(folder)
    return folder


def digest(item: Any) -> str:
    """Return a hash of the content of tensors, modules and of what holds them."""
    hashed = hashlib.sha256()
    _feed(hashed, item)
    return hashed.hexdigest()


def _feed(hashed: Any, item: Any) -> None:
    if isinstance(item, nn.Module):
        hashed.update(repr([_attributes(module) for module in item.modules()]).encode())
        item = {**dict(item.named_parameters()), **dict(item.named_buffers())}
    if isinstance(item, Tensor):
        for name, part in parts(item, type(item).__name__):  # of which quantized ones are made
            hashed.update(f"{name}{part.shape}{part.dtype}{part.stride()}".encode())
            hashed.update(raw_bytes(part))
        hashed.update(repr(settings_of(item)).encode())
    elif isinstance(item, Mapping):
        for name, part in item.items():
            hashed.update(str(name).encode())
            _feed(hashed, part)
    elif isinstance(item, (tuple, list)):
        hashed.update(str(len(item)).encode())
        for part in item:
            _feed(hashed, part)
    else:
        hashed.update(repr(item).encode())


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """Return the plain attributes of ``module``, and the types of the others."""
    found = [("", type(module).__qualname__)]
    for name, item in sorted(vars(module).items()):
        plain = isinstance(item, (bool, int, float, str, tuple, dict)) and name[0] != "_"
        found.append((name, repr(item) if plain else type(item).__qualname__))
    return found


_captured: dict[str, tuple[CapturedCall, str]] = {}


def captured_once(capture: Callable[..., CapturedCall]) -> Callable[..., CapturedCall]:
    """Return ``capture``, which takes each small model and call once: nobody changes a capture.

    Its weights are those of the model that was captured first, which its test may write to.
    """

    def once(model: nn.Module, call: RecordedCall, timestep: str = "timestep") -> CapturedCall:
        if sum(parameter.numel() for parameter in model.parameters()) > _SMALL:
            return capture(model, call, timestep)
        modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
        key = digest([capture.__name__, model, modules, call.arguments])
        found, content = _captured.get(key, (None, ""))
        if found is None or digest(found.tensors) != content:
            found = capture(model, call, timestep)
            _captured[key] = found, digest(found.tensors)
        return found

    return once


_graphs: dict[str, CapturedGraph] = {}


def capture_once(capture: Callable[..., CapturedGraph]) -> Callable[..., CapturedGraph]:
    """Return ``capture``, which traces each graph of Dynamo's once for inputs of equal form.

    What it returns is a copy, as nobody else's: weights are inputs of such a graph.
    """

    def once(
        module: GraphModule,
        inputs: Sequence[GraphInput],
        args: Sequence[object],
        constants: Container[int] = (),
    ) -> CapturedGraph:
        held = [
            getattr(module, str(node.target)) for node in module.graph.find_nodes(op="get_attr")
        ]
        kinds = {type(item) for item in (*args, *held)}
        if not kinds <= {Tensor, nn.Parameter, nn.Buffer, bool, int, float}:
            return capture(module, inputs, args, constants)
        forms = [
            _form(item) if isinstance(item, Tensor) and index not in constants else item
            for index, item in enumerate(args)
        ]
        marks = [node.meta.get("tensor_dict") for node in module.graph.find_nodes(op="placeholder")]
        modes = torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), read_knobs()
        key = digest([str(module.graph), held, inputs, forms, repr(marks), modes])
        if key not in _graphs:
            _graphs[key] = capture(module, inputs, args, constants)
        return replace(_graphs[key], module=clone(_graphs[key].module))

    return once


def _form(tensor: Tensor) -> tuple[Any, ...]:
    kind = tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), *kind


_rewritten: dict[str, dict[tuple[Any, ...], EagerVariant]] = {}


def share_rewritten(variants: Variants, session: Session) -> None:
    """Let ``variants`` know what other searches have rewritten of an equal graph."""
    _begin_variants(variants, session)
    module = session.captured.module
    inputs = [(entry.name, entry.static) for entry in session.captured.inputs]
    names = [site.name for site in session.sites]
    graph = graph_text(module.graph), constant_tensors(module)
    key = digest([graph, inputs, names, session.layout, read_knobs()])
    variants._known = _rewritten.setdefault(key, {})


_begin_variants = Variants.__init__


def run_job_once(
    job: Job, time_limit: float, on_progress: Progress, lock: int | None = None
) -> None:
    """Build an engine, or take one of the same graph, weights, target and shapes with its log."""
    graph = json.loads(job.request())
    for path in ("onnx", "engine", "log"):
        del graph[path]
    weights = job.graph.with_name("weights.bin")
    content = [file_hash(path) for path in (WORKER, weights) if path.exists()]
    content.append(content_hash(job.graph))

    def make(folder: Path) -> None:
        told: list[tuple[str, float]] = []
        made = Job(
            job.library,
            job.graph,
            folder / "engine",
            folder / "log",
            job.target,
            job.profiles,
        )
        run_job(made, time_limit, lambda phase, done: told.append((phase, done)), lock)
        (folder / "progress.json").write_text(json.dumps(told))

    folder = made_once("engines", json.dumps([graph, content]), make)
    for phase, done in json.loads((folder / "progress.json").read_text()):
        on_progress(phase, done)
    shutil.copy(folder / "log", job.log)
    shutil.copy(folder / "engine", job.engine)
