"""Replace full attention by window attention plus the cached residual (WA-RS, section 3.1).

Before::

    %3 = aten.scaled_dot_product_attention.default(%0, %1, %2): float32[2, 4, 64, 8]

After::

    %3 = input cache_blocks_0_attn_residual: float32[2, 4, 64, 8]
    %4 = ditfastattn.window_attention.default(%0, %1, %2, 8, 0.35): float32[2, 4, 64, 8]
    %5 = aten.add.Tensor(%4, %3): float32[2, 4, 64, 8]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.attention import attention_mask, attention_scale
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import aten, find, insert, value
from ditfastattn.passes.graph.slots import read_cache, residual_slot
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.windows.forms import window_call
from ditfastattn.passes.windows.masks import insert_mask


@dataclass(frozen=True)
class WindowResidual:
    """Window the attention of ``sites``."""

    sites: tuple[Site, ...]
    name: str = "window-residual"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Rewrite each site."""
        for site in self.sites:
            attention = find(module.graph, site.node)
            residual = read_cache(module.graph, residual_slot(site.name), value(attention))
            with module.graph.inserting_after(attention):
                window = insert_window(module.graph, attention, site)
            with module.graph.inserting_after(window):
                total = insert(module.graph, aten.add.Tensor, (window, residual), attention)
            attention.replace_all_uses_with(total)
            module.graph.erase_node(attention)
            total.name = attention.name  # where nothing follows it, it is the site's exits
        return PassResult(len(self.sites))


def insert_window(graph: Graph, attention: Node, site: Site) -> Node:
    """Add the window attention of ``site`` over the inputs of ``attention``."""
    mask, pairs = attention_mask(attention), None
    if mask is not None:
        with graph.inserting_before(attention):
            keys = value(attention.args[1]).shape[-2]
            pairs = insert_mask(graph, mask, keys, attention)
    target, arguments = window_call(site.window, attention_scale(attention), site.text, pairs)
    return insert(graph, target, (*attention.args[:3], *arguments), attention)
