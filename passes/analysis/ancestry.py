"""Find which dynamic inputs a node depends on, and whether its halves are guidance branches."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ditfastattn.passes.analysis.guidance_halves import guidance_halves
from ditfastattn.passes.analysis.latent import is_listed
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import value


class Ancestry:
    """Answer which dynamic inputs a node depends on, and whether its halves follow their batch."""

    def __init__(self, captured: CapturedGraph, latent: str) -> None:
        """Follow every node of ``captured``; ``latent`` names the input that is denoised."""
        self._roots: dict[Node, frozenset[str]] = {}
        self._latent = latent
        graph = captured.module.graph
        placeholders = graph.find_nodes(op="placeholder")
        pairs = zip(captured.inputs, placeholders, strict=True)
        dynamic = [node for entry, node in pairs if not entry.static]
        returned = graph.output_node().all_input_nodes
        self._listed = is_listed(latent)
        self.batch = len(returned) if self._listed else value(returned[0]).shape[0]
        self._guidance_halves = guidance_halves(graph, dynamic, self.batch)
        for entry, node in zip(captured.inputs, placeholders, strict=True):
            self._roots[node] = frozenset() if entry.static else frozenset({entry.name})
        for node in captured.module.graph.nodes:
            if node not in self._roots:
                roots = (self._roots[source] for source in node.all_input_nodes)
                self._roots[node] = frozenset().union(*roots)

    def roots(self, node: Node) -> frozenset[str]:
        """Return the names of the dynamic inputs that ``node`` depends on."""
        return self._roots[node]

    def why_no_shared_guidance(self, ends: Sequence[Node]) -> str:
        """Return why one half of the rows of ``ends`` cannot serve for the other, or ""."""
        if self._listed:
            return "the model takes its images as a list, whose halves are not those of a batch"
        for end in ends:
            rows = value(end).shape[0]
            if rows % 2 or self.batch % 2:
                return f"a batch of {rows} has no two halves"
            if rows != self.batch and end not in self._guidance_halves:
                return f"its batch is {rows}, the model's {self.batch}, in unknown order"
        return ""

    def hold_batch_first(self, ends: Sequence[Node]) -> bool:
        """Return whether dimension 0 of all ``ends`` has as many rows as the model's batch."""
        return all(value(end).shape[0] == self.batch for end in ends)

    def why_no_grid(self, reached: Sequence[Node]) -> str:
        """Return why no grid was found for tokens whose axis leads to the inputs ``reached``."""
        given = [name for node in reached for name in self._roots[node] if name != self._latent]
        none = "the graph flattens no grid into its tokens"
        return f"{none}, and what its inputs hold is unknown: {', '.join(given)}" if given else none

    def is_static(self, node: Node) -> bool:
        """Return whether ``node`` depends on parameters, buffers and constants alone."""
        return not self._roots[node]
