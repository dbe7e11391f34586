"""Reuse a site's last output (AST, section 3.2): its exits becomes a cache read.

Before::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %8): float32[2, 64, 32]

After; norm, projections and attention that fed %8 alone are dead::

    %5 = input cache_blocks_0_attn_output_0: float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %5): float32[2, 64, 32]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.passes.graph.slots import output_slot, read_cache
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart


@dataclass(frozen=True)
class ShareAcrossSteps:
    """Read the outputs of ``sites`` from the last step that computed them."""

    sites: tuple[Site, ...]
    name: str = "share-across-steps"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Replace each exits node."""
        for site in self.sites:
            for index, member in enumerate(site.exits):
                node = find(module.graph, member)
                slot = output_slot(site.name, index)
                node.replace_all_uses_with(read_cache(module.graph, slot, value(node)))
        return PassResult(len(self.sites) + keep_caches_apart(module.graph))
