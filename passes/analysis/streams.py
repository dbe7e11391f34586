"""Tell text tokens from image tokens in joint attention: only the latter depend on the latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.feed_forwards import closure
from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, calls, value


@dataclass(frozen=True)
class Streams:
    """Count the tokens of both streams together, and those of text before and after the image's."""

    tokens: int
    text: tuple[int, int]


def find_streams(graph: Graph, ancestry: Ancestry, latent: str) -> Streams | None:
    """Return the first place that joins tokens of the latent with others that do not depend on it.

    Later places already hold both streams; their number of tokens identifies them.
    """
    for node in calls(graph, aten.cat.default):
        parts: Any = node.args[0]
        joined = value(node)
        dim = int(argument(node, 1, "dim", 0)) % joined.dim()
        if joined.dim() < 3 or dim in (0, joined.dim() - 1) or len(parts) != 2:
            continue
        inside = [latent in ancestry.roots(part) for part in parts]
        other = parts[0] if inside[1] else parts[1]
        if sum(inside) == 1 and not ancestry.is_static(other) and _attends(node, dim):
            sizes = [value(part).shape[dim] for part in parts]
            text = (0, sizes[1]) if inside[0] else (sizes[0], 0)
            return Streams(joined.shape[dim], text)
    return None


def _attends(joined: Node, dim: int) -> bool:
    """Return whether some attention's queries have the tokens of ``joined``."""
    tokens = value(joined).shape[dim]
    after = closure(joined.graph, [joined], lambda _: True)
    return any(
        node in after and value(node.args[0]).shape[-2] == tokens
        for node in calls(joined.graph, ATTENTION)
    )
