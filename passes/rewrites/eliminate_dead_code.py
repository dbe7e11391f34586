"""Erase what nothing uses any more; graph inputs stay, so that the calling convention does.

Before::

    %2 = aten.linear.default(%0, %1): float32[2, 4]
    return [%0]

After::

    return [%0]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ditfastattn.passes.rewrites.base import PassResult


@dataclass(frozen=True)
class EliminateDeadCode:
    """Erase dead nodes."""

    name: str = "eliminate-dead-code"
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        """Erase, users first."""
        before = len(module.graph.nodes)
        module.graph.eliminate_dead_code(is_impure_node=_is_signature)
        return PassResult(before - len(module.graph.nodes))


def _is_signature(node: Node) -> bool:
    return node.op in ("placeholder", "output")
