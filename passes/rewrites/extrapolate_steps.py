"""Follow a site's output along the curve through its last ones (TaylorSeer, equation 3).

Of first order that is the line through the last two, of second order the parabola through the last
three, written with the changes from one output to the next.

Before::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %8): float32[2, 64, 32]

After, on a line; norm, projections and attention that fed %8 alone are dead::

    %5 = input cache_blocks_0_attn_distance: float32[]
    %6 = input cache_blocks_0_attn_output_0: float32[2, 64, 32]
    %7 = input cache_blocks_0_attn_previous_0: float32[2, 64, 32]
    %8 = aten.sub.Tensor(%6, %7): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%8, %5): float32[2, 64, 32]
    %10 = aten.add.Tensor(%6, %9): float32[2, 64, 32]
    %11 = aten.mul.Tensor(%2, %10): float32[2, 64, 32]

A parabola adds, times ``cache_blocks_0_attn_curvature``, ``%7`` minus the output before it. These
numbers are inputs and no constants: steps that differ in them alone are one variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.graph.ir import aten, fake_mode, find, insert, value
from ditfastattn.passes.graph.slots import (
    earlier_slot,
    number_slots,
    output_slot,
    previous_slot,
    read_cache,
)
from ditfastattn.passes.rewrites.base import PassResult


@dataclass(frozen=True)
class ExtrapolateSteps:
    """Extrapolate from computed outputs: ``linear`` sites from two, ``quadratic`` from three."""

    linear: tuple[Site, ...]
    quadratic: tuple[Site, ...] = ()
    name: str = "extrapolate-steps"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Replace each exits node."""
        for order, sites in ((1, self.linear), (2, self.quadratic)):
            for site in sites:
                _extrapolate(module.graph, site, order)
        return PassResult(len(self.linear) + len(self.quadratic))


def output_weights(elapsed: int, gaps: Sequence[int]) -> tuple[float, ...]:
    """Return Lagrange's weights of the last outputs, ``elapsed`` steps after the last one.

    ``gaps`` are the steps between them, those between the last two first: one gap for a line, two
    for a parabola.
    """
    steps = [0, *accumulate(-gap for gap in gaps)]
    return tuple(
        math.prod((elapsed - other) / (own - other) for other in steps if other != own)
        for own in steps
    )


def change_factors(elapsed: int, gaps: Sequence[int]) -> tuple[float, ...]:
    """Return how often each change is added to the last output: the same curve, by differences."""
    weights = output_weights(elapsed, gaps)
    return tuple(-sum(weights[index:]) for index in range(1, len(weights)))


def _extrapolate(graph: Graph, site: Site, order: int) -> None:
    like = find(graph, site.node)
    numbers = [_number(graph, slot, like) for slot in number_slots(site.name, order + 1)]
    for index, member in enumerate(site.exits):
        node = find(graph, member)
        held = [
            read_cache(graph, slot(site.name, index), value(node))
            for slot in (output_slot, previous_slot, earlier_slot)[: order + 1]
        ]
        node.replace_all_uses_with(_curve(graph, node, held, numbers))


def _number(graph: Graph, slot: str, like: Node) -> Node:
    with fake_mode(graph):
        scalar = torch.empty((), dtype=torch.float32, device=value(like).device)
    return read_cache(graph, slot, scalar)


def _curve(graph: Graph, node: Node, held: list[Node], numbers: list[Node]) -> Node:
    """Add to the last output each change before it, times its number."""
    result = held[0]
    with graph.inserting_before(node):
        for (later, before), number in zip(pairwise(held), numbers, strict=True):
            change = insert(graph, aten.sub.Tensor, (later, before), node)
            scaled = insert(graph, aten.mul.Tensor, (change, number), node)
            result = insert(graph, aten.add.Tensor, (result, scaled), node)
    return result
