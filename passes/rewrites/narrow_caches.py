"""Keep caches in fewer bits than the model computes in; opt-in, as it rounds what is kept.

Before::

    %5 = input cache_blocks_0_attn_output_0: float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %5): float32[2, 64, 32]
    return [%20, %18]

After; an extrapolation's factors, and what is computed once, stay as they are::

    %5 = input cache_blocks_0_attn_output_0: float16[2, 64, 32]
    %6 = aten.to.dtype(%5, torch.float32): float32[2, 64, 32]
    %10 = aten.mul.Tensor(%2, %6): float32[2, 64, 32]
    %21 = aten.to.dtype(%18, torch.float16): float16[2, 64, 32]
    return [%20, %21]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import aten, insert, outputs, replace_uses, value
from ditfastattn.passes.graph.slots import read_nodes, written_slots
from ditfastattn.passes.rewrites.base import PassResult


@dataclass(frozen=True)
class NarrowCaches:
    """Keep the caches of ``sites`` in the dtype that each says, where that is narrower."""

    sites: tuple[Site, ...]
    name: str = "narrow-caches"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Convert what is read and what is written."""
        graph = module.graph
        sites = {site.name: site for site in self.sites}
        changed = 0
        for slot, node in read_nodes(graph).items():
            if slot.belongs_to_a_step and slot.site in sites:
                changed += _widen(graph, node, sites[slot.site])
        slots = written_slots(graph)
        returned = list(outputs(graph))
        for place, slot in enumerate(slots, len(returned) - len(slots)):
            narrowed = _narrow(graph, returned[place], sites[slot.site])
            changed += narrowed is not returned[place]
            returned[place] = narrowed
        graph.output_node().args = (tuple(returned),)
        return PassResult(changed)


def _widen(graph: Graph, node: Node, site: Site) -> bool:
    """Read ``node``, an input, in the dtype that ``site`` keeps; return whether that is another."""
    wide = value(node).dtype
    kept = site.kept_dtype(wide)
    if kept == wide:
        return False
    with fake_mode(graph):
        node.meta["val"] = value(node).to(kept)
    first = next(other for other in graph.nodes if other.op != "placeholder")
    with graph.inserting_before(first):
        widened = insert(graph, aten.to.dtype, (node, wide), node)
    replace_uses(node, widened, keep=(widened,))
    return True


def _narrow(graph: Graph, item: Argument, site: Site) -> Argument:
    """Return what ``site`` keeps of ``item``."""
    assert isinstance(item, Node)
    kept = site.kept_dtype(value(item).dtype)
    if kept == value(item).dtype:
        return item
    with graph.inserting_before(graph.output_node()):
        return insert(graph, aten.to.dtype, (item, kept), item)
