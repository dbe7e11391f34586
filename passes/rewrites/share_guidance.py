"""Let the conditional branch serve both guidance branches (ASC, section 3.3).

Before, the conditional half first::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]

After; ``hoist-batch-slices`` then moves the slice above the projections::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.slice.Tensor(%8, 0, 0, 1): float32[1, 64, 32]
    %10 = aten.cat.default([%9, %9]): float32[2, 64, 32]

Where the step stores the residual of such a site, that is the conditional half's for both as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import aten, find, insert, outputs, replace_uses
from ditfastattn.passes.graph.slots import residual_slot, written_slots
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.hoist_batch_slices import insert_half


@dataclass(frozen=True)
class ShareGuidance:
    """Copy the conditional half of ``sites`` to the unconditional half."""

    sites: tuple[Site, ...]
    layout: CfgLayout
    name: str = "share-guidance"
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        """Rewrite each exit node."""
        if self.layout is CfgLayout.SEPARATE:  # the other half is another call, with its own graph
            return PassResult(0)
        second = bool(self.layout.conditional_half)
        for site in self.sites:
            for member in site.exits:
                _copy_half(module.graph, find(module.graph, member), second)
            residual = _stored_residual(module.graph, site)
            if residual is not None:
                _copy_half(module.graph, residual, second)
        return PassResult(len(self.sites))


def _copy_half(graph: Graph, node: Node, second: bool) -> None:
    """Let ``node``'s users see its one half twice, laid out in memory as ``node`` is.

    Later steps are compiled for the layout of a cache, whichever step writes it.
    """
    half = insert_half(graph, node, second)
    strides = node.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    if order == sorted(order):
        both = _insert_after(half, aten.cat.default, ([half, half],), node)
    else:
        back = [order.index(axis) for axis in range(len(order))]
        turned = _insert_after(half, aten.permute.default, (half, order), node)
        joined = _insert_after(turned, aten.cat.default, ([turned, turned], back[0]), node)
        both = _insert_after(joined, aten.permute.default, (joined, back), node)
    replace_uses(node, both, keep=(half,))


def _insert_after(place: Node, operator: Any, arguments: tuple[Any, ...], like: Node) -> Node:
    with place.graph.inserting_after(place):
        return insert(place.graph, operator, arguments, like)


def _stored_residual(graph: Graph, site: Site) -> Node | None:
    written = written_slots(graph)
    slot = residual_slot(site.name)
    if slot not in written:
        return None
    stored = outputs(graph)[written.index(slot) - len(written)]
    assert isinstance(stored, Node)
    return stored
