"""Copy caches that share memory with what the caller holds, so that neither changes the other.

A model may return what a pass caches or hoists, such as the projection of an attention, or a view
of it. The caller may write to what it gets, and caches are read at later steps.

Before, in a step that stores %4, which the model returns as well, and in one that shares it::

    return [%5, %4, %4]

    %2 = input cache_attention_0_output_0: float32[2, 64, 32]
    return [%3, %2]

After::

    %5 = aten.clone.default(%4): float32[2, 64, 32]
    return [%6, %4, %5]

    %3 = aten.clone.default(%2): float32[2, 64, 32]
    return [%4, %3]
"""

from __future__ import annotations

from torch.fx import Graph, Node
from torch.fx.node import Argument

from ditfastattn.passes.graph.aliases import owners
from ditfastattn.passes.graph.ir import aten, insert, outputs
from ditfastattn.passes.graph.slots import read_nodes, written_slots


def keep_caches_apart(graph: Graph) -> int:
    """Copy results that share memory with caches read, and caches that do with inputs or results.

    Return how many copies were made.
    """
    returned = list(outputs(graph))
    count = len(returned) - len(written_slots(graph))
    lent = set(read_nodes(graph).values())
    results = [_copied(graph, item, lent) for item in returned[:count]]
    lent.update(graph.find_nodes(op="placeholder"))
    for item in results:
        lent |= _owners(item)
    caches = [_copied(graph, item, lent) for item in returned[count:]]
    found = [*results, *caches]
    copies = sum(new is not old for new, old in zip(found, returned, strict=True))
    if copies:
        graph.output_node().args = (tuple(found),)
    return copies


def _owners(item: Argument) -> frozenset[Node]:
    return owners(item) if isinstance(item, Node) else frozenset()


def _copied(graph: Graph, item: Argument, lent: set[Node]) -> Argument:
    """Return ``item``, or a copy where it may lie in the memory of ``lent``."""
    if not isinstance(item, Node) or lent.isdisjoint(owners(item)):
        return item
    last: Node = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last if item.op == "placeholder" else item):
        return insert(graph, aten.clone.default, (item,), item)
