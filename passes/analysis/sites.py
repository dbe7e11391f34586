"""Find a model's sites by data flow, never by class name.

An attention site is an attention node with its *exit nodes*: the last nodes that depend on nothing
but this attention's output and parameters (the output projection, a rescaling; two of them where
joint attention splits into image and text). Caches are taken there, so that norm, projections and
attention are dead code at a step that reuses them. A feed-forward branch is a site too, with one
exit node and no window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch.fx import Graph, Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.attention import kind_of, why_no_window
from ditfastattn.passes.analysis.exits import exits_of
from ditfastattn.passes.analysis.feed_forwards import (
    FeedForward,
    find_feed_forwards,
    linear_calls,
)
from ditfastattn.passes.analysis.flex_sites import describe_flex, why_no_flex_site
from ditfastattn.passes.analysis.latent import latent_position
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.analysis.streams import Streams, find_streams, text_around
from ditfastattn.passes.analysis.token_grid import GridFinder, embedded_grid
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.recognize_attention import RECOGNIZED
from ditfastattn.passes.graph.head_groups import HeadRange, group_name, head_range
from ditfastattn.passes.graph.ir import (
    ATTENTION,
    FLEX_ATTENTION,
    argument,
    aten,
    calls,
    find,
    value,
)
from ditfastattn.passes.graph.origin import module_path
from ditfastattn.passes.windows.forms import window_forms


@dataclass(frozen=True)
class DeclinedAttention:
    """Name an attention that is not a site, and why.

    ``ordinal`` is as a site's; -1 where the attention is not a single node.
    """

    name: str
    ordinal: int
    reason: str


@dataclass(frozen=True)
class SiteReport:
    """Hold the sites of a graph in execution order, and the attention nodes declined."""

    sites: tuple[Site, ...]
    declined: tuple[DeclinedAttention, ...]


def find_sites(captured: CapturedGraph) -> SiteReport:
    """Return every site of ``captured``, and each declined attention with its reason."""
    graph = captured.module.graph
    position = latent_position(captured)
    latent = "" if position is None else captured.inputs[position].name
    ancestry = Ancestry(captured, latent)
    streams = find_streams(graph, ancestry, latent) if latent else {}
    grids = GridFinder()
    sites: list[Site] = []
    declined: list[DeclinedAttention] = []
    names: dict[str, int] = {}
    wholes = [node for node in calls(graph, ATTENTION) if _first_head(node) == 0]
    spelled = [node for node in wholes if RECOGNIZED not in node.meta]
    ordinals = {node: ordinal for ordinal, node in enumerate(spelled)}
    for place, first in enumerate(wholes):
        ordinal = ordinals.get(first, -1)
        name = _unique(module_path(first) or f"attention.{place}", names)
        reason = _why_not_a_site(first, ancestry, latent)
        if reason:
            declined.append(DeclinedAttention(name, ordinal, reason))
            continue
        site = _describe(first, name, ordinal, grids, ancestry, streams)
        sites += [site] if head_range(first) is None else _describe_groups(site, graph, ancestry)
    for flex in calls(graph, FLEX_ATTENTION):
        name = _unique(module_path(flex) or flex.name, names)
        reason = _why_not_a_site(flex, ancestry, latent) or why_no_flex_site(flex)
        if reason:
            declined.append(DeclinedAttention(name, -1, reason))
        else:
            sites.append(describe_flex(flex, name, ancestry))
    for other in captured.unrecognized:
        node = find(graph, other.node)
        name = _unique(module_path(node) or node.name, names)
        declined.append(DeclinedAttention(name, -1, other.reason))
    linears = linear_calls(captured)
    for branch in find_feed_forwards(graph, ancestry.is_static):
        if latent and latent not in ancestry.roots(branch.exit):
            continue  # of the text alone: computed once per generation
        path = _common_path([module_path(linear) for linear in branch.linears])
        name = _unique(path or f"feed_forward.{branch.ordinal}", names)
        call = linears[branch.linears[-1]]
        sites.append(_describe_feed_forward(branch, name, call, ancestry))
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: order[site.node])
    return SiteReport(tuple(sites), tuple(declined))


def _describe_feed_forward(
    branch: FeedForward, name: str, call: tuple[str, int], ancestry: Ancestry
) -> Site:
    width = value(branch.exit).shape[-1]
    return Site(
        name=name,
        weight=call[0],
        ordinal=call[1],
        node=branch.exit.name,
        exits=(branch.exit.name,),
        kind=SiteKind.FEED_FORWARD,
        tokens=math.prod(value(branch.exit).shape[1:-1]),
        heads=1,
        head_dim=width,
        grid=(),
        window=0,
        no_window="a window is defined for attention, this is a feed-forward",
        no_shared_guidance=ancestry.why_no_shared_guidance([branch.exit]),
    )


def _describe(
    node: Node,
    name: str,
    ordinal: int,
    grids: GridFinder,
    ancestry: Ancestry,
    streams: Streams,
) -> Site:
    _, heads, tokens, head_dim = value(node.args[0]).shape
    kind = kind_of(node, ancestry)
    text = text_around(node, kind, streams)
    kind = SiteKind.JOINT if any(text) else kind
    image = value(node.args[1]).shape[-2] - sum(text) if any(text) else tokens
    no_window = why_no_window(node, kind, image, text)
    ends = exits_of(node, ancestry)
    grid = embedded_grid(node, image, value(node).shape[0] // ancestry.batch)
    query: Any = node.args[0]
    grid = grid or grids.find(query, image)
    windows = window_forms(image, grid) if not no_window else ()
    return Site(
        name=name,
        ordinal=ordinal,
        node=node.name,
        exits=tuple(member.name for member in ends),
        kind=kind,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        grid=grid,
        window=windows[0] if windows else 0,
        windows=windows,
        text=text,
        text_queries=tokens > image,
        no_window=no_window,
        no_shared_guidance=ancestry.why_no_shared_guidance(ends),
        no_grid="" if grid else ancestry.why_no_grid(grids.inputs(image)),
    )


def _first_head(node: Node) -> int:
    heads = head_range(node)
    return 0 if heads is None else heads.first


def _describe_groups(first: Site, graph: Graph, ancestry: Ancestry) -> list[Site]:
    """Return the sites of all groups of a split attention, as its ``first`` group's was described.

    All have the shapes of the first but for the heads, and so what is legal.
    """
    marked = [(node, head_range(node)) for node in graph.nodes]
    own = [
        (node, heads) for node, heads in marked if heads is not None and heads.site == first.name
    ]
    groups = [(node, heads) for node, heads in own if node.target is ATTENTION]
    joined, every = next((node, heads) for node, heads in own if _joins(node))
    ends = exits_of(joined, ancestry)
    whole = replace(
        first,
        node=joined.name,
        exits=tuple(member.name for member in ends),
        heads=every.last,
        window=0,
        windows=(),
        no_window="its groups of heads have windows of their own",
        no_shared_guidance=ancestry.why_no_shared_guidance(ends),
    )
    return [_group(first, whole, node, heads, ancestry) for node, heads in groups]


def _joins(node: Node) -> bool:
    return node.target in (aten.cat.default, aten.transpose.int)


def _group(
    first: Site,
    whole: Site,
    node: Node,
    heads: HeadRange,
    ancestry: Ancestry,
) -> Site:
    ends = exits_of(node, ancestry)
    return replace(
        first,
        name=group_name(whole.name, heads.first, heads.last),
        node=node.name,
        exits=tuple(member.name for member in ends),
        heads=heads.last - heads.first,
        whole=whole,
        first_head=heads.first,
    )


def _why_not_a_site(node: Node, ancestry: Ancestry, latent: str) -> str:
    if value(node.args[0]).dim() != 4:
        return f"its query has {value(node.args[0]).dim()} dimensions, not [B, H, N, D]"
    if ancestry.is_static(node):
        return "it does not depend on the model's inputs"
    if latent and latent not in ancestry.roots(node):
        return "it depends on the conditions or the timestep, and not on the latent"
    plain = node.target is ATTENTION
    dropout = plain and argument(node, 4, "dropout_p", 0.0)
    return "attention dropout is active: call model.eval()" if dropout else ""


def _common_path(paths: Sequence[str]) -> str:
    parts = zip(*(path.split(".") for path in paths), strict=False)
    shared = takewhile(lambda names: len(set(names)) == 1, parts)
    return ".".join(names[0] for names in shared)


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"
