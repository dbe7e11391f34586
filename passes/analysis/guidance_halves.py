"""Find the nodes whose two halves along dimension 0 are the two guidance branches.

A model's batch holds the conditional branch in one half. Where frames or positions are folded into
the batch (``[B, F, N, C] -> [B * F, N, C]``), the halves stay apart only if the batch is the outer
factor. The rules that move half of a batch upward decide: a node qualifies if its first half can be
computed from the first halves of nodes that qualify.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.analysis.batch_halves import halved_inputs


def guidance_halves(graph: Graph, inputs: list[Node], batch: int) -> set[Node]:
    """Return the nodes whose halves are the guidance branches.

    They follow from those of the dynamic ``inputs`` that have ``batch`` rows.
    """
    known = {node for node in inputs if _rows(node) == batch and batch % 2 == 0}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        halved = halved_inputs(node)
        if halved and all(source in known for source in halved):
            known.add(node)
    return known


def _rows(node: Node) -> int:
    found = node.meta.get("val")
    return int(found.shape[0]) if isinstance(found, Tensor) and found.dim() else 0
