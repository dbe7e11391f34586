"""Name cache slots and attach them to graphs as inputs and outputs.

A slot is one tensor that a site hands from a step to later ones: ``blocks.0.attn/output.0`` (at
the first exit node, after the output projection) or ``blocks.0.attn/residual`` (full minus
window attention, before the output projection). A graph that reads a slot has an input for it; a
graph that writes one returns it after the model's own outputs.

Some slots are written by no graph. ``blocks.0.attn/previous.0`` holds the output that was replaced
last, ``blocks.0.attn/earlier.0`` the one before it: the runtime renames them without copying.
``blocks.0.attn/distance`` and ``blocks.0.attn/curvature`` say how far a step extrapolates, numbers
that the schedule fixes.

``invariant/linear_4`` holds what is computed once per generation, by a graph of its own.
"""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.graph.ir import add_input, add_output

_SLOT = "cache_slot"
_WRITES = "cache_writes"
_DISTANCE, _CURVATURE, _INVARIANT = "distance", "curvature", "invariant"


def output_slot(site: str, index: int) -> str:
    """Name the slot of the ``index``-th exit node of ``site``."""
    return f"{site}/output.{index}"


def residual_slot(site: str) -> str:
    """Name the slot of the residual of ``site``."""
    return f"{site}/residual"


def previous_slot(site: str, index: int) -> str:
    """Name the slot of the output before the last at the ``index``-th exit node."""
    return f"{site}/previous.{index}"


def earlier_slot(site: str, index: int) -> str:
    """Name the slot of the output before the previous one at the ``index``-th exit node."""
    return f"{site}/earlier.{index}"


def site_of(slot: str) -> str:
    """Return the site whose output or residual ``slot`` holds; "" where it holds neither."""
    site, _, item = slot.rpartition("/")
    return "" if site == _INVARIANT or item in (_DISTANCE, _CURVATURE) else site


def output_of(slot: str) -> str:
    """Return the output slot of what ``slot``, an output or one it was moved to, has held."""
    return re.sub(r"/(previous|earlier)\.(\d+)$", r"/output.\2", slot)


def distance_slot(site: str) -> str:
    """Name the input that says how far ``site`` extrapolates: fp32, no dimensions.

    The change between the last two outputs is added so many times. On a line these are the steps
    since the last output, in units of the steps between the two.
    """
    return f"{site}/{_DISTANCE}"


def curvature_slot(site: str) -> str:
    """Name the input that says how often a parabola adds the change before: fp32, no dimensions.

    That is the change from the earlier to the previous output; it is subtracted, as this is
    negative.
    """
    return f"{site}/{_CURVATURE}"


def number_slots(site: str, outputs: int) -> tuple[str, ...]:
    """Name the inputs that say how far ``site`` extrapolates from ``outputs`` outputs, 2 or 3."""
    return (distance_slot(site), curvature_slot(site))[: outputs - 1]


def invariant_slot(node: str) -> str:
    """Name the slot of the step-invariant value of ``node``."""
    return f"{_INVARIANT}/{node}"


def read_cache(graph: Graph, slot: str, like: Tensor) -> Node:
    """Return the graph input that brings ``slot``, adding it if it is not there yet."""
    found = read_nodes(graph).get(slot)
    if found is not None:
        return found
    node = add_input(graph, "cache_" + re.sub(r"\W", "_", slot), like)
    node.meta[_SLOT] = slot
    return node


def write_cache(graph: Graph, slot: str, node: Node) -> None:
    """Return ``node`` from the graph as the new content of ``slot``."""
    add_output(graph, node)
    output = graph.output_node()
    output.meta[_WRITES] = (*written_slots(graph), slot)


def read_nodes(graph: Graph) -> dict[str, Node]:
    """Return the graph's cache inputs, by their slots."""
    inputs = graph.find_nodes(op="placeholder")
    return {node.meta[_SLOT]: node for node in inputs if _SLOT in node.meta}


def read_slots(graph: Graph) -> tuple[str, ...]:
    """Return the slots the graph reads, in the order of its cache inputs."""
    return tuple(read_nodes(graph))


def written_slots(graph: Graph) -> tuple[str, ...]:
    """Return the slots the graph writes, in the order of its cache outputs."""
    slots: tuple[str, ...] = graph.output_node().meta.get(_WRITES, ())
    return slots
