"""What a traced graph takes for granted of its inputs, to be checked before it runs.

Where a model reads a mask or a length, the trace has followed what it read, and the value is a
constant of the graph::

    %2 = aten.nonzero.default(%mask): int64[5, 1]   ->   a constant, and a guard on nonzero(mask)

A guard computes the value anew from the inputs of a call and compares it with the trace's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.capture.captured_graph import GraphInput

_SHOWN = 8  # elements of a value, in a message


@dataclass(frozen=True)
class HostRead:
    """Say what is read of which inputs, by what, and in which line of the model."""

    inputs: tuple[str, ...]
    what: str
    line: str

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.what} of {' and '.join(self.inputs)} ({self.line})"


@dataclass(frozen=True)
class GuardFailure:
    """A read that gives another value than in the trace."""

    read: HostRead
    got: str
    expected: str

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.read}: got {self.got}, expected {self.expected}"


class Guards:
    """Compute what a model reads of its inputs, and compare it with what the trace has read."""

    def __init__(
        self, module: GraphModule, reads: Sequence[HostRead], positions: Sequence[int]
    ) -> None:
        """Take the graph of the values read, of the flat inputs at ``positions``."""
        self.reads, self.positions = tuple(reads), tuple(positions)
        self._module = module
        self._expected: tuple[Tensor, ...] = ()

    def learn(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take the values that the flat inputs ``tensors`` give as the expected ones."""
        self._expected = tuple(item.clone() for item in self._values(tensors))
        return self._expected

    def failure(self, tensors: Sequence[Tensor]) -> GuardFailure | None:
        """Return the first read that differs for the flat inputs ``tensors``; None if none does."""
        values = self._values(tensors)
        for read, got, expected in zip(self.reads, values, self._expected, strict=True):
            if got.shape != expected.shape or not torch.equal(got, expected):
                return GuardFailure(read, *difference(got, expected))
        return None

    def _values(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.reads:
            return ()
        with torch.no_grad():
            found: Sequence[Tensor] = self._module(*(tensors[index] for index in self.positions))
        return found


def guards_of(
    module: GraphModule,
    inputs: Sequence[GraphInput],
    reads: Iterable[tuple[Node, str, str]],
) -> Guards:
    """Return guards of the values of nodes: each with what reads it, and the line."""
    known: dict[Node, tuple[str, str]] = {}
    for node, what, line in reads:
        known.setdefault(node, (what, line))
    needed = ancestors(known)
    placeholders = module.graph.find_nodes(op="placeholder")
    positions = [index for index, node in enumerate(placeholders) if node in needed]
    graph, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in known))
    names = dict(zip(placeholders, (entry.name for entry in inputs), strict=True))
    made: list[HostRead] = []
    for node, said in known.items():
        sources = ancestors([node])
        made.append(HostRead(tuple(names[one] for one in placeholders if one in sources), *said))
    return Guards(GraphModule(module, graph), made, positions)


def ancestors(nodes: Collection[Node]) -> set[Node]:
    """Return ``nodes`` and all that they are computed from."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def descendants(nodes: Collection[Node]) -> set[Node]:
    """Return ``nodes`` and all that is computed from them."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for node in pending.pop().users:
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def difference(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Return both values for people; of long ones, the part around the first difference."""
    if got.shape != expected.shape:
        return f"a value of shape {list(got.shape)}", f"shape {list(expected.shape)}"
    flat, other = got.flatten(), expected.flatten()
    first = int((flat != other).nonzero()[0])
    start = 0 if flat.numel() <= _SHOWN else first
    place = "" if start == 0 else f" from element {start}"
    parts = [item[start : start + _SHOWN].tolist() for item in (flat, other)]
    return f"{parts[0]}{place}", f"{parts[1]}{place}"
