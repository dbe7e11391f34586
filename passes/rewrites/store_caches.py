"""Return from a step what later steps will read.

Before::

    %9 = aten.scaled_dot_product_attention.default(%0, %1, %2): float32[2, 4, 64, 8]
    %12 = aten.linear.default(...): float32[2, 64, 32]
    return [%20]

After, for a site whose output and residual are both read later::

    %9 = aten.scaled_dot_product_attention.default(%0, %1, %2): float32[2, 4, 64, 8]
    %10 = ditfastattn.window_attention.default(%0, %1, %2, 8, 0.35): float32[2, 4, 64, 8]
    %11 = aten.sub.Tensor(%9, %10): float32[2, 4, 64, 8]
    %14 = aten.linear.default(...): float32[2, 64, 32]
    return [%22, %14, %11]

Of a range of blocks, what it adds to each stream is kept, the difference of its end and its base.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import aten, find, insert
from ditfastattn.passes.graph.slots import output_slot, residual_slot, write_cache
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart
from ditfastattn.passes.rewrites.window_residual import insert_window


@dataclass(frozen=True)
class StoreCaches:
    """Write the output caches of ``outputs`` and the residual caches of ``residuals``."""

    outputs: tuple[Site, ...]
    residuals: tuple[Site, ...]
    name: str = "store-caches"
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        """Add a graph output for each slot."""
        graph = module.graph
        for site in self.outputs:
            for index, member in enumerate(site.exits):
                kept = find(graph, member)
                if site.bases:
                    kept = _added(graph, kept, find(graph, site.bases[index]))
                write_cache(graph, output_slot(site.name, index), kept)
        for site in self.residuals:
            attention = find(graph, site.node)
            with graph.inserting_after(attention):
                window = insert_window(graph, attention, site)
            with graph.inserting_after(window):
                residual = insert(graph, aten.sub.Tensor, (attention, window), attention)
            write_cache(graph, residual_slot(site.name), residual)
        copies = keep_caches_apart(graph)
        return PassResult(len(self.outputs) + len(self.residuals) + copies)


def _added(graph: Graph, end: Node, base: Node) -> Node:
    """Return what lies between ``base`` and ``end`` of a range of blocks."""
    with graph.inserting_after(end):
        return insert(graph, aten.sub.Tensor, (end, base), end)
