"""Compute once per generation what no step changes (loop-invariant code motion; exact).

The text's projections, and the keys and values that cross-attention makes of it, depend on neither
latent nor timestep. A graph of its own computes them, and every step variant reads them.

Before::

    %5 = aten.linear.default(%1, %2): float32[2, 5, 16]   the text's keys
    %6 = aten.linear.default(%0, %3): float32[2, 64, 16]
    ...

After::

    %5 = input cache_linear_4_hoisted: float32[2, 5, 16]
    %6 = aten.linear.default(%0, %3): float32[2, 64, 16]
    ...

What depends on the timestep alone (its embedding; with adaLN-single every modulation) stays in the
step: kept for the next generation, it would be of weights that may have been written since.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ditfastattn.passes.analysis.flops import count_node
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.head_groups import head_range
from ditfastattn.passes.graph.ir import clone, find, value
from ditfastattn.passes.graph.slots import hoisted_slot, read_cache, write_cache
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart

HOIST_PER_GENERATION = "hoist-invariants"


@dataclass(frozen=True)
class HoistInvariants:
    """Read the nodes called ``nodes`` as values that were hoisted out of the step."""

    nodes: tuple[str, ...]
    name: str = HOIST_PER_GENERATION
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        """Replace those that the graph still uses."""
        wanted = set(self.nodes)
        found = [node for node in module.graph.nodes if node.name in wanted and node.users]
        for node in found:
            slot = hoisted_slot(node.name)
            node.replace_all_uses_with(read_cache(module.graph, slot, value(node)))
        return PassResult(len(found) + keep_caches_apart(module.graph))


def find_hoisted(captured: CapturedGraph, varying: Collection[int]) -> tuple[str, ...]:
    """Return the nodes to hoist: the last ones that cost matrix products and never change.

    ``varying`` holds the flat positions of the inputs that may change: latent and timestep.
    """
    changes: dict[Node, bool] = {}
    depends: dict[Node, bool] = {}  # on an argument of the call, and not on parameters alone
    costs: dict[Node, bool] = {}
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    for index, (entry, node) in enumerate(zip(captured.inputs, placeholders, strict=True)):
        changes[node], depends[node] = index in varying, not entry.static
    found: list[str] = []
    for node in captured.module.graph.nodes:
        sources = node.all_input_nodes
        # Of heads that are split all are hoisted at once: steps may merge them.
        in_step = head_range(node) is not None or any(changes[source] for source in sources)
        changes.setdefault(node, in_step)
        depends.setdefault(node, any(depends[source] for source in sources))
        costs[node] = count_node(node).total > 0 or any(costs[source] for source in sources)
        if node.op == "call_function" and not changes[node]:
            continue
        hoisted = (s for s in sources if s.op == "call_function" and not changes[s])
        found += [s.name for s in hoisted if depends[s] and costs[s]]
    return tuple(dict.fromkeys(found))


def hoisted_graph(captured: CapturedGraph, nodes: tuple[str, ...]) -> GraphModule:
    """Return the graph that computes ``nodes`` from the inputs of ``captured``."""
    module = clone(captured.module)
    module.graph.output_node().args = ((),)
    for name in nodes:
        write_cache(module.graph, hoisted_slot(name), find(module.graph, name))
    EliminateDeadCode().run(module)
    module.recompile()
    return module
