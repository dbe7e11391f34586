"""Find a graph's feed-forward branches by data flow: linear, a nonlinearity, linear.

The search walks back from a linear to the linears before the nonlinearity, and forward again from
their common input: a feed-forward is what depends on that input through these linears, and on
parameters alone, and has one exit node. It includes gated forms, dropout and LoRA adapters, but not
embedders, which precede all attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import ATTENTION, FLEX_ATTENTION, aten, calls, users_outside, value

_ATTENTIONS = (ATTENTION, FLEX_ATTENTION)
_LINEAR = aten.linear.default
_NONLINEAR = frozenset(
    getattr(aten, name).default
    for name in (
        *("gelu", "silu", "relu", "relu6", "tanh", "sigmoid", "mish", "elu", "selu", "celu"),
        *("leaky_relu", "softplus", "hardswish", "hardsigmoid", "hardtanh", "log_sigmoid"),
    )
)


@dataclass(frozen=True)
class FeedForward:
    """Name a feed-forward's linears, the last one's place among *all*, and its exit node."""

    linears: tuple[Node, ...]
    ordinal: int
    exit: Node


def find_feed_forwards(graph: Graph, is_static: Callable[[Node], bool]) -> list[FeedForward]:
    """Return the feed-forward branches that follow some attention, in execution order."""
    after_attention = closure(graph, calls(graph, *_ATTENTIONS), lambda _: True)
    order = {node: position for position, node in enumerate(graph.nodes)}
    found: dict[Node, FeedForward] = {}
    for ordinal, linear in enumerate(calls(graph, _LINEAR)):
        if linear not in after_attention or value(linear).dim() < 3:
            continue
        walked, sources = _before(linear, is_static)
        if not sources or not any(node.target in _NONLINEAR for node in walked):
            continue
        inputs = [node for node in (source.args[0] for source in sources) if isinstance(node, Node)]
        entry = min(inputs, key=order.__getitem__)
        inside = closure(graph, [entry], is_static) - {entry}
        if not inside.issuperset(walked | sources):
            continue
        # Where no norm comes first, the residual is this input too.
        around = _around(graph, entry, walked | sources | {linear})
        reached = (closure(graph, [linear], lambda _: True) & inside) - around
        inside -= around
        exits = [node for node in reached if users_outside(node, inside)]
        if len(exits) == 1 and entry in after_attention:
            linears = (*sorted(sources, key=order.__getitem__), linear)
            found.setdefault(exits[0], FeedForward(linears, ordinal, exits[0]))
    return list(found.values())


def linear_calls(captured: CapturedGraph) -> dict[Node, tuple[str, int]]:
    """Return the weight of each linear, and the linear's place among the calls with that weight.

    A weight is called as the model calls it, or "" where it is computed, as from a quantized one.
    """
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    named = zip(placeholders, captured.inputs, strict=True)
    names: dict[Any, str] = {node: entry.name for node, entry in named if entry.static}
    seen: Counter[str] = Counter()
    found: dict[Node, tuple[str, int]] = {}
    for linear in calls(captured.module.graph, _LINEAR):
        weight = names.get(linear.args[1], "")
        found[linear] = weight, seen[weight]
        seen[weight] += 1
    return found


def closure(graph: Graph, starts: Iterable[Node], is_static: Callable[[Node], bool]) -> set[Node]:
    """Return ``starts`` and all that depends on them and on ``is_static`` nodes alone."""
    inside = set(starts)
    for node in graph.nodes:
        if node.op != "call_function" or node in inside:
            continue
        sources = node.all_input_nodes
        if any(source in inside for source in sources) and all(
            source in inside or is_static(source) for source in sources
        ):
            inside.add(node)
    return inside


def _around(graph: Graph, entry: Node, branch: set[Node]) -> set[Node]:
    """Return ``entry``, and what depends on it by other ways than through ``branch``."""
    around: set[Node] = {entry}
    for node in graph.nodes:
        if node not in branch and not around.isdisjoint(node.all_input_nodes):
            around.add(node)
    return around


def _before(linear: Node, is_static: Callable[[Node], bool]) -> tuple[set[Node], set[Node]]:
    """Return what lies between ``linear`` and the linears before it, and those linears.

    Nothing where an attention or an input of the model comes first.
    """
    walked: set[Node] = set()
    sources: set[Node] = set()
    pending = [linear.args[0]]
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in walked or is_static(node):
            continue
        if node.op != "call_function" or node.target in _ATTENTIONS:
            return set(), set()
        if node.target is _LINEAR:
            sources.add(node)
            continue
        walked.add(node)
        pending.extend(node.all_input_nodes)
    return walked, sources
