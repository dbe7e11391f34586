"""Tell text tokens from image tokens in joint attention: only the latter depend on the latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.attention import joins_streams
from ditfastattn.passes.analysis.feed_forwards import closure
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, calls, value

Streams = Mapping[int, tuple[int, int]]  # tokens in all -> those of text before, and after


def text_around(node: Node, kind: SiteKind, streams: Streams) -> tuple[int, int]:
    """Return how many keys of an attention are text, before and after the image's.

    They are queries too, or the queries are the image's alone.
    """
    queries, keys = (value(source).shape[-2] for source in node.args[:2])
    text = streams.get(keys, (0, 0))
    if queries == keys:
        return (0, 0) if kind is SiteKind.CROSS else text
    alone = queries == keys - sum(text) and joins_streams(argument(node, 1, "key"))
    return text if alone else (0, 0)


def find_streams(graph: Graph, ancestry: Ancestry, latent: str) -> Streams:
    """Return, per number of tokens, where the text stands among them.

    That is read off the first place that joins so many tokens, some of the latent with others that
    do not depend on it; later places already hold both streams, and are told by the number. It
    differs between the rows of a batch where each is joined with the words of its own prompt.
    """
    found: dict[int, tuple[int, int]] = {}
    for node in calls(graph, aten.cat.default):
        parts: Any = node.args[0]
        joined = value(node)
        dim = int(argument(node, 1, "dim", 0)) % joined.dim()
        if len(parts) != 2 or not _holds_tokens(joined, dim, ancestry.batch):
            continue
        tokens = joined.shape[dim]
        inside = [latent in ancestry.roots(part) for part in parts]
        other = parts[0] if inside[1] else parts[1]
        if tokens in found or sum(inside) != 1 or ancestry.is_static(other):
            continue
        if _attends(node, dim):
            sizes = [value(part).shape[dim] for part in parts]
            found[tokens] = (0, sizes[1]) if inside[0] else (sizes[0], 0)
    return found


def _holds_tokens(joined: Tensor, dim: int, batch: int) -> bool:
    """Return whether ``dim`` can be the tokens': not the channels, nor the batch.

    A sequence-first model holds the batch second, ``[N, B, C]``.
    """
    if joined.dim() < 3 or dim == joined.dim() - 1:
        return False
    return dim > 0 or (joined.shape[0] != batch and joined.shape[1] == batch)


def _attends(joined: Node, dim: int) -> bool:
    """Return whether the keys of some attention are as many tokens as ``joined``."""
    tokens = value(joined).shape[dim]
    after = closure(joined.graph, [joined], lambda _: True)
    return any(
        node in after and value(node.args[1]).shape[-2] == tokens
        for node in calls(joined.graph, ATTENTION)
    )
