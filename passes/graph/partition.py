"""Partition the calls of a graph into regions, so that equal blocks become equal regions.

A region lies within one repeated block, or between two. A block is cut further: its conditioning
(shifts, scales, gates) is separate from its residual stream, and the stream is cut where nothing
else is alive, between attention and feed-forward. A plan combines the strategies of these parts
freely, and there are fewer forms of the parts than of whole blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from torch import Tensor
from torch.fx import Graph, Node

from ditfastattn.passes.graph.ir import VIEWS, aten
from ditfastattn.passes.graph.origin import is_static
from ditfastattn.passes.graph.repeated_blocks import block_names

Life = tuple[int, int]  # where in the graph a value is computed, and where it is last read
Partition = dict[Node, int]  # a call -> the number of its region; regions run in this order


def partition(graph: Graph) -> Partition:
    """Return the region of each call of ``graph``."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    lives = _lives(calls)
    regions: Partition = {}
    region = 0
    for block, start, end in _runs(block_names(calls)):
        inside = calls[start:end]
        cuts = _stream_cuts(calls, start, end, lives) if block else frozenset()
        conditioning = _conditioning(inside) if block else frozenset()
        first, region = region, region + bool(conditioning)
        for node in inside:
            source = node.args[0] if node.target is operator.getitem else None
            if node in conditioning:
                regions[node] = first
            else:  # tensors cross regions, tuples of them do not
                regions[node] = regions[source] if isinstance(source, Node) else region
            region += node in cuts
        region += 1
    return regions


def _runs(names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Return the block and the bounds of each run of calls of one block."""
    start = 0
    for name, group in groupby(names):
        end = start + len(list(group))
        yield name, start, end
        start = end


def _stream_cuts(
    calls: Sequence[Node], start: int, end: int, lives: Mapping[Node, Life]
) -> frozenset[Node]:
    """Return the additions of a block after which its residual stream alone is alive.

    The stream is as large as what the block hands on. Values at least half as large count.
    """
    alive = {node: life for node, life in lives.items() if life[0] < end and life[1] >= start}
    own = {node: life for node, life in alive.items() if life[0] >= start or life[1] < end}
    least = max((_bytes(node) for node, (_, last) in own.items() if last >= end), default=0) / 2
    large = {node: life for node, life in own.items() if least and _bytes(node) >= least}
    return frozenset(
        calls[place]
        for place in range(start, end)
        if calls[place].target is aten.add.Tensor
        and [node for node, (made, last) in large.items() if made <= place < last] == [calls[place]]
    )


def _conditioning(calls: Sequence[Node]) -> frozenset[Node]:
    """Return the calls of a block that do not depend on its residual stream.

    They compute shifts, scales and gates from the timestep. Strategies differ in which of these
    they use, and that must not change the key of the rest of the block. The stream consists of the
    largest values that come in.
    """
    inside = set(calls)
    incoming = {source for node in calls for source in node.all_input_nodes} - inside
    activations = [source for source in incoming if not is_static(source)]
    least = max(map(_bytes, activations), default=0) / 2
    depends = {source for source in activations if _bytes(source) >= least}
    for node in calls:
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    return frozenset(inside - depends)


def _lives(calls: Sequence[Node]) -> dict[Node, Life]:
    """Return the life of each call whose memory another call reads; views prolong it."""
    made = {node: place for place, node in enumerate(calls)}
    origins: dict[Node, Node] = {}
    lives: dict[Node, Life] = {}
    for place, node in enumerate(calls):
        source = node.args[0] if node.args else None
        tuple_or_view = not isinstance(node.meta["val"], Tensor) or node.target in VIEWS
        borrowed = tuple_or_view or node.target is operator.getitem
        shares = borrowed and isinstance(source, Node) and source in origins
        origins[node] = origins[source] if shares else node  # type: ignore[index]  # a node then
        for origin in {origins[read] for read in node.all_input_nodes if read in origins}:
            lives[origin] = (made[origin], place)
    return lives


def _bytes(node: Node) -> int:
    result = node.meta["val"]
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
