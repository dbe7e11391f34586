"""Define what capture returns: a canonical ATen-level graph and its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule, Node

from ditfastattn.passes.capture.recognize_attention import Unrecognized


@dataclass(frozen=True)
class GraphInput:
    """Describe one input of a captured graph: its Python name, and whether it is static.

    A ``number`` is a Python float that Dynamo passes as a tensor, for the graph to call ``item()``.
    """

    name: str
    static: bool
    number: bool = False


@dataclass(frozen=True)
class CapturedGraph:
    """Hold a canonical ATen-level graph and its inputs, in the order of its placeholders.

    ``unrecognized`` names nodes that compute attention in a form that no pass understands.
    """

    module: GraphModule
    inputs: tuple[GraphInput, ...]
    unrecognized: tuple[Unrecognized, ...] = ()

    @cached_property
    def dynamic_positions(self) -> tuple[int, ...]:
        """Return the places of the call's own tensors among the inputs."""
        return tuple(i for i, entry in enumerate(self.inputs) if not entry.static)

    @property
    def dynamic_names(self) -> tuple[str, ...]:
        """Return the names of the call's own tensors."""
        return tuple(entry.name for entry in self.inputs if not entry.static)

    def node(self, name: str) -> Node:
        """Return the placeholder of the dynamic input ``name``; ``LookupError`` if absent."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        for entry, node in zip(self.inputs, placeholders, strict=True):
            if entry.name == name and not entry.static:
                found: Node = node
                return found
        raise LookupError(name)
