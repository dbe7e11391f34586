"""Run a graph node by node from any point, so that a shared prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.passes.graph.ir import outputs

Environment = dict[Node, Any]


class GraphRunner:
    """Interpret a captured graph on real tensors."""

    def __init__(self, module: GraphModule) -> None:
        """Prepare ``module``; its graph must not change afterwards."""
        self.module = module
        self.nodes = tuple(module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self._last_use = self._find_last_uses()

    def begin(self, args: Sequence[Tensor]) -> Environment:
        """Return the environment that holds the graph's inputs."""
        return dict(zip(self.module.graph.find_nodes(op="placeholder"), args, strict=True))

    def run(self, environment: Environment, start: int, stop: int) -> None:
        """Compute nodes ``start`` to ``stop`` (exclusive) that ``environment`` does not hold."""
        with torch.no_grad():
            for index in range(start, stop):
                node = self.nodes[index]
                if node.op in ("call_function", "get_attr") and node not in environment:
                    environment[node] = self._compute(node, environment)
                for used in self._last_use[index]:
                    environment.pop(used, None)

    def results(self, environment: Environment) -> tuple[Any, ...]:
        """Return what the graph returns, once all nodes were run."""
        returned: Any = map_arg(outputs(self.module.graph), lambda node: environment[node])
        return tuple(returned)

    def _compute(self, node: Node, environment: Environment) -> Any:
        if node.op == "get_attr":
            return getattr(self.module, str(node.target))
        args = map_arg(node.args, lambda source: environment[source])
        kwargs = map_arg(node.kwargs, lambda source: environment[source])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _find_last_uses(self) -> list[list[Node]]:
        """List, per position, the nodes whose value nothing needs from there on."""
        last: dict[Node, int] = {}
        for index, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                last[source] = index
        freed: list[list[Node]] = [[] for _ in self.nodes]
        for node, index in last.items():
            if self.nodes[index].op != "output":
                freed[index].append(node)
        return freed
