"""Make a site's output of earlier ones: its exit nodes become what the strategy combines.

Sharing a step (AST, section 3.2) repeats the last output; extrapolation (TaylorSeer, equation 3)
follows the line through the last two, or the parabola through the last three.

Before::

    %8 = aten.linear.default(%7, %3, %4): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%2, %8): float32[2, 64, 32]

After, on a line; norm, projections and attention that fed %8 alone are dead::

    %5 = input cache_blocks_0_attn_factor_0: float32[]
    %6 = input cache_blocks_0_attn_output_0: float32[2, 64, 32]
    %7 = input cache_blocks_0_attn_output_0_1: float32[2, 64, 32]
    %8 = aten.sub.Tensor(%6, %7): float32[2, 64, 32]
    %9 = aten.mul.Tensor(%8, %5): float32[2, 64, 32]
    %10 = aten.add.Tensor(%6, %9): float32[2, 64, 32]
    %11 = aten.mul.Tensor(%2, %10): float32[2, 64, 32]

Factors are inputs, not constants: steps that differ in them alone are one variant.

What is combined of a range of blocks is what it added: its base at this step comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import aten, find, insert, value
from ditfastattn.passes.graph.slots import Slot, factor_slots, output_slot, read_cache
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart


@dataclass(frozen=True)
class ReuseOutputs:
    """Replace the exit nodes of ``sites`` by what their strategies make of earlier outputs."""

    sites: tuple[tuple[Site, Strategy], ...]
    name: str = "reuse-outputs"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Replace each exit node.

        Ranges of blocks come first, the last one first: what is replaced later may be their base.
        """
        graph = module.graph
        order = {node.name: place for place, node in enumerate(graph.nodes)}
        ranges = [pair for pair in self.sites if pair[0].bases]
        ranges.sort(key=lambda pair: order[pair[0].exits[0]], reverse=True)
        for site, strategy in (*ranges, *(pair for pair in self.sites if not pair[0].bases)):
            _reuse(graph, site, strategy)
        return PassResult(len(self.sites) + keep_caches_apart(module.graph))


@dataclass(frozen=True)
class Expression:
    """Let ``combine`` compute with nodes of a graph, which it inserts before ``place``."""

    node: Node
    place: Node

    def __add__(self, other: Expression | float) -> Expression:
        """Insert a sum."""
        return self._call(aten.add.Tensor, other)

    def __sub__(self, other: Expression | float) -> Expression:
        """Insert a difference."""
        return self._call(aten.sub.Tensor, other)

    def __mul__(self, other: Expression | float) -> Expression:
        """Insert a product."""
        return self._call(aten.mul.Tensor, other)

    def __neg__(self) -> Expression:
        """Insert a negation."""
        return self._inserted(aten.neg.default, (self.node,))

    def _call(self, target: Any, other: Expression | float) -> Expression:
        operand = other.node if isinstance(other, Expression) else other
        return self._inserted(target, (self.node, operand))

    def _inserted(self, target: Any, args: tuple[Any, ...]) -> Expression:
        graph = self.place.graph
        with graph.inserting_before(self.place):
            return Expression(insert(graph, target, args, self.place), self.place)


def _reuse(graph: Graph, site: Site, strategy: Strategy) -> None:
    assert strategy.combine is not None
    slots = factor_slots(site.name, strategy.factor_count)
    factors = [read_factor(graph, slot, find(graph, site.node)) for slot in slots]
    for index, member in enumerate(site.exits):
        node = find(graph, member)
        ages = range(strategy.outputs_read)
        held = [read_cache(graph, output_slot(site.name, index, age), value(node)) for age in ages]
        combined: Any = strategy.combine(_expressions(held, node), _expressions(factors, node))
        if site.bases:
            combined = Expression(find(graph, site.bases[index]), node) + combined
        node.replace_all_uses_with(combined.node)


def read_factor(graph: Graph, slot: Slot, like: Node) -> Node:
    """Return the graph input that brings the factor ``slot``, on the device of ``like``."""
    with fake_mode(graph):
        scalar = torch.empty((), dtype=torch.float32, device=value(like).device)
    return read_cache(graph, slot, scalar)


def _expressions(nodes: Sequence[Node], place: Node) -> list[Expression]:
    return [Expression(node, place) for node in nodes]
