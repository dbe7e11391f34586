"""Tell where the halves of dimension 0 are those of guidance.

A model's batch has the conditional lanes in one half. What folds frames or positions into it, as
models of video do (``[B, F, N, C] -> [B * F, N, C]``), keeps the halves apart only where the batch
is the outer factor. That is so for a node whose first half follows from the first halves of nodes
for which it is so: the very rules by which half of a batch moves upward.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.rewrites.hoist_batch_slices import halved_inputs


def lane_halves(graph: Graph, inputs: list[Node], batch: int) -> set[Node]:
    """Return the nodes whose halves are the lanes' halves.

    Those of the dynamic ``inputs`` are that have ``batch`` rows.
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
