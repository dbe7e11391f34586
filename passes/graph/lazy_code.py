"""Graph modules whose Python code is written when it is first run, as torch.compile's own are.

``GraphModule`` writes and compiles it whenever it is made or ``recompile`` is called: after each of
the passes that a graph goes through, for code that nobody runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module


def lazy_module(root: nn.Module, graph: Graph) -> GraphModule:
    """Return a module of ``graph`` with the attributes of ``root`` that it names."""
    return _LazyGraphModule(root, graph)


def traced_lazily() -> AbstractContextManager[None]:
    """Let what is traced in this context be such modules."""
    return _use_lazy_graph_module(True)
