"""Name cache slots and attach them to graphs as inputs and outputs.

A slot is one tensor that a site hands from a step to later ones: ``blocks.0.attn/output.0`` (at
the first frontier node, after the output projection) or ``blocks.0.attn/residual`` (full minus
window attention, before the output projection). A graph that reads a slot has an input for it; a
graph that writes one returns it after the model's own outputs.

Two slots are written by no graph. ``blocks.0.attn/previous.0`` holds the output that was replaced
last: whoever runs the graphs moves it over, a pointer and no copy. ``blocks.0.attn/distance`` is
how far a step extrapolates, a number that the schedule fixes.

``invariant/linear_4`` holds what is computed once per generation, by a graph of its own.
"""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.ir import add_input, add_output

_SLOT = "cache_slot"
_WRITES = "cache_writes"


def output_slot(site: str, index: int) -> str:
    """Name the slot of the ``index``-th frontier node of ``site``."""
    return f"{site}/output.{index}"


def residual_slot(site: str) -> str:
    """Name the slot of the residual of ``site``."""
    return f"{site}/residual"


def previous_slot(site: str, index: int) -> str:
    """Name the slot of the output before the last at the ``index``-th frontier node."""
    return previous_of(output_slot(site, index))


def previous_of(slot: str) -> str:
    """Return the slot that takes over what the output slot ``slot`` held."""
    return slot.replace("/output.", "/previous.")


def distance_slot(site: str) -> str:
    """Name the input that says how far ``site`` extrapolates: fp32, no dimensions.

    It counts steps since the last output, in units of the steps between the last two.
    """
    return f"{site}/distance"


def invariant_slot(node: str) -> str:
    """Name the slot of the step-invariant value of ``node``."""
    return f"invariant/{node}"


def read_cache(graph: Graph, slot: str, like: Tensor) -> Node:
    """Return the graph input that brings ``slot``, adding it if it is not there yet."""
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get(_SLOT) == slot:
            found: Node = node
            return found
    node = add_input(graph, "cache_" + re.sub(r"\W", "_", slot), like)
    node.meta[_SLOT] = slot
    return node


def write_cache(graph: Graph, slot: str, node: Node) -> None:
    """Return ``node`` from the graph as the new content of ``slot``."""
    add_output(graph, node)
    output = graph.output_node()
    output.meta[_WRITES] = (*written_slots(graph), slot)


def read_slots(graph: Graph) -> tuple[str, ...]:
    """Return the slots the graph reads, in the order of its cache inputs."""
    inputs = graph.find_nodes(op="placeholder")
    return tuple(node.meta[_SLOT] for node in inputs if _SLOT in node.meta)


def written_slots(graph: Graph) -> tuple[str, ...]:
    """Return the slots the graph writes, in the order of its cache outputs."""
    slots: tuple[str, ...] = graph.output_node().meta.get(_WRITES, ())
    return slots
