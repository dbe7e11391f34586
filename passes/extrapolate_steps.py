"""Follow a site's output along the line through its last two (TaylorSeer, equation 3, first order).

Before::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %8): float32[2, 64, 32]

After; norm, projections and attention that fed %8 alone are dead::

    %5 = input cache_blocks_0_attn_distance: float32[]
    %6 = input cache_blocks_0_attn_output_0: float32[2, 64, 32]
    %7 = input cache_blocks_0_attn_previous_0: float32[2, 64, 32]
    %8 = aten.sub.Tensor(%6, %7): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%8, %5): float32[2, 64, 32]
    %10 = aten.add.Tensor(%6, %9): float32[2, 64, 32]
    %11 = aten.mul.Tensor(%2, %10): float32[2, 64, 32]

The distance is an input and no constant: steps that differ in it alone are one variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.base import PassResult
from ditfastattn.passes.caches import distance_slot, output_slot, previous_slot, read_cache
from ditfastattn.passes.ir import aten, fake_mode, find, insert, value
from ditfastattn.passes.sites import AttentionSite


@dataclass(frozen=True)
class ExtrapolateSteps:
    """Extrapolate the outputs of ``sites`` from the last two that were computed."""

    sites: tuple[AttentionSite, ...]
    name: str = "extrapolate-steps"

    def run(self, module: GraphModule) -> PassResult:
        """Replace each frontier node."""
        for site in self.sites:
            distance = _distance(module.graph, site, find(module.graph, site.node))
            for index, member in enumerate(site.frontier):
                node = find(module.graph, member)
                node.replace_all_uses_with(_line(module.graph, site, index, node, distance))
        return PassResult(len(self.sites))


def _distance(graph: Graph, site: AttentionSite, like: Node) -> Node:
    with fake_mode(graph):
        scalar = torch.empty((), dtype=torch.float32, device=value(like).device)
    return read_cache(graph, distance_slot(site.name), scalar)


def _line(graph: Graph, site: AttentionSite, index: int, node: Node, distance: Node) -> Node:
    last = read_cache(graph, output_slot(site.name, index), value(node))
    before = read_cache(graph, previous_slot(site.name, index), value(node))
    with graph.inserting_before(node):
        change = insert(graph, aten.sub.Tensor, (last, before), node)
        step = insert(graph, aten.mul.Tensor, (change, distance), node)
        return insert(graph, aten.add.Tensor, (last, step), node)
