"""Let the conditional branch serve both guidance branches (ASC, section 3.3).

Before, the conditional half first::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]

After; ``hoist-batch-slices`` then moves the slice above the projections::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.slice.Tensor(%8, 0, 0, 1): float32[1, 64, 32]
    %10 = aten.cat.default([%9, %9]): float32[2, 64, 32]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import aten, find, insert, replace_uses
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
        second = self.layout is CfgLayout.UNCOND_FIRST
        for site in self.sites:
            for member in site.exits:
                node = find(module.graph, member)
                half = insert_half(module.graph, node, second)
                with module.graph.inserting_after(half):
                    both = insert(module.graph, aten.cat.default, ([half, half],), node)
                replace_uses(node, both, keep=(half,))
        return PassResult(len(self.sites))
