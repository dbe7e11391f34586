"""Name cache slots, and attach them to graphs as inputs and outputs.

A slot is one tensor that a site hands from a step to later ones: its output at an exit node (after
the output projection), or its residual (full minus window attention, before the projection). A
graph that reads a slot has an input for it; a graph that writes one returns it after the model's
own outputs.

No graph writes an output of ``age`` 1 or more, the one that was replaced last and those before it:
the runtime renames them without copying. Factors are fp32 numbers that the schedule fixes. Hoisted
values are computed ahead of the steps, by a graph of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.graph.ir import add_input, add_output

_SLOT = "cache_slot"
_WRITES = "cache_writes"


class SlotKind(StrEnum):
    """Name what a slot holds."""

    OUTPUT = "output"  # of a site, at its exit node number ``index``
    RESIDUAL = "residual"  # of a site
    FACTOR = "factor"  # number ``index`` that a site combines earlier outputs with: fp32, no dims
    HOISTED = "hoisted"  # the value of a graph node, which ``site`` names


@dataclass(frozen=True)
class Slot:
    """Identify a slot; ``age`` counts the outputs computed since, 0 for the last one."""

    site: str
    kind: SlotKind
    index: int = 0
    age: int = 0

    def __str__(self) -> str:
        """Return the name in files: ``blocks.0.attn/output.0``, ``.../output.0@1`` before it."""
        number = f".{self.index}" if self.kind in (SlotKind.OUTPUT, SlotKind.FACTOR) else ""
        return f"{self.site}/{self.kind}{number}" + (f"@{self.age}" if self.age else "")

    @property
    def latest(self) -> Slot:
        """Return the slot that graphs write, from which this one is renamed."""
        return replace(self, age=0) if self.age else self

    @property
    def source(self) -> Slot | None:
        """Return the slot whose content this one takes over when that is replaced."""
        return replace(self, age=self.age - 1) if self.age else None

    @property
    def belongs_to_a_step(self) -> bool:
        """Tell whether a step writes it, or wrote what it was renamed from."""
        return self.kind in (SlotKind.OUTPUT, SlotKind.RESIDUAL)


_TEXT = re.compile(r"(.*)/(?:(output|factor)\.(\d{1,6})|(residual|hoisted))(?:@(\d{1,6}))?")


def parse_slot(text: str) -> Slot:
    """Return the slot whose name is ``text``.

    Raises:
        ValueError: it is no name of a slot.
    """
    found = _TEXT.fullmatch(text)
    slot = found and Slot(
        found[1], SlotKind(found[2] or found[4]), int(found[3] or 0), int(found[5] or 0)
    )
    if slot is None or str(slot) != text:
        raise ValueError(f"{text!r} does not name a cache slot")
    return slot


def output_slot(site: str, index: int, age: int = 0) -> Slot:
    """Return the slot of the output at exit node ``index`` of ``site``."""
    return Slot(site, SlotKind.OUTPUT, index, age)


def residual_slot(site: str) -> Slot:
    """Return the slot of the residual of ``site``."""
    return Slot(site, SlotKind.RESIDUAL)


def factor_slots(site: str, count: int) -> tuple[Slot, ...]:
    """Return the slots of the ``count`` factors that ``site`` combines earlier outputs with."""
    return tuple(Slot(site, SlotKind.FACTOR, index) for index in range(count))


def hoisted_slot(node: str) -> Slot:
    """Return the slot of the hoisted value of ``node``."""
    return Slot(node, SlotKind.HOISTED)


def read_cache(graph: Graph, slot: Slot, like: Tensor) -> Node:
    """Return the graph input that brings ``slot``, adding it if it is not there yet."""
    found = read_nodes(graph).get(slot)
    if found is not None:
        return found
    node = add_input(graph, "cache_" + re.sub(r"\W", "_", str(slot)), like)
    node.meta[_SLOT] = slot
    return node


def write_cache(graph: Graph, slot: Slot, node: Node) -> None:
    """Return ``node`` from the graph as the new content of ``slot``."""
    add_output(graph, node)
    output = graph.output_node()
    output.meta[_WRITES] = (*written_slots(graph), slot)


def read_nodes(graph: Graph) -> dict[Slot, Node]:
    """Return the graph's cache inputs, by their slots."""
    inputs = graph.find_nodes(op="placeholder")
    return {node.meta[_SLOT]: node for node in inputs if _SLOT in node.meta}


def read_slots(graph: Graph) -> tuple[Slot, ...]:
    """Return the slots the graph reads, in the order of its cache inputs."""
    return tuple(read_nodes(graph))


def written_slots(graph: Graph) -> tuple[Slot, ...]:
    """Return the slots the graph writes, in the order of its cache outputs."""
    slots: tuple[Slot, ...] = graph.output_node().meta.get(_WRITES, ())
    return slots
