"""Compile a graph for any batch, though the passes fixed one: its sizes become symbols again.

Two captures show which numbers are multiples of the batch (see ``export.batch``). Each becomes a
size that is read off an input, and ``torch.export`` traces the graph once more with these free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Final

from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.node import map_aggregate

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.aoti.constants import PackageGraph
from ditfastattn.export.aoti.program import traced
from ditfastattn.export.batch import FIX_BATCH, BatchSize, Shape
from ditfastattn.export.emitter import Value
from ditfastattn.export.step_graphs import StepGraph
from ditfastattn.passes.graph.ir import aten

_MOST: Final = 2**16  # images, so that no size overflows


def contiguous_strides(value: Value) -> Shape:
    """Return the strides of a contiguous tensor of this shape.

    Raises:
        ConfigError: a stride grows with the square of the batch.
    """
    found: list[int | BatchSize] = []
    step = BatchSize(Fraction(1))
    power = 0
    for size in reversed(value.shape):
        if power > 1:
            raise ConfigError(
                "a stride grows with the square of the batch", where=value.name, remedy=FIX_BATCH
            )
        found.append(step if power else int(step.factor))
        factor = size.factor if isinstance(size, BatchSize) else size
        power += isinstance(size, BatchSize)
        step = BatchSize(step.factor * factor)
    return tuple(reversed(found))


def free_batch(
    step: StepGraph, ready: PackageGraph, inputs: Sequence[Value], examples: Sequence[Tensor]
) -> ExportedProgram:
    """Return ``ready`` with a free batch; ``inputs`` describes its own, ``examples`` hold some.

    Raises:
        ConfigError: no input shows the batch, or torch needs to know it.
    """
    if all(isinstance(size, int) for value in inputs for size in value.shape):
        _check_independent(step, ready)
        return traced(ready.module, examples)
    _read_sizes(step, ready, inputs)
    unit = Fraction(1, _least_batch(step))
    free = Dim("unit", min=1, max=_MOST)

    def dims(value: Value) -> dict[int, Any]:
        found = enumerate(value.shape)
        return {i: _times(free, s.factor / unit) for i, s in found if isinstance(s, BatchSize)}

    return traced(ready.module, examples, [dims(value) for value in inputs], FIX_BATCH)


def _check_independent(step: StepGraph, ready: PackageGraph) -> None:
    """Refuse a graph whose values depend on the batch though no input does."""
    symbols = step.source.symbols
    for node in ready.copies:
        parts = symbols.args.get(node), symbols.kwargs.get(node), symbols.shapes.get(node)
        if next(_sizes(parts), None) is not None:
            raise ConfigError(
                "a part of the graph makes the batch up",
                where=f"node {node.name}",
                expected="an input whose size shows the batch",
                remedy=FIX_BATCH,
            )


def _read_sizes(step: StepGraph, ready: PackageGraph, inputs: Sequence[Value]) -> None:
    """Replace in place each number that is a multiple of the batch by a size of an input."""
    graph, symbols = ready.module.graph, step.source.symbols
    placeholders = graph.find_nodes(op="placeholder")
    source, dim, factor = next(
        (node, dim, size.factor)
        for node, value in zip(placeholders, inputs, strict=True)
        for dim, size in enumerate(value.shape)
        if isinstance(size, BatchSize)
    )
    made: dict[Fraction, Node] = {}
    with graph.inserting_after(placeholders[-1]):
        whole = graph.call_function(aten.sym_size.int, (source, dim))
    last = whole

    def size(wanted: BatchSize) -> Node:
        nonlocal last
        ratio = wanted.factor / factor
        if ratio not in made:
            with graph.inserting_after(last):
                last = graph.call_function(operator.mul, (whole, ratio.numerator))
            if ratio.denominator != 1:
                with graph.inserting_after(last):
                    last = graph.call_function(operator.floordiv, (last, ratio.denominator))
            made[ratio] = last
        return made[ratio]

    def place(item: Any) -> Any:
        if isinstance(item, BatchSize):
            return size(item)
        return ready.copies[item] if isinstance(item, Node) else item

    for original, copy in ready.copies.items():
        if copy.op == "call_function":
            copy.args = map_aggregate(symbols.args[original], place)
            copy.kwargs = map_aggregate(symbols.kwargs[original], place)
    ready.module.recompile()


def _times(free: Any, factor: Fraction) -> Any:
    return free if factor == 1 else int(factor) * free


def _least_batch(step: StepGraph) -> int:
    """Return what a batch must be a multiple of for all sizes of the graph to be whole."""
    shapes = step.source.symbols.shapes.values()
    return math.lcm(1, *(size.factor.denominator for size in _sizes(tuple(shapes))))


def _sizes(item: Any) -> Iterator[BatchSize]:
    if isinstance(item, (tuple, dict)):
        for part in item.values() if isinstance(item, dict) else item:
            yield from _sizes(part)
    elif isinstance(item, BatchSize):
        yield item
