"""Find where an attention ends: its exit nodes, at which caches are taken."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.feed_forwards import closure
from ditfastattn.passes.graph.ir import argument, aten, users_outside, value


def exits_of(attention: Node, ancestry: Ancestry) -> tuple[Node, ...]:
    """Return the last nodes that depend on ``attention`` and static inputs alone.

    A sequence-first model permutes what it attended to, ``[B, N, C] -> [N, B, C]``: its exits lie
    before that permutation, so that they hold the batch first.
    """
    inside = closure(attention.graph, [attention], ancestry.is_static)
    ends = _ends(inside, attention.graph)
    moving = [node for node in inside if _moves_first_dimension(node)]
    if not moving or ancestry.hold_batch_first(ends):
        return ends
    before = inside - closure(attention.graph, moving, lambda _: True)
    earlier = _ends(before, attention.graph)
    return earlier if ancestry.hold_batch_first(earlier) else ends


def _ends(inside: set[Node], graph: Graph) -> tuple[Node, ...]:
    """Return the nodes of ``inside`` that others use, in the graph's order."""
    return tuple(node for node in graph.nodes if node in inside and users_outside(node, inside))


def _moves_first_dimension(node: Node) -> bool:
    rank = value(node).dim() if node.target in (aten.permute.default, aten.transpose.int) else 0
    if node.target is aten.permute.default:
        dims: Any = argument(node, 1, "dims")
        return bool(dims[0] % rank != 0)
    if node.target is aten.transpose.int:
        swapped = {int(argument(node, 1, "dim0")) % rank, int(argument(node, 2, "dim1")) % rank}
        return 0 in swapped and len(swapped) == 2
    return False
