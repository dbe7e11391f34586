"""The loop as a server takes it: one row per image in each input, so that requests can be joined.

A bundle's loop takes the conditions of both guidance branches as the rows of one input. Rows of
several requests, one after another, would mix the branches. So each condition becomes two inputs::

    before:  noise [N, ...]  labels [2N]                               -> latents [N, ...]
    after:   noise [N, ...]  labels [N]  unconditional_labels [N]      -> latents [N, ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from onnx import ModelProto, helper

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.specs import ELEMENT_TYPES, LoopSpec, Multiple, TensorSpec

UNCONDITIONAL: Final = "unconditional_"  # begins the name of that branch's condition
_ONE: Final = Multiple(numerator=1, denominator=1)


@dataclass(frozen=True)
class Ports:
    """Hold a model's inputs and its output.

    Attributes:
        inputs: the noise, then the conditions.
        latents: the output.
        joinable: whether the first dimension of each is the images, so that requests can be joined.
    """

    inputs: tuple[TensorSpec, ...]
    latents: TensorSpec
    joinable: bool


def ports_of(manifest: Manifest, loop: LoopSpec) -> Ports:
    """Return the inputs and the output of the model of ``loop``.

    Where the batch is fixed, or an input does not have one row per image and guidance branch, they
    are those of the loop.
    """
    branches = 2 if manifest.sampler.cfg_layout.batched else 1
    image = Multiple(numerator=1, denominator=branches)
    if not all(_has_rows(spec, _ONE) for spec in loop.conditions) or not _has_rows(
        loop.noise, image
    ):
        tensors = (loop.noise, *loop.conditions)
        return Ports(tensors, _renamed(loop.noise, loop.latents), joinable=False)
    conditions = tuple(
        _per_image(_renamed(spec, name))
        for spec in loop.conditions
        for name in _names(spec.name, manifest.sampler.cfg_layout)
    )
    noise = _per_image(loop.noise)
    return Ports((noise, *conditions), _renamed(noise, loop.latents), joinable=True)


def graph_of(model: ModelProto, manifest: Manifest, loop: LoopSpec) -> ModelProto:
    """Return the graph of the loop in ``model``, changed to the inputs of ``ports_of``."""
    ports, layout = ports_of(manifest, loop), manifest.sampler.cfg_layout
    if not ports.joinable:
        return model
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    if layout.batched:
        rows = {spec.name: f"{spec.name}/rows" for spec in loop.conditions}
        for node in graph.node:
            node.input[:] = [rows.get(name, name) for name in node.input]
        for place, (name, joined) in enumerate(rows.items()):
            both = _names(name, layout)
            given = both if layout is CfgLayout.COND_FIRST else both[::-1]
            graph.node.insert(place, helper.make_node("Concat", given, [joined], joined, axis=0))
    _declare(graph.input, ports.inputs)
    _declare(graph.output, [ports.latents])
    return changed


def _has_rows(spec: TensorSpec, rows: Multiple) -> bool:
    """Return whether the first dimension, and no other, is of the batch: that many rows."""
    first, *others = spec.shape or (1,)
    return first == rows and not any(isinstance(size, Multiple) for size in others)


def _names(condition: str, layout: CfgLayout) -> list[str]:
    return [condition, f"{UNCONDITIONAL}{condition}"] if layout.batched else [condition]


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return spec.model_copy(update={"name": name})


def _per_image(spec: TensorSpec) -> TensorSpec:
    return spec.model_copy(update={"shape": (_ONE, *spec.shape[1:])})


def _declare(values: Any, specs: Sequence[TensorSpec]) -> None:
    del values[:]
    values.extend(
        helper.make_tensor_value_info(spec.name, ELEMENT_TYPES[spec.torch_dtype], spec.dims)
        for spec in specs
    )
