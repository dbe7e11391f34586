"""Make the ONNX graphs of a bundle: one per distinct step, and the hoisted values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import onnx
import torch
from torch.fx import Graph, GraphModule, Node

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import BatchSize, Shape, Symbols, find_batch
from ditfastattn.export.capture_call import CapturedCall
from ditfastattn.export.complex_numbers import split_complex
from ditfastattn.export.decompose import decompose_unknown
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators import RULES
from ditfastattn.export.to_onnx import GraphSource, emit, finish
from ditfastattn.export.weights import Weights
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.routed_experts import inline_blocks
from ditfastattn.passes.graph.ir import aten, calls, outputs
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.rewrites.hoist_invariants import hoisted_graph
from ditfastattn.passes.rewrites.merge_linears import merge_linears
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.runtime.bundle.graph_size import measure
from ditfastattn.runtime.bundle.specs import (
    BATCH,
    Dtype,
    GraphSize,
    Multiple,
    TensorSpec,
    VariantSpec,
)

NO_METADATA: Mapping[str, str] = MappingProxyType({})
Form = Callable[[GraphModule, Sequence[int]], None]  # the positions of static inputs


def onnx_form(module: GraphModule, static: Sequence[int]) -> None:
    """Leave only operators that have an ONNX form, and linears of one input as one."""
    _forget_layouts(module.graph)
    split_complex(module, static)
    decompose_unknown(module, RULES.keys(), static)
    merge_linears(module, static)


def _forget_layouts(graph: Graph) -> None:
    """Drop copies that change how a tensor lies in memory alone, which ONNX does not know.

    One row is contiguous however it lies in memory, so at another batch a graph may lack them::

        %2 = aten.contiguous.default(%1)          %3 = aten.reshape.default(%1, [2, 16, 32])
        %3 = aten.view.default(%2, [2, 16, 32])
    """
    for node in calls(graph, aten.view.default):
        node.target = aten.reshape.default  # a view of what was contiguous
    for node in calls(graph, aten.contiguous.default):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)


@dataclass(frozen=True)
class Captures:
    """Hold one model captured at two batch sizes; one capture twice if the batch is fixed."""

    first: CapturedCall
    second: CapturedCall
    batches: tuple[int, int]
    sites: tuple[tuple[Site, ...], tuple[Site, ...]]

    @property
    def fixed(self) -> bool:
        """Return whether the batch is fixed."""
        return self.first is self.second


@dataclass(frozen=True)
class StepGraph:
    """Hold a rewritten graph, of one step or the hoisted values, ready to be written as ONNX.

    ``results`` are the outputs of the model; ``written`` those for the slots ``writes``.
    """

    source: GraphSource
    inputs: tuple[Value, ...]
    reads: tuple[str, ...]
    results: tuple[Value, ...]
    writes: tuple[str, ...]
    written: tuple[Value, ...]


def variant_graph(
    captures: Captures,
    actions: Sequence[SiteAction],
    layout: CfgLayout,
    per_generation: tuple[str, ...],
    label: str,
    form: Form = onnx_form,
) -> StepGraph:
    """Return the graph of one step variant, in the ``form`` that it is written in."""
    first = rewrite(captures.first.graph, captures.sites[0], actions, layout, label, per_generation)
    if captures.fixed:
        return _step_graph(captures, first, first, form)
    graph, sites = captures.second.graph, captures.sites[1]
    second = rewrite(graph, sites, actions, layout, label, per_generation)
    return _step_graph(captures, first, second, form)


def hoisted_graph_of(
    captures: Captures, nodes: tuple[str, ...], form: Form = onnx_form
) -> StepGraph:
    """Return the graph of what is computed once per generation."""
    first = hoisted_graph(captures.first.graph, nodes)
    second = first if captures.fixed else hoisted_graph(captures.second.graph, nodes)
    return _step_graph(captures, first, second, form)


def _step_graph(
    captures: Captures, first: GraphModule, second: GraphModule, form: Form
) -> StepGraph:
    positions = [i for i, entry in enumerate(captures.first.graph.inputs) if entry.static]
    for module in (first,) if second is first else (first, second):
        inline_blocks(module)
        form(module, positions)
    symbols = find_batch(first, second, captures.batches)
    graph = first.graph
    placeholders = graph.find_nodes(op="placeholder")
    entries = captures.first.graph.inputs
    static = {
        index: (entry.name, captures.first.tensors[index])
        for index, entry in enumerate(entries)
        if entry.static
    }
    slots = tuple(map(str, read_slots(graph)))
    names = [*(entry.name for entry in entries), *slots]
    pairs = _complex_inputs(captures.first)
    inputs = [
        Value(name, _shape(symbols, node), node.meta["val"].dtype, pairs=name in pairs)
        for index, (name, node) in enumerate(zip(names, placeholders, strict=True))
        if index not in static
    ]
    writes = tuple(map(str, written_slots(graph)))
    returned = [node for node in outputs(graph) if isinstance(node, Node)]
    count = len(returned) - len(writes)
    names = [*output_names(count), *writes]
    results = [
        Value(name, _shape(symbols, node), node.meta["val"].dtype)
        for name, node in zip(names, returned, strict=True)
    ]
    return StepGraph(
        GraphSource(first, symbols, static),
        tuple(inputs),
        slots,
        tuple(results[:count]),
        writes,
        tuple(results[count:]),
    )


def _complex_inputs(captured: CapturedCall) -> set[str]:
    placeholders = captured.graph.module.graph.find_nodes(op="placeholder")
    named = zip(captured.graph.inputs, placeholders, strict=True)
    return {entry.name for entry, node in named if node.meta["val"].is_complex()}


def output_names(count: int) -> tuple[str, ...]:
    """Name the model's outputs."""
    return ("sample",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def _shape(symbols: Symbols, node: Node) -> Shape:
    shape: Any = symbols.shapes[node]
    return tuple(shape)


def written_name(slot: str) -> str:
    """Name the graph output that is the new content of ``slot``."""
    return f"{slot}.new"


def used_inputs(step: StepGraph) -> list[Value]:
    """Return the inputs that the graph needs."""
    nodes = step.source.module.graph.find_nodes(op="placeholder")
    given = [node for index, node in enumerate(nodes) if index not in step.source.static]
    return [value for value, node in zip(step.inputs, given, strict=True) if node.users]


def batch_source(inputs: Sequence[Value]) -> str:
    """Return the first of ``inputs`` whose first dimension is the batch, "" without one."""
    whole = BatchSize(Fraction(1))
    return next((v.name for v in inputs if v.shape and v.shape[0] == whole), "")


def write_graph(
    step: StepGraph, weights: Weights, name: str, about: Mapping[str, str] = NO_METADATA
) -> onnx.ModelProto:
    """Return the ONNX model of ``step``; its weights are appended to ``weights``.

    ``about`` says what it is, for the graph's metadata.
    """
    used = used_inputs(step)
    emitter = Emitter(weights, batch=batch_source(used))
    returned = emit(emitter, step.source, step.inputs)
    labels = [*(value.name for value in step.results), *map(written_name, step.writes)]
    return finish(emitter, name, used, list(zip(labels, returned, strict=True)), BATCH, about)


def describe(step: StepGraph, path: Path) -> VariantSpec:
    """Return the manifest's entry of ``step``, which was written to ``path``."""
    used = {value.name for value in used_inputs(step)}
    return VariantSpec(
        file=path.name,
        size=size_of(path, used_inputs(step)),
        inputs=tuple(v.name for v in step.inputs if v.name in used and v.name not in step.reads),
        reads=tuple((slot, slot) for slot in step.reads if slot in used),
        writes=tuple((slot, written_name(slot)) for slot in step.writes),
    )


def size_of(path: Path, inputs: Sequence[Value]) -> GraphSize:
    """Return how large the graph in ``path`` is."""
    return measure(onnx.load(str(path), load_external_data=False), [*map(spec, inputs)])


def spec(value: Value) -> TensorSpec:
    """Return the manifest's description of a value.

    Raises:
        ConfigError: it is empty, as what a model picks by a mask that hides all.
    """
    if 0 in value.shape:
        raise ConfigError(
            "a value that the graphs of a bundle hand on is empty",
            where=value.name,
            got=list(value.shape),
            expected="at least one element",
            remedy="export with inputs that are used, or run the plan in torch, by "
            "accelerate(pipeline, plan)",
        )
    return TensorSpec(
        name=value.name,
        shape=sizes(value.shape),
        dtype=dtype_name(value.dtype),
        pairs=value.pairs,
    )


def sizes(shape: Shape) -> tuple[int | Multiple, ...]:
    """Return a shape as the manifest holds it."""
    return tuple(
        size
        if isinstance(size, int)
        else Multiple(numerator=size.factor.numerator, denominator=size.factor.denominator)
        for size in shape
    )


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Return ``float32`` for ``torch.float32``."""
    return cast(Dtype, str(dtype).removeprefix("torch."))
