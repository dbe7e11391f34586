"""Count the floating-point operations of a graph from its shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Graph, Node

from ditfastattn.passes.graph.ir import ATTENTION, FLEX_ATTENTION, aten, value
from ditfastattn.passes.windows.forms import WINDOWED, pairs_of


@dataclass(frozen=True)
class Flops:
    """Hold operation counts; a multiply-add counts as two.

    ``attention`` counts QK^T and PV over the pairs kept, ``linear`` the products with weights.
    """

    attention: int
    linear: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.attention + self.linear

    def times(self, count: int) -> Flops:
        """Return the counts of ``count`` runs."""
        return Flops(self.attention * count, self.linear * count)

    def __add__(self, other: Flops) -> Flops:
        """Add counts."""
        return Flops(self.attention + other.attention, self.linear + other.linear)


def count_flops(graph: Graph) -> Flops:
    """Count one run of ``graph``."""
    counts = Flops(0, 0)
    for node in graph.nodes:
        if node.op == "call_function":
            counts += count_node(node)
    return counts


def count_node(node: Node) -> Flops:
    """Count one node."""
    if node.target in (ATTENTION, FLEX_ATTENTION, *WINDOWED):  # a mask is not seen to save any
        return Flops(_attention(node), 0)
    if node.target in (aten.linear.default, aten.conv2d.default, aten.conv3d.default):
        weight = value(node.args[1])
        return Flops(0, 2 * value(node).numel() * math.prod(weight.shape[1:]))
    if node.target in (aten.matmul.default, aten.bmm.default):
        inner = value(node.args[0]).shape[-1]
        return Flops(0, 2 * value(node).numel() * inner)
    return Flops(0, 0)


def _attention(node: Node) -> int:
    batch, heads, queries, head_dim = value(node.args[0]).shape
    keys = value(node.args[1]).shape[-2]
    pairs = pairs_of(node) if node.target in WINDOWED else queries * keys
    return 4 * batch * heads * int(pairs) * head_dim
