"""Split attentions by groups of heads, so that each group takes strategies of its own.

DiTFastAttnV2 (section 3.2) chooses per head; a group of one head is that. An attention is
independent per head, so this is exact; a group is then a site like any other.

Before::

    %3 = aten.scaled_dot_product_attention.default(%0, %1, %2): float32[2, 4, 64, 8]

After, for groups of one and three heads::

    %3 = aten.slice.Tensor(%0, 1, 0, 1): float32[2, 1, 64, 8]
    ...
    %9 = aten.scaled_dot_product_attention.default(%3, %5, %7): float32[2, 1, 64, 8]
    %10 = aten.transpose.int(%9, 1, 2): float32[2, 64, 1, 8]
    %11 = aten.scaled_dot_product_attention.default(%4, %6, %8): float32[2, 3, 64, 8]
    %12 = aten.transpose.int(%11, 1, 2): float32[2, 64, 3, 8]
    %13 = aten.cat.default([%10, %12], 2): float32[2, 64, 4, 8]
    %14 = aten.transpose.int(%13, 1, 2): float32[2, 4, 64, 8]

The result lies in memory as the attention's did, so that what models do next stays a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch.fx import Graph, Node

from ditfastattn.passes.analysis.site import Site, SiteKind, attentions
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.recognize_attention import RECOGNIZED
from ditfastattn.passes.graph.head_groups import HeadRange, even_groups, mark
from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, clone, find, insert, value

_HEAD_DIM = 1  # of queries, keys and values [B, H, N, D]

Groups = Mapping[str, Sequence[int]]  # the heads of each group, by the name of the site


@dataclass(frozen=True)
class SplitHeads:
    """Hold a graph whose attentions are split, and why some that should be are not."""

    captured: CapturedGraph
    declined: dict[str, str]


def split_heads(captured: CapturedGraph, sites: Sequence[Site], groups: Groups) -> SplitHeads:
    """Return a copy of ``captured`` in which those ``sites`` that ``groups`` names are split.

    A site that cannot be is left whole, and its reason returned.
    """
    known = {site.name: site for site in sites}
    declined = {name: "the model has no such site" for name in groups if name not in known}
    named = {name: tuple(sizes) for name, sizes in groups.items() if name in known}
    for name, sizes in named.items():
        reason = _why_whole(captured, known[name], sizes)
        if reason:
            declined[name] = reason
    chosen = {name: sizes for name, sizes in named.items() if name not in declined}
    if not any(len(sizes) > 1 for sizes in chosen.values()):
        return SplitHeads(captured, declined)
    module = clone(captured.module)
    for name, sizes in chosen.items():
        if len(sizes) > 1:
            _split(module.graph, find(module.graph, known[name].node), known[name], sizes)
    module.recompile()
    return SplitHeads(replace(captured, module=module), declined)


def groups_of(sites: Sequence[Site], count: int) -> dict[str, tuple[int, ...]]:
    """Return ``count`` groups of nearly equal size for each attention of ``sites``."""
    return {site.name: even_groups(site.heads, count) for site in attentions(sites) if count > 1}


def _why_whole(captured: CapturedGraph, site: Site, sizes: tuple[int, ...]) -> str:
    if site.kind is SiteKind.FEED_FORWARD:
        return "it is a feed-forward"
    if sum(sizes) != site.heads or min(sizes) < 1:
        return f"it has {site.heads} heads, the groups are of {', '.join(map(str, sizes))}"
    if site.heads == 1:
        return "it has one head"
    node = find(captured.module.graph, site.node)
    shapes = [value(item).shape for item in _operands(node)]
    heads = sorted({shape[_HEAD_DIM] for shape in shapes})
    if heads != [site.heads]:
        return f"queries, keys and values have {' or '.join(map(str, heads))} heads"
    return ""


def _operands(node: Node) -> list[Node]:
    return [argument(node, place, name) for place, name in enumerate(("query", "key", "value"))]


def _split(graph: Graph, node: Node, site: Site, sizes: Sequence[int]) -> None:
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    ranges = [HeadRange(site.name, first, last) for first, last in pairwise(bounds)]
    lies_by_tokens = value(node).transpose(1, 2).is_contiguous()
    with graph.inserting_before(node):
        calls = [_sliced_call(graph, node, heads) for heads in ranges]
        parts: list[Node] = []
        for heads, (args, kwargs) in zip(ranges, calls, strict=True):
            part = mark(insert(graph, ATTENTION, args, node, kwargs), heads)
            if RECOGNIZED in node.meta:
                part.meta[RECOGNIZED] = node.meta[RECOGNIZED]
            parts.append(_swapped(graph, part) if lies_by_tokens else part)
        whole = insert(graph, aten.cat.default, (parts, 2 if lies_by_tokens else 1), node)
        whole = _swapped(graph, whole) if lies_by_tokens else whole
    mark(whole, HeadRange(site.name, 0, site.heads))
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _sliced_call(
    graph: Graph, node: Node, heads: HeadRange
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``node`` for ``heads`` alone; a mask may be of each head, or all."""
    count = value(node).shape[_HEAD_DIM]

    def narrowed(item: Any) -> Any:
        dim = value(item).dim() - 3 if isinstance(item, Node) else -1
        if dim < 0 or value(item).shape[dim] != count:
            return item
        part = insert(graph, aten.slice.Tensor, (item, dim, heads.first, heads.last), node)
        return mark(part, heads)

    return (
        tuple(narrowed(item) for item in node.args),
        {name: narrowed(item) for name, item in node.kwargs.items()},
    )


def _swapped(graph: Graph, node: Node) -> Node:
    return insert(graph, aten.transpose.int, (node, 1, 2), node)
